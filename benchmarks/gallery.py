"""What a search in a gallery costs, beside the bare matrix product and topk over one matrix of all rows.

    python benchmarks/gallery.py [--rows 1000000] [--queries 1 16 256]

All search the same rows for the same queries and take turns: a gallery in float32, one in float16, and the product. The
figures are medians with their spread. First it is asserted that all find the same scores, and rows of which float64
says that they have these scores. The gallery's time includes normalising the queries and turning the result into
arrays. The last line is JSON: for each number of queries the median time of the float32 gallery over that of the bare
product, and that of the float16 gallery over that of the float32 one.
"""

import argparse
import json
import statistics

import numpy as np
import torch
from timing import interleave, machine
from torch import Tensor

from vitface.gallery.gallery import Gallery

CHUNK = 100_000


def filled(rows: int, dim: int) -> tuple[Gallery, Gallery, Tensor]:
    """Galleries of random unit rows in float32 and in float16, and the same rows as one matrix (N, E)."""
    generator = torch.Generator().manual_seed(0)
    gallery, half, matrix = Gallery(dim), Gallery(dim, dtype="float16"), torch.empty(rows, dim)
    for start in range(0, rows, CHUNK):
        chunk = matrix[start : start + CHUNK]
        chunk.normal_(generator=generator)
        chunk /= chunk.norm(dim=1, keepdim=True)
        for each in (gallery, half):
            each.add([f"{i:07d}" for i in range(start, start + len(chunk))], chunk)
    return gallery, half, matrix


def bare(matrix: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    scores, rows = (queries @ matrix.T).topk(k, dim=1)
    return scores, rows


def check(gallery: Gallery, matrix: Tensor, queries: Tensor, k: int) -> None:
    scores, rows = gallery.top_k(queries, k)
    tolerance = 1e-6 if gallery.settings.dtype == "float32" else 1e-3
    np.testing.assert_allclose(scores, bare(matrix, queries, k)[0].numpy(), atol=tolerance)
    exact = torch.einsum("qe,qke->qk", queries.double(), matrix[torch.from_numpy(rows)].double())
    np.testing.assert_allclose(scores, exact.numpy(), atol=tolerance)
    assert (np.diff(scores, axis=1) <= 0).all() and all(len(set(row)) == k for row in rows.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--top", type=int, default=10, metavar="K")
    parser.add_argument("--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    gallery, half, matrix = filled(arguments.rows, arguments.dim)
    print(f"{machine()}\n{arguments.rows:,} x {arguments.dim}, top {arguments.top}; ms per search (min to max)")
    ratios, halves = {}, {}
    for count in arguments.queries:
        queries = torch.nn.functional.normalize(torch.randn(count, arguments.dim), dim=1)
        check(gallery, matrix, queries, arguments.top)
        check(half, matrix, queries, arguments.top)
        steps = {
            "gallery": lambda queries=queries: gallery.top_k(queries, arguments.top),
            "float16": lambda queries=queries: half.top_k(queries, arguments.top),
            "bare": lambda queries=queries: bare(matrix, queries, arguments.top),
        }
        rates = interleave(steps, 1, arguments.repetitions, warmup=1)
        times = {name: [1000 / rate for rate in values] for name, values in rates.items()}
        median = {name: statistics.median(values) for name, values in times.items()}
        for name, values in times.items():
            print(f"{count:>5} queries  {name:<8} {median[name]:>9.1f} ({min(values):.1f} to {max(values):.1f})")
        ratios[str(count)] = round(median["gallery"] / median["bare"], 3)
        halves[str(count)] = round(median["float16"] / median["gallery"], 3)
    sizes = {"rows": arguments.rows, "dim": arguments.dim}
    print(json.dumps({**sizes, "time_ratio_by_queries": ratios, "float16_over_float32": halves}))


if __name__ == "__main__":
    main()
