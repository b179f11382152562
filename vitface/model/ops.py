"""The operations every block is made of, each with its contract and its one point of dispatch.

`lora_linear` is the one equation of the project (docs/architecture.md):

    y = x Wᵀ + b + scaling · [(x Aᵀ) ⊙ gate] Bᵀ

LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3) is K = 1 without a gate. DA-LoRA stacks K pairs along the rank and scales
each pair's R activations by the image's domain weight, which is W' = W + scaling · sum_k w_k B_k A_k for that image.

Letters: B images, N tokens, I in, O out, K domains, R rank; nh heads, hd head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLS = ("reference", "fused")
EXPLICIT_TOKENS = 512  # above, the (N, N) map costs more memory than it saves time


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    *,
    impl: str = "reference",
) -> Tensor:
    """A linear layer with low-rank adapters: (B, ..., I) -> (B, ..., O), in x's dtype.

    weight (O, I), bias (O,) or None, lora_a (K·R, I), lora_b (O, K·R); gate (B, K), or None for weight one on each
    pair. "reference" is the formula as it stands; "fused" (vitface.kernels) makes no pass over x or y for the adapter
    and needs frozen weights. ValueError if the shapes disagree or `impl` cannot run: a request never falls back in
    silence.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r} is not available; this version has {', '.join(IMPLS)}")
    if gate is not None and (gate.dim() != 2 or len(gate) != len(x) or lora_a.shape[0] % gate.shape[1]):
        raise ValueError(f"gate {tuple(gate.shape)} must be (B, K) with B = {len(x)} and K dividing {lora_a.shape[0]}")
    if impl == "fused":
        from vitface.kernels import lora_linear as kernels  # the one import of the kernels

        return kernels.lora_linear(x, weight, bias, lora_a, lora_b, scaling, gate)
    return _lora_linear_reference(x, weight, bias, lora_a, lora_b, scaling, gate)


def _lora_linear_reference(x, weight, bias, lora_a, lora_b, scaling, gate):
    low = F.linear(x, lora_a.to(x.dtype))  # (B, ..., K·R)
    if gate is not None:
        per_column = gate.to(x.dtype).repeat_interleave(lora_a.shape[0] // gate.shape[1], dim=1)
        low = low * per_column.view(len(x), *[1] * (x.dim() - 2), -1)
    return F.linear(x, weight, bias) + F.linear(low * scaling, lora_b.to(x.dtype))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(hd)) v over (B, nh, N, hd) (Vaswani et al. 2017, eq. 1).

    On the CPU at a ViT's few hundred tokens the two matrix products as they stand beat the fused kernel, most of all
    in the backward pass (docs/experiments.md); SDPA is for longer sequences, and for devices that have a good one.
    """
    if q.device.type == "cpu" and q.shape[-2] <= EXPLICIT_TOKENS:
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(hd)) itself, (B, nh, N, N) in float32; rows sum to one."""
    return torch.softmax((q.float() @ k.float().mT) * q.shape[-1] ** -0.5, dim=-1)
