"""The MLP's activation in Triton: one pass forward, one backward. frozen.py has the formulas and calls this on CUDA.

    gelu        h = u Φ(u)               act'(u) = Φ(u) + u φ(u)
    quick_gelu  h = u s(u)               act'(u) = s(u) (1 + 1.702 u (1 - s(u)))      s(u) = sigmoid(1.702 u)

Φ and φ are the normal distribution and its density. Computed in float32, whatever the tensors hold.
"""

# Triton takes plain numbers for `tl.constexpr` at a launch; its annotations deny it
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program, 8 for each thread of 4 warps: a prediction until a GPU has measured it


@triton.jit
def _inner(u, QUICK: tl.constexpr):
    """Φ(u), or s(u): what u is multiplied by."""
    return 1 / (1 + tl.exp(-1.702 * u)) if QUICK else 0.5 * (1 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _forward_kernel(u_ptr, h_ptr, size, QUICK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(h_ptr + at, u * _inner(u, QUICK), mask=at < size)


@triton.jit
def _backward_kernel(u_ptr, dh_ptr, size, QUICK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    inner = _inner(u, QUICK)
    density = 0.3989422804014327 * tl.exp(-0.5 * u * u)
    slope = inner * (1 + 1.702 * u * (1 - inner)) if QUICK else inner + u * density
    tl.store(dh_ptr + at, dh * slope, mask=at < size)


def forward(u: Tensor, act: str) -> Tensor:
    """h of any shape; `act` is "gelu" or "quick_gelu"."""
    u = u.contiguous()
    h = torch.empty_like(u)
    with torch.cuda.device_of(u):
        _forward_kernel[(triton.cdiv(u.numel(), BLOCK),)](u, h, u.numel(), QUICK=act == "quick_gelu", BLOCK=BLOCK)
    return h


def backward(dh: Tensor, u: Tensor, act: str) -> Tensor:
    """du = dh ⊙ act'(u), where dh stands if it is contiguous."""
    du, u = dh.contiguous(), u.contiguous()
    with torch.cuda.device_of(u):
        _backward_kernel[(triton.cdiv(u.numel(), BLOCK),)](u, du, u.numel(), QUICK=act == "quick_gelu", BLOCK=BLOCK)
    return du
