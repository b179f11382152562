"""What a run that met NaN or infinity leaves behind, to find out where it came from."""

from typing import Any

from torch import Tensor, nn


def diagnose(where: dict[str, Any], images: Tensor, parts: dict[str, Tensor], modules: nn.ModuleDict) -> dict[str, Any]:
    """`where` it happened, what went in, the loss by its parts, and which tensors are not finite, as JSON.

    (seed, epoch, step) determine the batch, so that it need not be kept: a diagnosis holds no image and no name.
    """
    parameters = dict(modules.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None and p.grad.numel()}
    return {
        **where,
        "images": {"finite": _is_finite(images), "min": str(images.min().item()), "max": str(images.max().item())},
        "loss": {name: str(value.item()) for name, value in parts.items()},  # JSON has no NaN
        "parameters_not_finite": [name for name, tensor in parameters.items() if not _is_finite(tensor)],
        "gradients_not_finite": [name for name, tensor in gradients.items() if not _is_finite(tensor)],
        "largest_gradient": {name: str(tensor.abs().max().item()) for name, tensor in gradients.items()},
    }


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
