"""What a run that met NaN or infinity leaves behind, to find out where it came from."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitface.files import replace_file


def write_diagnosis(
    path: Path, where: dict[str, Any], images: Tensor, parts: dict[str, Tensor], modules: nn.ModuleDict
):
    """A JSON file: `where` it happened, what went in, the loss by its parts, and which tensors are not finite.

    (seed, epoch, step) determine the batch, so that it need not be kept: a diagnosis holds no image and no name.
    """
    parameters = dict(modules.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    diagnosis = {
        **where,
        "images": {"finite": _is_finite(images), "min": str(images.min().item()), "max": str(images.max().item())},
        "loss": {name: str(value.item()) for name, value in parts.items()},  # JSON has no NaN
        "parameters_not_finite": [name for name, tensor in parameters.items() if not _is_finite(tensor)],
        "gradients_not_finite": [name for name, tensor in gradients.items() if not _is_finite(tensor)],
        "largest_gradient": {name: str(tensor.abs().max().item()) for name, tensor in gradients.items()},
    }
    replace_file(path, json.dumps(diagnosis, indent=1).encode())


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
