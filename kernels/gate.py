"""The gate of DA-LoRA in Triton, forward and backward. lora_linear.py has the formulas and calls this on CUDA.

    gated = low ⊙ g      dlow = dgated ⊙ g      dgate = sum over tokens and ranks of dgated ⊙ low · scaling

with g = gate · scaling, a value for each image and domain. In float32, and in one order of summation: a program has an
image and a domain to itself, so nothing is added atomically and two runs agree to the bit.

Letters: B images, M rows (images x tokens), K domains, R rank.
"""

# Triton takes plain numbers for `tl.constexpr` at a launch; its annotations deny it
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a forward program; like BLOCK_T a prediction until a GPU has measured it
BLOCK_T = 64  # tokens at a time of a backward program, which walks through those of its image


@triton.jit
def _forward_kernel(
    low_ptr, gate_ptr, gated_ptr, size, tokens, scaling, K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    domain = at % (K * R) // R
    image = at // (K * R) // tokens
    gate = tl.load(gate_ptr + image * K + domain, mask=inside, other=0.0).to(tl.float32)
    low = tl.load(low_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(gated_ptr + at, low * (gate * scaling), mask=inside)


@triton.jit
def _backward_kernel(
    dgated_ptr, low_ptr, gate_ptr, dlow_ptr, gated_ptr, dgate_ptr, tokens, scaling,
    K: tl.constexpr, R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)  # image · K + domain
    g = tl.load(gate_ptr + pair).to(tl.float32) * scaling
    rank = tl.arange(0, BLOCK_R)
    start = (pair // K).to(tl.int64) * tokens * (K * R) + pair % K * R
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for first in range(0, tokens, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        inside = (token < tokens)[:, None] & (rank < R)[None, :]
        at = start + token[:, None] * (K * R) + rank[None, :]
        dgated = tl.load(dgated_ptr + at, mask=inside, other=0.0).to(tl.float32)
        low = tl.load(low_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dlow_ptr + at, dgated * g, mask=inside)
        tl.store(gated_ptr + at, low * g, mask=inside)
        total += dgated * low
    tl.store(dgate_ptr + pair, tl.sum(tl.sum(total, 1), 0) * scaling)


def forward(low: Tensor, gate: Tensor, scaling: float) -> Tensor:
    """low (M, K·R), gate (B, K) -> gated (M, K·R)."""
    low, gate = low.contiguous(), gate.contiguous()
    gated = torch.empty_like(low)
    tokens, domains = len(low) // len(gate), gate.shape[1]
    with torch.cuda.device_of(low):
        _forward_kernel[(triton.cdiv(low.numel(), BLOCK),)](
            low, gate, gated, low.numel(), tokens, scaling, K=domains, R=low.shape[1] // domains, BLOCK=BLOCK
        )
    return gated


def backward(dgated: Tensor, low: Tensor, gate: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """dgated, low (M, K·R), gate (B, K) -> dlow, gated (M, K·R), dgate (B, K)."""
    dgated, low, gate = dgated.contiguous(), low.contiguous(), gate.contiguous()
    dlow, gated, dgate = torch.empty_like(low), torch.empty_like(low), torch.empty_like(gate)
    domains = gate.shape[1]
    rank = low.shape[1] // domains
    with torch.cuda.device_of(low):
        _backward_kernel[(gate.numel(),)](
            dgated, low, gate, dlow, gated, dgate, len(low) // len(gate), scaling,
            K=domains, R=rank, BLOCK_T=BLOCK_T, BLOCK_R=triton.next_power_of_2(rank),
        )  # fmt: skip
    return dlow, gated, dgate
