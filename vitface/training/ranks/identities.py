"""The identity matrix cut over the ranks, for millions of people, without a whole matrix of logits.

Partial FC (An et al. 2022, arXiv:2203.15565): each rank holds the prototypes of a range of classes and gets the
embeddings of all ranks. It computes logits in chunks of classes, forward and again backward, so that the memory beyond
parameters and gradients does not grow with C. With `sample_rate` below 1, a step uses the prototypes of the people in
it and of a share of the others, drawn as a function of (seed, step, class): the same ones for any number of ranks.

In a checkpoint there is a file per range of classes, the same ones for any number of ranks. The file
identities-FIRST-END.safetensors holds "weight", "exp_avg" and "exp_avg_sq" of the classes [FIRST, END), each
(END - FIRST, E). Rank 0 writes them, one range in memory at a time. To resume, each rank reads its own classes from
whichever files they are in.

Letters: W ranks, b images of a rank, B = W · b images of all ranks, E embedding, C identities, c those of a rank.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vitface.data.counter import uniform
from vitface.errors import CheckpointError
from vitface.model.margin import EPS
from vitface.store.tensors import tensor_bytes
from vitface.training.ranks.parallel import Shard, gather_rows, sum_over_ranks
from vitface.training.ranks.process_group import rank, world_size

CHUNK = 2048  # classes whose logits exist at a time
BLOCK = 1 << 16  # classes that are initialised at a time, and identities in a file of a checkpoint
LOWEST = -1e30  # the largest logit where there is none; finite, so that a difference of two is finite
DRAWS = 4  # first key of the random numbers that draw classes
MOMENTS = ("exp_avg", "exp_avg_sq")
ROWS = ("weight", *MOMENTS)


def class_range(num_identities: int, number: int, count: int) -> tuple[int, int]:
    """(first, end) of the classes of rank `number` of `count`; as equal as can be, empty if there are too few."""
    return num_identities * number // count, num_identities * (number + 1) // count


class _Columns(torch.autograd.Function):
    """Unit embeddings (B, E), prototypes (c, E), columns (B,) -> peak, total, own (B,), for the softmax over classes.

    Over the classes that are not the image's own: `peak` is the largest scale cos θ_j, without a gradient, and `total`
    is sum_j exp(scale cos θ_j - peak). `own` is the cosine with the image's own class, in column `columns`; 0 where
    that is -1, because another rank has it.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, weight: Tensor, columns: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        peak, total, own = unit.new_full((len(unit),), LOWEST), unit.new_zeros(len(unit)), unit.new_zeros(len(unit))
        for first in range(0, len(weight), CHUNK):
            cosine = unit @ F.normalize(weight[first : first + CHUNK], eps=EPS).T  # (B, chunk)
            mine, column = _inside(columns, first, cosine.shape[1])
            own = torch.where(mine, cosine.gather(1, column)[:, 0], own)
            logits = _put(cosine.mul_(scale), column, mine, -torch.inf)
            higher = torch.maximum(peak, logits.amax(1))
            total.mul_((peak - higher).exp_()).add_(logits.sub_(higher[:, None]).exp_().sum(1))
            peak = higher
        ctx.scale = scale
        ctx.save_for_backward(unit, weight, columns, peak)
        ctx.mark_non_differentiable(peak)
        return peak, total, own

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        unit, weight, columns, peak = ctx.saved_tensors
        _, d_total, d_own = gradients
        d_unit, d_weight = torch.zeros_like(unit), torch.empty_like(weight)
        for first in range(0, len(weight), CHUNK):
            rows = weight[first : first + CHUNK]
            length = rows.norm(dim=1, keepdim=True).clamp_min(EPS)
            direction = rows / length
            d_cosine = (unit @ direction.T).mul_(ctx.scale).sub_(peak[:, None]).exp_()
            d_cosine.mul_((ctx.scale * d_total)[:, None])
            mine, column = _inside(columns, first, len(rows))
            _put(d_cosine, column, mine, d_own)
            d_unit.addmm_(d_cosine, direction)
            d_rows = d_cosine.T @ unit
            along = (d_rows * direction).sum(1, keepdim=True).where(length > EPS, 0)  # no gradient along a unit vector
            d_weight[first : first + CHUNK] = d_rows.sub_(direction.mul_(along)).div_(length)
        return d_unit, d_weight, None, None


