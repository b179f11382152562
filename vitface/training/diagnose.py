"""What a run that met NaN or infinity leaves behind, to find out where it came from."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitface.files import replace_file
from vitface.training.ranks.process_group import rank, share
from vitface.training.step import NonFiniteError


def diagnose(where: dict[str, Any], images: Tensor, parts: dict[str, float], modules: nn.ModuleDict) -> dict[str, Any]:
    """`where` it happened, what went in, the loss by its parts, and which tensors are not finite, as JSON.

    (seed, epoch, step) determine the batch, so that it need not be kept: a diagnosis holds no image and no name.
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
    """Rank 0 writes down what the rank that met the value found; the error, with the step and the file's name."""
    found = share(diagnosis, error.culprit)
    if rank() == 0:
        replace_file(path, json.dumps(found, indent=1).encode())
    return NonFiniteError(f"step {found['step']:,}: {error}; {path} says more", error.culprit)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
