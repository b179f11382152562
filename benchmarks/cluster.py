"""What grouping by person costs: time and memory of `vitface.gallery.clusters.cluster` on drawn rows.

    python benchmarks/cluster.py [--rows 20000 100000] [--dim 512] [--photos 20] [--threshold 0.25] [--device cpu]

A person's rows have cosines of about 0.5 with each other and of 0 with those of others. Up to 20,000 rows, the groups
are compared with those of SciPy's average linkage on all pairs. Each line has the peak memory of the process so far.
"""

import argparse
import resource
import time

import numpy as np
import torch
from timing import machine

from vitface.gallery.clusters import cluster
from vitface.metrics import agreement

EXACT = 20_000  # SciPy's matrix of all pairs has 1.6 GB


def drawn(rows: int, dim: int, photos: int) -> tuple[np.ndarray, np.ndarray]:
    """(unit rows float32 (N, E), the person of each): about so many photos of each person."""
    generator = torch.Generator().manual_seed(0)
    people = torch.randint(0, max(1, rows // photos), (rows,), generator=generator).sort().values
    means = torch.nn.functional.normalize(torch.randn(max(1, rows // photos), dim, generator=generator))
    x = torch.randn(rows, dim, generator=generator)
    x *= (0.7 + 0.7 * torch.rand(rows, 1, generator=generator)) / dim**0.5
    x += means[people]
    return torch.nn.functional.normalize(x, out=x).numpy(), people.numpy()


def scipy_groups(rows: np.ndarray, threshold: float) -> np.ndarray:
    from scipy.cluster.hierarchy import fcluster, linkage

    distances = np.concatenate([1 - rows[i + 1 :] @ rows[i] for i in range(len(rows))]).astype(float)
    return fcluster(linkage(distances.clip(0, 2), "average"), 1 - threshold, "distance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--photos", type=int, default=20, help="of each person")
    parser.add_argument("--threshold", type=float, default=0.25)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    print(f"{machine()}\n{arguments.dim} numbers a row, {arguments.photos} photos of each person, {arguments.device}")
    for count in arguments.rows:
        rows, people = drawn(count, arguments.dim, arguments.photos)
        start = time.perf_counter()
        groups = cluster(rows, arguments.threshold, arguments.device)
        seconds, memory = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        same = ""
        if count <= EXACT:
            pairs, _ = agreement(groups, scipy_groups(rows, arguments.threshold))
            same = "; SciPy's groups" if tuple(pairs) == (1, 1) else f"; NOT SciPy's groups: {pairs}"
        f = agreement(groups, people)[1].f
        print(f"{count:,} rows: {seconds:.1f} s, {memory:.2f} GB; {groups.max() + 1:,} groups, BCubed F {f:.4f}{same}")


if __name__ == "__main__":
    main()
