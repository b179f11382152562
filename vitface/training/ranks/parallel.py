"""Computations over all ranks: gradients by torch's DDP, batch statistics, the norm of the gradient, evaluation.

Every loss is the mean over a rank's images, and DDP averages gradients over the ranks; the collectives below have the
gradients that make this the gradient of the mean over all ranks' images. Letters: W ranks, b images of a rank in one
forward pass, B = W · b images of all ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from vitface.errors import DataError, VitfaceError
from vitface.evaluation.benchmarks import Work, in_order
from vitface.training.ranks.process_group import all_gather, broadcast, rank, world_size


class Shard(nn.Parameter):
    """This rank's rows of a matrix that is split over the ranks; its gradient is complete without DDP."""


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0].contiguous())  # every rank's loss depends on every rank's x


class _Gather(torch.autograd.Function):
    """(b, ...) -> (B, ...), for a mean over B of which each rank computes its own part."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        # DDP will divide by W, as for a mean over b images; this is of the mean over B = W b of them
        return total.narrow(0, rank() * ctx.count, ctx.count) * world_size()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of the ranks' tensors of one shape, on every rank; with its gradient."""
    return x if world_size() == 1 else _Sum.apply(x)  # type: ignore[return-value]


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of the ranks' tensors of one shape, on every rank; with its gradient."""
    return sum_over_ranks(x) / world_size()


def on_any_rank(flag: Tensor) -> Tensor:
    """The largest `flag`, 0.0 or 1.0, of any rank, on every rank; in place, and without waiting for the device."""
    if world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return flag


def gather_rows(rows: Tensor) -> Tensor:
    """(b, ...) of each rank, all of one shape -> (B, ...) in the order of the ranks, on every rank.

    Its gradient is for a loss over B of which each rank differentiates its own part.
    """
    return rows if world_size() == 1 else _Gather.apply(rows)  # type: ignore[return-value]


class BatchNormOverRanks(nn.BatchNorm1d):
    """BatchNorm1d (B, E) over the batch of all ranks, like nn.SyncBatchNorm, which runs on GPUs only."""

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        count = len(input) * world_size()
        mean = sum_over_ranks(input.sum(0)) / count
        centred = input - mean
        variance = sum_over_ranks(centred.square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.get_buffer("num_batches_tracked").add_(1)
        return centred * (variance + self.eps).rsqrt() * self.weight + self.bias


def synchronise_batch_norms(model: nn.Module) -> None:
    """Makes every BatchNorm1d of `model` one over all ranks."""
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = BatchNormOverRanks


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` in torch's DDP, which averages the gradients over the ranks.

    No parameter is broadcast: ranks start from the same files and seeds, which `check_same` compares.
    """
    if world_size() == 1:
        return module
    numbers = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=numbers, init_sync=False)


@contextmanager
def accumulating(last: bool, *modules: nn.Module) -> Iterator[None]:
    """Inside, gradients stay on their rank, except those of the `last` micro-batch of a step."""
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, DistributedDataParallel) and not last:
                stack.enter_context(module.no_sync())
        yield


def clip_gradients(parameters: Iterable[nn.Parameter], clip: float) -> Tensor:
    """Scales the gradients to a joint norm of at most `clip`; returns the norm before, the same on every rank."""
    parameters = list(parameters)
    shards = [p for p in parameters if isinstance(p, Shard)]
    if not shards:
        return clip_grad_norm_(parameters, clip)
    whole = get_total_norm([p.grad for p in parameters if p.grad is not None and not isinstance(p, Shard)])
    part = get_total_norm([p.grad for p in shards if p.grad is not None])
    norm = (whole.double().square() + sum_over_ranks(part.double().square())).sqrt().to(whole.dtype)
    clip_grads_with_norm_(parameters, clip, norm)
    return norm


def in_turns(work: Work, count: int) -> np.ndarray:
    """The arrays of the turns 0 to `count` - 1, float32, concatenated; each rank does every W-th and gets all rows.

    DataError on all ranks if the work of one fails.
    """
    if world_size() == 1:
        return in_order(work, count)
    turned = over_ranks(lambda turns: zip(turns, work(turns), strict=True), range(count))
    return np.concatenate([rows for _, rows in turned])


def over_ranks(work: Callable[[Any], Iterator[tuple[Any, np.ndarray]]], items: Sequence[Any] = ()) -> Iterator[Any]:
    """Yields on all ranks what `work` yields of rank 0's items: of each a JSON value and an array float32 (n, E).

    Each rank does every W-th item. DataError on all ranks if the work of one fails.
    """
    if world_size() == 1:
        yield from work(items)
        return
    items = broadcast(list(items))
    mine = work(items[rank() :: world_size()])
    for start in range(0, len(items), world_size()):
        about, rows, failure = None, np.zeros((0, 0), np.float32), ""
        try:
            if start + rank() < len(items):
                about, rows = next(mine)
        except VitfaceError as error:
            failure = str(error)
        everyone = all_gather([about, rows.shape, failure])
        for *_, theirs in everyone:
            if theirs:
                raise DataError(theirs)
        whole = torch.zeros(sum(length for _, (length, _), _ in everyone), everyone[0][1][1])
        parts = whole.split([length for _, (length, _), _ in everyone])
        if len(rows):
            parts[rank()].copy_(torch.from_numpy(np.asarray(rows, np.float32)))
        dist.all_reduce(whole)  # each row is zero on all ranks but one
        for (about, *_), part in zip(everyone[: len(items) - start], parts, strict=False):
            yield about, part.numpy()
