"""The operations every block is made of, each with its contract and its one point of dispatch.

`lora_linear` is the one equation of the project (docs/architecture.md):

    y = x Wᵀ + b + scaling · [(x Aᵀ) ⊙ gate] Bᵀ

LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3) is K = 1 without a gate. DA-LoRA stacks K pairs along the rank and scales
each pair's R activations by the image's domain weight, which is W' = W + scaling · sum_k w_k B_k A_k for that image.

"reference" is each formula as it stands, "fused" the kernels (vitface.kernels): the same functions with fewer passes
over memory, for frozen weights; "auto" is one of them by the device (`vitface.device.resolve_impl`). A request never
falls back in silence. The kernels are imported here alone, and not before they are asked for.

Letters: B images, N tokens, Q of them asked for, D width, I in, O out, K domains, R rank; nh heads, hd head dim.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vitface.device import resolve_impl

IMPLS = ("auto", "reference", "fused")
EXPLICIT_TOKENS = 512  # above, the (N, N) map costs more memory than it saves time


def check_impl(impl: str) -> None:
    """ValueError unless this version has it."""
    if impl not in IMPLS:
        raise ValueError(f"impl {impl!r} is not available; this version has {', '.join(IMPLS)}")


def runs_fused(impl: str, x: Tensor) -> bool:
    return resolve_impl(impl, x.device) == "fused"


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    impl: str = "reference",
) -> Tensor:
    """A linear layer with low-rank adapters: (B, ..., I) -> (B, ..., O), in x's dtype.

    weight (O, I), bias (O,) or None, lora_a (K·R, I), lora_b (O, K·R); gate (B, K), or None for weight one on each
    pair. residual (B, ..., O) is added to the result.
    "fused" makes no pass over x or y for the adapter. ValueError if the shapes disagree or `impl` cannot run.
    """
    check_impl(impl)
    if gate is not None and (gate.dim() != 2 or len(gate) != len(x) or lora_a.shape[0] % gate.shape[1]):
        raise ValueError(f"gate {tuple(gate.shape)} must be (B, K) with B = {len(x)} and K dividing {lora_a.shape[0]}")
    if runs_fused(impl, x):
        from vitface.kernels import lora_linear as kernels

        return kernels.lora_linear(x, weight, bias, lora_a, lora_b, scaling, gate, residual)
    return _add(_lora_linear_reference(x, weight, bias, lora_a, lora_b, scaling, gate), residual)


def _lora_linear_reference(x, weight, bias, lora_a, lora_b, scaling, gate):
    low = F.linear(x, lora_a.to(x.dtype))  # (B, ..., K·R)
    if gate is not None:
        per_column = gate.to(x.dtype).repeat_interleave(lora_a.shape[0] // gate.shape[1], dim=1)
        low = low * per_column.view(len(x), *[1] * (x.dim() - 2), -1)
    return F.linear(x, weight, bias) + F.linear(low * scaling, lora_b.to(x.dtype))


def _add(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else residual + y


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, residual: Tensor | None = None, impl: str = "reference"
) -> Tensor:
    """x Wᵀ + b + residual without an adapter: (..., I) -> (..., O). "fused" where no gradient is asked for."""
    if runs_fused(impl, x) and not torch.is_grad_enabled():
        from vitface.kernels import frozen

        return frozen.linear(x, weight, bias, residual)
    return _add(F.linear(x, weight, bias), residual)


def pack_weight(weight: Tensor) -> Tensor:
    """A weight (O, I) as "fused" `linear`, `lora_linear` and `frozen_mlp` read it fastest; itself off the CPU."""
    from vitface.kernels import frozen

    return frozen.pack(weight)


def frozen_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, act: str, residual: Tensor | None = None
) -> Tensor:
    """act(x W1ᵀ + b1) W2ᵀ + b2 + residual without adapters, "fused": (B, N, D) -> (B, N, D).

    `act` as in `activate`. ValueError if a weight asks for a gradient.
    """
    from vitface.kernels import frozen

    return frozen.mlp(x, w1, b1, w2, b2, act, residual)


def activate(u: Tensor, act: str) -> Tensor:
    """ "gelu" (the exact one), or "quick_gelu", x · sigmoid(1.702 x), as in OpenAI's CLIP."""
    return F.gelu(u) if act == "gelu" else u * torch.sigmoid(1.702 * u)


def self_attention(qkv: Tensor, num_heads: int, queries: int | None = None, *, impl: str = "reference") -> Tensor:
    """Multi-head attention of the first `queries` tokens (None: all) to all: (B, N, 3 D) -> (B, Q, D).

    On the CPU at a ViT's few hundred tokens "fused" is our kernel; for longer sequences, and on devices that have a
    good one, it is SDPA.
    """
    if runs_fused(impl, qkv) and explicit(qkv.device.type, qkv.shape[1]):
        from vitface.kernels import attention as kernels

        return kernels.attention(qkv, num_heads, queries)
    q, k, v = split_heads(qkv, num_heads)
    return rearrange(attention(q[:, :, :queries], k, v), "b nh n hd -> b n (nh hd)")


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, N, 3 D) -> q, k, v stacked, (3, B, nh, N, hd)."""
    return rearrange(qkv, "b n (three nh hd) -> three b nh n hd", three=3, nh=num_heads)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(hd)) v over (B, nh, N, hd) (Vaswani et al. 2017, eq. 1).

    On the CPU at a ViT's few hundred tokens the two matrix products as they stand beat SDPA, most of all in the
    backward pass (kernels/README.md: peers with "non-fused attention").
    """
    if explicit(q.device.type, k.shape[-2]):
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def explicit(device: str, tokens: int) -> bool:
    """Whether the (N, N) map is written out."""
    return device == "cpu" and tokens <= EXPLICIT_TOKENS


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(hd)) itself, (B, nh, N, N) in float32; rows sum to one."""
    return torch.softmax((q.float() @ k.float().mT) * q.shape[-1] ** -0.5, dim=-1)
