"""Groups images by person: exact average linkage on the cosine, in memory that grows with the rows only.

Two groups are merged while the mean cosine over all their pairs reaches the threshold, the most similar ones first, so
that a single wrong pair does not join two people. Why this needs no matrix of all pairs:

- The mean cosine of two groups is the product of their mean rows, so a group is a row.
- It is at most the largest cosine between them. So groups that no pair at or above a cosine connects are not merged
  at or above it, and pairs below it are not kept. The others are found by blocked products, in the fastest precision
  of the device with a margin for its rounding, and then computed in float32.
- Groups that are each other's most similar ones can be merged in any order: average linkage is reducible, a merged
  group is to no other one more similar than the better of its two. So all of a round are merged at once.

Where more than PAIRS pairs reach the threshold, the best half of them is kept, which has a higher one: rows are merged
down to that, and the groups, which are fewer, are compared again. Letters: N rows, E embedding, M groups, P pairs.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from vitface.data.progress import Progress
from vitface.device import DTYPES, resolve_dtype

BLOCK = 1 << 11  # rows, and as many columns, that are compared at a time
PAIRS = 16  # for each row, that are kept, of 20 bytes each
GATHERED = 1 << 10  # pairs whose rows are multiplied at a time
FEW = 1 / 64  # of a block's pairs: up to these it is faster to multiply theirs than the whole block


def cluster(embeddings: np.ndarray, threshold: float, device: str | torch.device = "cpu") -> np.ndarray:
    """Unit-norm embeddings (N, E) and a cosine -> the group of each row, int64 (N,); group 0 is the largest."""
    if not len(embeddings):
        return np.zeros(0, np.int64)
    first, group = _distinct(embeddings)
    means = torch.from_numpy(embeddings[first]).to(device, torch.float32)
    size = torch.from_numpy(np.bincount(group)).to(device, torch.float32)
    complete = False
    while not complete:
        found = _close_pairs(means, threshold)
        roots, number = _merged(means, size, found).unique(return_inverse=True)
        means, size, group, complete = means[roots], size[roots], number.cpu().numpy()[group], found.complete
    _, first, group, counts = np.unique(group, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.lexsort((first, -counts))] = np.arange(len(counts))
    return rank[group]


def _distinct(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(The first of each set of equal rows, in order; which of these each row equals): copies have too many pairs."""
    number: dict[bytes, int] = {}
    digests = (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in embeddings)
    group = np.array([number.setdefault(digest, len(number)) for digest in digests])
    return np.unique(group, return_index=True)[1], group


class _Pairs:
    """Pairs int64 (2, P) of rows whose cosines (P,) reach `floor`; no other pair has a higher one.

    The floor is the threshold, unless more than PAIRS reach that: then it rises to the lowest of the best half, and the
    pairs are not `complete`.
    """

    def __init__(self, like: Tensor, floor: float):
        self.pairs, self.cosines = like.new_empty(2, 0, dtype=torch.long), like.new_empty(0)
        self.floor, self.complete, self.most = floor, True, PAIRS * len(like)
        self.new: list[tuple[Tensor, Tensor]] = []
        self.waiting = 0

    def add(self, pairs: Tensor, cosines: Tensor) -> None:
        good = cosines >= self.floor if self.complete else cosines > self.floor
        self.new.append((pairs[:, good], cosines[good]))
        self.waiting += len(self.new[-1][1])
        if self.waiting > min(len(self.cosines), self.most - len(self.cosines)):  # so each is copied a few times only
            self.join()

    def join(self) -> None:
        """Adds the new pairs to the others, of which the best remain."""
        pairs, cosines = zip((self.pairs, self.cosines), *self.new, strict=True)
        self.pairs, self.cosines, self.new, self.waiting = torch.cat(pairs, dim=1), torch.cat(cosines), [], 0
        if len(self.cosines) > self.most:
            self.cosines, best = self.cosines.topk(-(-self.most // 2), sorted=False)
            self.pairs = self.pairs[:, best]
            self.floor, self.complete = self.cosines.min().item(), False


def _close_pairs(means: Tensor, threshold: float) -> _Pairs:
    """The pairs of rows (M, E) of at most unit norm whose product reaches the threshold."""
    dtype = DTYPES[resolve_dtype("auto", means.device, means.shape[1])]
    fast, margin = means.to(dtype), 2 * torch.finfo(dtype).eps + 1e-5  # four roundings of eps / 2, and those of sums
    kept, starts = _Pairs(means, threshold), range(0, len(means), BLOCK)
    blocks = [(top, left) for top in starts for left in starts if left >= top]
    for top, left in Progress(blocks, desc=f"comparing {len(means):,} rows", unit="block", dynamic_ncols=True):
        rows, columns = slice(top, top + BLOCK), slice(left, left + BLOCK)
        near = fast[rows] @ fast[columns].T >= kept.floor - margin
        near = near.triu_(1) if top == left else near
        pairs = near.nonzero().T + torch.tensor([[top], [left]], device=means.device)
        few = pairs.shape[1] < FEW * near.numel()
        cosines = _products(means, pairs) if few else (means[rows] @ means[columns].T)[near]
        if len(cosines):
            kept.add(pairs, cosines)
    kept.join()
    return kept


def _products(rows: Tensor, pairs: Tensor) -> Tensor:
    """The products (P,) of the rows of each pair."""
    each = [(rows[a] * rows[b]).sum(1) for a, b in (some.unbind() for some in pairs.split(GATHERED, dim=1))]
    return torch.cat(each) if each else rows.new_empty(0)


def _merged(means: Tensor, size: Tensor, found: _Pairs) -> Tensor:
    """Merges groups while a pair's cosine reaches the floor: the row int64 (M,) that stands for each row's group.

    `means` (M, E) and `size` (M,) of these rows become those of their groups.
    """
    pairs, cosines, root = found.pairs, found.cosines, torch.arange(len(means), device=means.device)
    while len(cosines):
        a, b = pairs[:, _best_of_both(pairs, cosines, len(means))]
        both = size[a] + size[b]
        means[a] = (means[a] * (size[a] / both)[:, None]).addcmul_(means[b], (size[b] / both)[:, None])
        size[a], root[b] = both, a
        changed = torch.zeros_like(root, dtype=torch.bool).index_fill_(0, torch.cat([a, b]), True)[pairs].any(0)
        ends = root[pairs[:, changed]].sort(0).values
        again = (ends[0] * len(means) + ends[1])[ends[0] != ends[1]].unique()
        again = torch.stack([again // len(means), again % len(means)])
        products = _products(means, again)
        reach = products >= found.floor
        pairs = torch.cat([pairs[:, ~changed], again[:, reach]], dim=1)
        cosines = torch.cat([cosines[~changed], products[reach]])
    while not torch.equal(root, up := root[root]):
        root = up
    return root


def _best_of_both(pairs: Tensor, cosines: Tensor, count: int) -> Tensor:
    """The numbers of pairs that are the best one of both their rows, where equal ones are in a random order."""
    best = cosines.new_full((count,), -torch.inf).scatter_reduce(0, pairs.flatten(), cosines.repeat(2), "amax")
    mutual = (cosines == best[pairs]).all(0).nonzero()[:, 0]
    order = torch.randperm(len(mutual), generator=torch.Generator().manual_seed(0)).to(pairs.device)
    first = order.new_full((count,), -1).scatter_reduce(0, pairs[:, mutual].flatten(), order.repeat(2), "amax")
    return mutual[(order == first[pairs[:, mutual]]).all(0)]
