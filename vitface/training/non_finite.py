"""NaN and infinity: a run skips a step whose fp16 gradients overflowed; after any other one it diagnoses and stops."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vitface.errors import VitfaceError
from vitface.files import json_bytes, replace_file
from vitface.training.ranks.process_group import agree, all_gather, rank

if TYPE_CHECKING:
    from vitface.training.loop import Trainer

MOST_SKIPPED = 20  # steps in a row
FAULTS = ("loss", "gradient", "gradient norm", "none")  # the first one is nearest to the cause


class NonFiniteError(VitfaceError):
    """The loss or a gradient became NaN or infinite; the step was not taken."""


def may_skip(loss: float, skipped_in_a_row: int) -> bool:
    """True if a bad step can be skipped: a lower loss scale helps where gradients overflowed, but not the loss itself.

    All ranks must call it.
    """
    return not agree(not math.isfinite(loss), [])[0] and skipped_in_a_row + 1 < MOST_SKIPPED


def diagnose(
    where: dict[str, Any], images: Tensor, losses: dict[str, float], norm: float, modules: nn.ModuleDict
) -> dict[str, Any]:
    """This rank's diagnosis of a bad step, ready for JSON: `where` it was, the fault, and what is not finite.

    The batch follows from (seed, epoch, step), so a diagnosis holds no image and no name.
    """
    parameters = dict(modules.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None and p.grad.numel()}
    bad = [name for name, tensor in gradients.items() if not _is_finite(tensor)]
    faults = [not math.isfinite(losses["loss"]), bool(bad), not math.isfinite(norm), True]
    return {
        **where,
        "fault": FAULTS[faults.index(True)],
        "images": {"finite": _is_finite(images), "min": str(images.min().item()), "max": str(images.max().item())},
        "loss": {name: str(value) for name, value in losses.items()},  # JSON has no NaN
        "grad_norm": str(norm),
        "parameters_not_finite": [name for name, tensor in parameters.items() if not _is_finite(tensor)],
        "gradients_not_finite": bad,
        "largest_gradient": {name: str(tensor.abs().max().item()) for name, tensor in gradients.items()},
    }


def error_after(trainer: "Trainer", images: Tensor, losses: dict[str, float], norm: float) -> NonFiniteError:
    """The error after a step that was not taken, with a diagnosis in the run's folder. All ranks must call it."""
    progress, rate = trainer.state.progress, float(trainer.optimizer.param_groups[0]["lr"])
    where = {"step": progress.step + 1, "epoch": progress.epoch + 1, "seed": trainer.config.seed, "lr": rate}
    where["skipped_before"] = progress.skipped_in_a_row
    modules = nn.ModuleDict({"model": trainer.model, "margin": trainer.margin})
    path = trainer.run_dir and trainer.run_dir / "non_finite.json"
    return non_finite_error(diagnose(where, images, losses, norm, modules), path)


def non_finite_error(diagnosis: dict[str, Any], path: Path | None) -> NonFiniteError:
    """Returns the error after a bad step, the same one on every rank, of the rank with the first of the FAULTS.

    Rank 0 writes that rank's diagnosis to `path`. All ranks must call it.
    """
    everyone = all_gather(diagnosis)
    culprit = min(range(len(everyone)), key=lambda number: FAULTS.index(everyone[number]["fault"]))
    found = everyone[culprit]
    many = f"the last {MOST_SKIPPED} steps were skipped, each with a lower loss scale than the one before; "
    reason = (
        f"{many if found['skipped_before'] + 1 >= MOST_SKIPPED else ''}{f'rank {culprit}: ' if everyone[1:] else ''}"
        f"loss {found['loss']['loss']}, gradient norm {found['grad_norm']}: stopped before the update; try a lower "
        "--lr, a smaller --margin, or --dtype fp32"
    )
    if path is not None and rank() == 0:
        replace_file(path, json_bytes({**found, "reason": reason}))
    return NonFiniteError(f"step {found['step']:,}: {reason}" + (f"; {path} has the details" if path else ""))


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
