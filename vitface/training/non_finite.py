"""NaN and infinity: a run skips a step whose fp16 gradients overflowed; after any other one it diagnoses and stops."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitface.errors import VitfaceError
from vitface.files import json_bytes, replace_file
from vitface.training.ranks.process_group import agree, all_gather, broadcast, rank, world_size

MOST_SKIPPED = 20  # steps in a row


class NonFiniteError(VitfaceError):
    """The loss or a gradient became NaN or infinite, first on rank `culprit`; the step was not taken."""

    def __init__(self, message: str, culprit: int = 0):
        super().__init__(message)
        self.culprit = culprit


def may_skip(loss: float, skipped_in_a_row: int) -> bool:
    """True if a bad step can be skipped: a lower loss scale helps where gradients overflowed, but not the loss itself.

    All ranks must call it.
    """
    return not agree(not math.isfinite(loss), [])[0] and skipped_in_a_row + 1 < MOST_SKIPPED


def non_finite_error(
    loss: float, norm: float, parameters: Iterable[nn.Parameter], skipped_in_a_row: int = 0
) -> NonFiniteError:
    """Returns the error after a bad step, the same one on every rank; all ranks must call it."""
    own = not all(p.grad.isfinite().all() for p in parameters if p.grad is not None)
    culprit = first_fault([not math.isfinite(loss), own, not math.isfinite(norm)])
    found = broadcast(f"loss {loss}, gradient norm {norm}", culprit)
    where = f"rank {culprit}: " if world_size() > 1 else ""
    many = f"the last {MOST_SKIPPED} steps were skipped, each with a lower loss scale than the one before; "
    return NonFiniteError(
        f"{many if skipped_in_a_row + 1 >= MOST_SKIPPED else ''}{where}{found}: stopped before the update; try a lower "
        "--lr, a smaller --margin, or --dtype fp32",
        culprit,
    )


def first_fault(faults: list[bool]) -> int:
    """Of the faults that any rank has, the first decides: returns the first rank that has it, 0 if no rank has any."""
    everyone = all_gather([*faults, True].index(True))
    return everyone.index(min(everyone))


def diagnose(where: dict[str, Any], images: Tensor, parts: dict[str, float], modules: nn.ModuleDict) -> dict[str, Any]:
    """Returns `where` it happened, the images' range, the losses and the tensors that are not finite, ready for JSON.

    The batch follows from (seed, epoch, step), so a diagnosis holds no image and no name.
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
    """Writes, on rank 0, the diagnosis of the rank with the fault; returns the error with the step and the file's name.

    All ranks must call it.
    """
    found = broadcast(diagnosis, error.culprit)
    if rank() == 0:
        replace_file(path, json_bytes(found))
    return NonFiniteError(f"step {found['step']:,}: {error}; {path} has the details", error.culprit)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