def _inside(columns: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Whether an image's own class is in a chunk, bool (B,), and its column there, (B, 1); of the others any column.

    Nothing here depends on values, so a GPU is not waited for.
    """
    return (columns >= first) & (columns < first + count), (columns - first).clamp(0, count - 1)[:, None]


def _put(matrix: Tensor, column: Tensor, mine: Tensor, values: Tensor | float) -> Tensor:
    """`values` (B,) into the rows that are `mine`, each into its `column`; in place."""
    return matrix.scatter_(1, column, torch.where(mine, values, matrix.gather(1, column)[:, 0])[:, None])


class ShardedMargin(nn.Module):
    """A rank's share of `MarginLoss`: embedding (b, E), labels (b,) in [0, C) -> the mean loss over all B images.

    The loss and its gradients are those of `MarginLoss` over B images up to rounding. `weight` holds the classes
    [first, end); with `sample_rate` below 1 it holds those that were drawn for a step, between `draw` and `put_back`.
    """

    def __init__(
        self,
        margin: nn.Module,
        num_identities: int,
        embedding_dim: int,
        scale: float,
        seed: int = 0,
        sample_rate: float = 1.0,
    ):
        super().__init__()
        self.margin, self.scale = margin, scale
        self.num_identities, self.sample_rate, self.seed = num_identities, sample_rate, seed
        self.first, self.end = class_range(num_identities, rank(), world_size())
        rows = initial_rows(num_identities, embedding_dim, seed, self.first, self.end)
        self.drawn: Tensor | None = None  # (n,) which of this rank's classes `weight` holds, ascending; None: all
        if sample_rate == 1:
            self.weight = Shard(rows)
            return
        self.weight = Shard(torch.empty(0, embedding_dim))
        for name, tensor in {"weight": rows, **{key: torch.zeros_like(rows) for key in MOMENTS}}.items():
            self.register_buffer(f"all_{name}", tensor, persistent=False)

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        embedding = embedding.float()
        unit = gather_rows(F.normalize(embedding, eps=EPS))
        norms, labels = gather_rows(embedding.detach().norm(dim=1)), gather_rows(labels)
        columns = self._columns(labels)
        peak, total, own = _Columns.apply(unit, self.weight, columns, self.scale)  # type: ignore[misc]
        # each rank differentiates its own part; the parts of the others are constants
        cosine = own.where(columns >= 0, sum_over_ranks(own.detach()))
        target = self.scale * self.margin(cosine, norms)
        peaks, totals = gather_rows(peak[None]), list(gather_rows(total.detach()[None]))  # (W, B)
        totals[rank()] = total
        highest = torch.maximum(peaks.amax(0), target.detach())
        total = (torch.stack(totals) * (peaks - highest).exp()).sum(0) + (target - highest).exp()
        return (total.log() + highest - target).mean()

    def _columns(self, labels: Tensor) -> Tensor:
        """The row of `weight` for each label (B,), -1 for those of another rank."""
        here = (labels >= self.first) & (labels < self.end)
        columns = labels - self.first
        if self.drawn is not None:
            columns = torch.searchsorted(self.drawn, columns)
        return columns.where(here, -1)

    def draw(self, step: int, labels: np.ndarray, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Loads the prototypes of a step and their moments; `labels` are those of all ranks and micro-batches.

        Each class that is not among the labels is drawn with probability `sample_rate`. The graph of an earlier step
        must not be used any more: its number of rows is another one.
        """
        if self.sample_rate == 1:
            return
        chosen = uniform(1, self.seed, DRAWS, step, np.arange(self.first, self.end))[:, 0] < self.sample_rate
        chosen[labels[(labels >= self.first) & (labels < self.end)] - self.first] = True
        self.drawn = torch.from_numpy(np.flatnonzero(chosen)).to(self.weight.device)
        self.weight.data = self.get_buffer("all_weight")[self.drawn]
        if optimizer is not None:
            state = optimizer.state[self.weight]
            state.setdefault("step", torch.zeros((), device=self.weight.device))  # counts all steps, for all classes
            state.update({name: self.get_buffer(f"all_{name}")[self.drawn] for name in MOMENTS})

    @torch.no_grad()
    def put_back(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """After a step: writes the drawn prototypes and moments back among all of this rank's."""
        if self.drawn is None:
            return
        if optimizer is not None:
            state = {"weight": self.weight.data, **{name: optimizer.state[self.weight][name] for name in MOMENTS}}
            for name, tensor in state.items():
                self.get_buffer(f"all_{name}")[self.drawn] = tensor
            for name in MOMENTS:
                del optimizer.state[self.weight][name]
        self.drawn, self.weight.data = None, self.weight.data[:0]

    def rows(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """{"weight", "exp_avg", "exp_avg_sq"}, each (c, E): this rank's prototypes and their moments, not copies."""
        if self.sample_rate < 1:
            return {name: self.get_buffer(f"all_{name}") for name in ROWS}
        return {"weight": self.weight.data, **{name: optimizer.state[self.weight][name] for name in MOMENTS}}


def initial_rows(num_identities: int, embedding_dim: int, seed: int, first: int, end: int) -> Tensor:
    """Rows [first, end) of the matrix that `MarginLoss` starts with, drawn block by block: (end - first, E)."""
    generator, rows = torch.Generator().manual_seed(seed), torch.empty(end - first, embedding_dim)
    for start in range(0, end, BLOCK):
        block = torch.randn(min(BLOCK, num_identities - start), embedding_dim, generator=generator)
        low, high = max(start, first), min(start + len(block), end)
        if low < high:
            rows[low - first : high - first] = block[low - start : high - start] * 0.01
    return rows


def identity_files(margin: ShardedMargin, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of each file, for rank 0 to write. All ranks must exhaust it together, to send their rows.

    CheckpointError for values that are not finite.
    """
    rows = margin.rows(optimizer)
    for first in range(0, margin.num_identities, BLOCK):
        end = min(first + BLOCK, margin.num_identities)
        tensors = {name: _collect(rows[name], margin.first, first, end) for name in ROWS}
        for name, tensor in tensors.items():
            if rank() == 0 and not tensor.isfinite().all():
                what = f"{name} of the identities {first} to {end}"
                raise CheckpointError(f"this step was not saved: {what} has NaN or infinite values")
        yield f"identities-{first}-{end}.safetensors", tensor_bytes(tensors) if rank() == 0 else b""


def _collect(rows: Tensor, start: int, first: int, end: int) -> Tensor:
    """This rank's rows, of the classes from `start` -> rows [first, end) of all ranks (END - FIRST, E), on rank 0."""
    block = torch.zeros(end - first, rows.shape[1])
    low, high = max(start, first), min(start + len(rows), end)
    if low < high:
        block[low - first : high - first] = rows[low - start : high - start]
    if world_size() > 1:  # a row is zero on all ranks but one; as integers, a sum changes no bit of it
        dist.reduce(block.view(torch.int32), 0)
    return block


def load_identities(step: Path, margin: ShardedMargin, optimizer: torch.optim.Optimizer) -> None:
    """Loads this rank's rows from a verified step directory.

    CheckpointError unless the directory holds each class once, of this size and finite.
    """
    names = ((re.fullmatch(r"identities-(\d+)-(\d+)\.safetensors", path.name), path) for path in step.iterdir())
    ranges = sorted((int(match[1]), int(match[2]), path) for match, path in names if match)
    borders, end = [0, *(stop for _, stop, _ in ranges)], margin.num_identities
    if [start for start, _, _ in ranges] != borders[:-1] or borders[-1] != end:
        raise CheckpointError(f"{step} does not hold the {end:,} identities of this run, in files without gaps")
    own = margin.rows(optimizer)
    for start, stop, path in ranges:
        low, high = max(start, margin.first), min(stop, margin.end)
        if low < high:
            for name, rows in _read_slice(path, low - start, high - start).items():
                place = own[name][low - margin.first : high - margin.first]
                if rows.shape != place.shape or rows.dtype != torch.float32 or not rows.isfinite().all():
                    raise CheckpointError(f"{path}: {name} is not finite float32 of {stop - start} x {place.shape[1]}")
                place.copy_(rows)


def _read_slice(path: Path, first: int, end: int) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name)[first:end] for name in ROWS}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
