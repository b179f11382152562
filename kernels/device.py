"""Which tensors the Triton kernels are for: the one point that decides it."""

import torch
from torch import Tensor


def runs_triton(x: Tensor) -> bool:
    """On CUDA; but float64 keeps its precision, and the kernels compute in float32."""
    return x.is_cuda and x.dtype != torch.float64
