"""What a run does about NaN and infinity: it skips a step whose fp16 gradients overflowed, or diagnoses and stops."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitface.errors import VitfaceError
from vitface.files import replace_file
from vitface.training.ranks.process_group import agree, broadcast, lowest, rank, world_size

MOST_SKIPPED = 20  # steps in a row


class NonFiniteError(VitfaceError):
    """The loss or a gradient became NaN or infinite, first on rank `culprit`; the step was not taken."""

    def __init__(self, message: str, culprit: int = 0):
        super().__init__(message)
        self.culprit = culprit


def may_skip(loss: float, skipped_in_a_row: int) -> bool:
    """Whether a bad step under a scaled loss can be left at that: a lower scale helps gradients, but not a loss."""
    return not agree(not math.isfinite(loss), [])[0] and skipped_in_a_row + 1 < MOST_SKIPPED


def non_finite_error(
    loss: float, norm: float, parameters: Iterable[nn.Parameter], skipped_in_a_row: int = 0
) -> NonFiniteError:
    """The error after a bad step, the same on every rank; to be called on all of them."""
    own = not all(p.grad.isfinite().all() for p in parameters if p.grad is not None)
    culprit = _first_fault([not math.isfinite(loss), own, not math.isfinite(norm)]) or 0
    found = broadcast(f"loss {loss}, gradient norm {norm}", culprit)
    where = f"rank {culprit}: " if world_size() > 1 else ""
    many = f"the last {MOST_SKIPPED} steps were skipped, each with a lower loss scale than the one before; "
    return NonFiniteError(
        f"{many if skipped_in_a_row + 1 >= MOST_SKIPPED else ''}{where}{found}: stopped before the update; try a lower "
        "--lr, a smaller --margin, or --dtype fp32",
        culprit,
    )


def _first_fault(faults: list[bool]) -> int | None:
    """The first rank that has the first of these faults that any has, None if none has any; the same on every rank."""
    worst = faults.index(True) if any(faults) else len(faults)
    found = lowest(worst * world_size() + rank())
    return found % world_size() if found < len(faults) * world_size() else None


def diagnose(where: dict[str, Any], images: Tensor, parts: dict[str, float], modules: nn.ModuleDict) -> dict[str, Any]:
    """`where` it happened, what went in, the loss by its parts, and which tensors are not finite, as JSON.

    (seed, epoch, step) determine the batch, so it need not be kept: a diagnosis holds no image and no name.
    """
    parameters = dict(modules.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None and p.grad.numel()}
    return {
        **where,
        "images": {"finite": _is_finite(images), "min": str(images.min().item()), "max": str(images.max().item())},
        "loss": {name: str(value) for name, value in parts.items()},  # JSON has no NaN
        "parameters_not_finite": [name for name, tensor in parameters.items() if not _is_finite(tensor)],
        "gradients_not_finite": [name for name, tensor in gradients.items() if not _is_finite(tensor)],
        "largest_gradient": {name: str(tensor.abs().max().item()) for name, tensor in gradients.items()},
    }


def keep_diagnosis(path: Path, error: NonFiniteError, diagnosis: dict[str, Any]) -> NonFiniteError:
    """Rank 0 writes what the rank that met the value found; returns the error with the step and the file's name."""
    found = broadcast(diagnosis, error.culprit)
    if rank() == 0:
        replace_file(path, json.dumps(found, indent=1).encode())
    return NonFiniteError(f"step {found['step']:,}: {error}; {path} says more", error.culprit)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
