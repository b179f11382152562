"""The device and the precision that "auto" stands for on this machine."""

import ctypes
import functools
import math
import sys
import time
from typing import Literal

import torch

import vitface.kernels.onednn as onednn
from vitface.config import Dtype
from vitface.errors import ConfigError

MEASURED_SECONDS = 0.1
MUCH_FASTER = 1.25  # a smaller lead is noise, or lost in the rest of the work, which is no product
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def known_device(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is CUDA if there is one, else the CPU. ConfigError for any but a CPU or a CUDA GPU:
    vitface was never run on others."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(f"--device {name} is none of cpu, cuda, cuda:1, ... and auto") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"--device {name}: vitface runs on cpu and cuda, and was never tried on {device.type}; use cpu"
        )
    return device


def resolve_device(name: str | torch.device) -> torch.device:
    """`known_device`, which was tried; ConfigError if it cannot be used here.

    On the CPU, freed memory stays with the process from now on.
    """
    device = known_device(name)
    try:
        (torch.zeros(1, device=device) + 1).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        gpus = f"torch finds {torch.cuda.device_count()} GPUs"
        raise ConfigError(f"--device {name} cannot be used here, {gpus}: {str(error).splitlines()[0]}") from None
    if device.type == "cpu":
        _keep_freed_memory()
    elif device.index is not None:  # plain "cuda" is the current one
        torch.cuda.set_device(device)  # for what asks for the current one, as kernels in Triton do
    return device


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device. A GPU is not waited for: its copy is from pinned memory, which torch keeps
    and uses again."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def resolve_dtype(name: Literal["auto"] | Dtype, device: torch.device, width: int) -> Dtype:
    """The dtype of a name, for a model with tokens of `width` values.

    "auto" is the fastest one. Those of a CPU are measured: "bf16" if its products are MUCH_FASTER than those in "fp32",
    else "fp32". A GPU's are known: "bf16" where it runs at full speed, "fp16" on Volta and Turing, else "fp32".
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    return "bf16" if device.type == "cpu" and lead_of_fp32("bf16", width) * MUCH_FASTER < 1 else "fp32"


def inference_dtype(trained: Dtype, device: torch.device, width: int) -> Dtype:
    """The dtype to use a model in that was trained in another: "fp32" on a CPU where that is MUCH_FASTER, else the
    same. Embeddings stay comparable, since fp32 is the more exact."""
    if trained == "fp32" or device.type != "cpu":
        return trained
    return "fp32" if lead_of_fp32(trained, width) > MUCH_FASTER else trained


def evaluation_dtype(trained: Dtype, device: torch.device) -> Dtype:
    """The dtype to evaluate a model in: that of training, "fp32" on a CPU that has no products in that dtype.

    Unlike `inference_dtype` it measures nothing, so a model has the same figures in every process.
    """
    served = device.type != "cpu" or onednn.serves(torch.ones(1, 1, dtype=DTYPES[trained]))
    return trained if served else "fp32"


def dtype_note(dtype: Dtype, device: torch.device, width: int) -> str:
    """Describes a dtype with what was measured: "fp32, 1.6x the speed of bf16 on this processor"."""
    other: Dtype = "bf16" if dtype == "fp32" else "fp32"
    lead = lead_of_fp32(other if dtype == "fp32" else dtype, width) if device.type == "cpu" else math.inf
    if math.isinf(lead):
        return dtype
    return f"{dtype}, {lead if dtype == 'fp32' else 1 / lead:.1f}x the speed of {other} on this processor"


@functools.cache
def lead_of_fp32(dtype: Dtype, width: int) -> float:
    """How many times as fast as in `dtype` this CPU multiplies in fp32; infinite if oneDNN has no product for `dtype`.

    The product is that of an MLP, (64, width) times (width, 4 width), or the part of it that takes less than a
    millisecond. It is measured once in a process, in about 0.1 s. Other programs may use the processor too, so the
    dtypes take turns, of each the fastest of many products counts, and one thread computes: several would wait for the
    one that another program stopped, in every product.
    """
    operands = {}
    for name in ("fp32", dtype):
        x = torch.ones(64, width, dtype=DTYPES[name])
        if not onednn.serves(x):
            return math.inf
        operands[name] = x, onednn.pack(torch.ones(min(4 * width, 1024), width, dtype=x.dtype))
    seconds: dict[str, float] = dict.fromkeys(operands, math.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    end = time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < end or math.inf in seconds.values():
        for name, (x, weight) in operands.items():
            start = time.perf_counter()
            onednn.product(x, weight, None)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return seconds[dtype] / seconds["fp32"]


def _keep_freed_memory() -> None:
    """On Linux, makes glibc keep freed memory for the next allocation, as torch does on a GPU.

    By default it returns large blocks to the kernel, and every step pays for the page faults of its activations.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # only glibc has it
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        mallopt(m_mmap_threshold, 32 << 20)  # the largest it takes
        mallopt(m_trim_threshold, (1 << 31) - 1)
