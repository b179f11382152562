"""The device and the precision that "auto" stands for on this machine."""

import ctypes
import sys
from typing import Literal

import torch

from vitface.config import Dtype
from vitface.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA if there is one, else the CPU. ConfigError if it cannot be used here.

    On the CPU, freed memory stays with the process from now on.
    """
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        (torch.zeros(1, device=name) + 1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    device = torch.device(name)
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def resolve_dtype(name: Literal["auto"] | Dtype, device: torch.device) -> Dtype:
    """The dtype of a name; "auto" is the fastest one: "bf16" where its products run at full speed, "fp16" on Volta and
    Turing, else "fp32"."""
    if name != "auto":
        return name
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def _keep_freed_memory() -> None:
    """On Linux, makes glibc keep freed memory for the next allocation, as torch does on a GPU.

    By default it returns large blocks to the kernel, and every step pays for the page faults of its activations.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # only glibc has it
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 32 << 20)  # the largest it takes
        mallopt(m_trim_threshold, (1 << 31) - 1)
