"""What "auto" means on this machine."""

from typing import Literal

import torch

from vitface.config import Dtype
from vitface.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU; ConfigError if a named device cannot be used here."""
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        (torch.zeros(1, device=name) + 1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def resolve_dtype(name: Literal["auto"] | Dtype, device: torch.device) -> Dtype:
    """ "auto" is "bf16" where bf16 matrix products run at full speed, else "fp32"."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"
