"""The sharded identity matrix in checkpoints: a file per range of classes, the same ones for any number of ranks.

identities-FIRST-END.safetensors holds "weight", "exp_avg" and "exp_avg_sq" of the classes [FIRST, END), each
(END - FIRST, E). Rank 0 writes them, one range in memory at a time. To resume, each rank reads its own classes from
whichever files they are in.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitface.errors import CheckpointError
from vitface.store.tensors import tensor_bytes
from vitface.training.ranks.identities import BLOCK, MOMENTS, ShardedMargin
from vitface.training.ranks.process_group import rank, world_size

NAMES = ("weight", *MOMENTS)


def identity_files(margin: ShardedMargin, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of each file, for rank 0 to write. All ranks must exhaust it together, to send their rows.

    CheckpointError for values that are not finite.
    """
    rows = margin.rows(optimizer)
    for first in range(0, margin.num_identities, BLOCK):
        end = min(first + BLOCK, margin.num_identities)
        tensors = {name: _collect(rows[name], margin.first, first, end) for name in NAMES}
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


def read_identities(step: Path, margin: ShardedMargin) -> dict[str, Tensor]:
    """This rank's rows of a verified step directory, {"weight", "exp_avg", "exp_avg_sq"}.

    CheckpointError unless the directory holds each class once, of this size and finite.
    """
    end, dim = margin.num_identities, margin.weight.shape[1]
    names = ((re.fullmatch(r"identities-(\d+)-(\d+)\.safetensors", path.name), path) for path in step.iterdir())
    ranges = sorted((int(match[1]), int(match[2]), path) for match, path in names if match)
    borders = [0, *(stop for _, stop, _ in ranges)]
    if [start for start, _, _ in ranges] != borders[:-1] or borders[-1] != end:
        raise CheckpointError(f"{step} does not hold the {end:,} identities of this run, in files without gaps")
    parts: dict[str, list[Tensor]] = {name: [torch.empty(0, dim)] for name in NAMES}
    for start, stop, path in ranges:
        low, high = max(start, margin.first), min(stop, margin.end)
        if low < high:
            for name, rows in _read_slice(path, low - start, high - start).items():
                if rows.shape != (high - low, dim) or rows.dtype != torch.float32 or not rows.isfinite().all():
                    raise CheckpointError(f"{path}: {name} is not finite float32 of {stop - start} x {dim}")
                parts[name].append(rows)
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _read_slice(path: Path, first: int, end: int) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name)[first:end] for name in NAMES}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
