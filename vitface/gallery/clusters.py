"""Groups images by person: average linkage on the cosine, by SciPy.

Two groups are merged while the mean cosine over all their pairs reaches the threshold, so that a single wrong pair does
not join two people. All pairs are compared.
"""

import numpy as np

from vitface.errors import DataError
from vitface.extras import require

MAX_ROWS = 20_000  # 200 million pairs: 1.6 GB, and as much again while groups are merged
BLOCK = 512


def cluster(embeddings: np.ndarray, threshold: float) -> np.ndarray:
    """Unit-norm embeddings (N, E) and a cosine -> the group of each row, int64 (N,); group 0 is the largest.

    ConfigError without SciPy, DataError for more than MAX_ROWS rows.
    """
    require("clustering", "scipy")
    if len(embeddings) > MAX_ROWS:
        raise DataError(f"{len(embeddings):,} rows: all pairs are compared, at most {MAX_ROWS:,} rows; cluster a part")
    if len(embeddings) < 2:
        return np.zeros(len(embeddings), np.int64)
    from scipy.cluster.hierarchy import fcluster, linkage

    tree = linkage(pair_distances(embeddings), "average")
    groups = fcluster(tree, 1 - threshold, "distance")
    _, first, group, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    return rank[group]


def pair_distances(embeddings: np.ndarray) -> np.ndarray:
    """1 - cosine of each of the N (N - 1) / 2 pairs, float64, in the order of np.triu_indices(N, 1)."""
    count, at = len(embeddings), 0
    distances = np.empty(count * (count - 1) // 2)
    for start in range(0, count, BLOCK):
        cosines = embeddings[start : start + BLOCK] @ embeddings[start:].T
        for i, row in enumerate(cosines):
            distances[at : at + len(row) - i - 1] = 1 - row[i + 1 :]
            at += len(row) - i - 1
    return distances.clip(0, 2, out=distances)
