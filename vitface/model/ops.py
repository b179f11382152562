"""The operations of a block as formulas: the specification of every faster implementation.

`lora_linear` is the one equation of the project:

    y = x Wᵀ + b + scaling · [(x Aᵀ) ⊙ gate] Bᵀ

LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3) is K = 1 without a gate. DA-LoRA stacks K pairs along the rank and scales
the R activations of each pair by the image's weight for that domain: W' = W + scaling · sum_k w_k B_k A_k.

`vitface.kernels.fused` has the same five names with the same contracts. `use_ops` chooses one of the two modules for
all layers of a model; a request that an implementation cannot run raises.

Letters: B images, N tokens, D width, I in, O out, K domains, R rank, nh heads, hd head dim.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Ops(NamedTuple):
    """One implementation of the operations, as the layers hold it."""

    linear: Callable[..., Tensor]
    lora_linear: Callable[..., Tensor]
    mlp: Callable[..., Tensor]
    activate: Callable[..., Tensor]
    attention: Callable[..., Tensor]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b: x (..., I), weight (O, I), bias (O,) -> (..., O)."""
    return F.linear(x, weight, bias)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gate: Tensor | None = None,
) -> Tensor:
    """A linear layer with low-rank adapters: (B, ..., I) -> (B, ..., O), in the dtype of x.

    weight (O, I), bias (O,) or None, lora_a (K·R, I), lora_b (O, K·R); gate (B, K), or None: every pair has weight one.
    ValueError if the gate has another shape.
    """
    xa = F.linear(x, lora_a.to(x.dtype))  # (B, ..., K·R)
    if gate is not None:
        if gate.dim() != 2 or len(gate) != len(x) or len(lora_a) % gate.shape[1]:
            raise ValueError(f"gate {tuple(gate.shape)} must be (B, K) with B = {len(x)} and K dividing {len(lora_a)}")
        per_column = gate.to(x.dtype).repeat_interleave(len(lora_a) // gate.shape[1], dim=1)
        xa = xa * per_column.view(len(x), *[1] * (x.dim() - 2), -1)
    return F.linear(x, weight, bias) + F.linear(xa * scaling, lora_b.to(x.dtype))


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, act: str) -> Tensor:
    """act(x W1ᵀ + b1) W2ᵀ + b2: (..., D) -> (..., D), for the MLP without adapters; `act` as in `activate`."""
    return F.linear(activate(F.linear(x, w1, b1), act), w2, b2)


def activate(u: Tensor, act: str) -> Tensor:
    """The activation `act` of an MLP: "gelu", the exact one; "gelu_tanh", its approximation by a tanh (SigLIP);
    "quick_gelu", u · sigmoid(1.702 u) (OpenAI's CLIP); "relu6", u within [0, 6] (face recognisers); or "swiglu",
    silu(a) · b of the halves a and b of u (Shazeer 2020, arXiv:2002.05202): (..., 2 H) -> (..., H)."""
    if act == "swiglu":
        a, b = u.chunk(2, dim=-1)
        return F.silu(a) * b
    if act == "quick_gelu":
        return u * torch.sigmoid(1.702 * u)
    return F.relu6(u) if act == "relu6" else F.gelu(u, approximate="tanh" if act == "gelu_tanh" else "none")


def attention(qkv: Tensor, num_heads: int, num_queries: int | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(hd)) v of the first `num_queries` tokens, None: of all (Vaswani et al. 2017, eq. 1).

    (B, N, 3 D) -> (B, num_queries or N, D).
    """
    q, k, v = split_heads(qkv, num_heads)
    return rearrange(F.scaled_dot_product_attention(q[:, :, :num_queries], k, v), "b nh n hd -> b n (nh hd)")


def attention_map(qkv: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / sqrt(hd)) itself: (B, N, 3 D) -> (B, nh, N, N) float32; each row sums to one."""
    q, k, _ = split_heads(qkv, num_heads)
    return torch.softmax((q.float() @ k.float().mT) * q.shape[-1] ** -0.5, dim=-1)


def rotate(qkv: Tensor, rotation: Tensor) -> Tensor:
    """Turns q and k by their places: (B, N, 3 D) -> (B, N, 3 D); `rotation` (2, N, hd), the cosines and sines.

    Number i of a head and number i + hd / 2 are the two coordinates that are turned; in float32 at least.
    """
    cos, sin = rotation[:, :, None]  # (N, 1, hd) each
    heads = qkv.unflatten(2, (-1, rotation.shape[-1]))  # (B, N, 3 nh, hd)
    turned, v = heads.split([heads.shape[2] // 3 * 2, heads.shape[2] // 3], dim=2)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(qkv.dtype), v], dim=2).flatten(2)


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, N, 3 D) -> q, k, v stacked, (3, B, nh, N, hd)."""
    return rearrange(qkv, "b n (three nh hd) -> three b nh n hd", three=3, nh=num_heads)


REFERENCE = Ops(linear, lora_linear, mlp, activate, attention)


def use_ops(model: nn.Module, module: ModuleType) -> None:
    """Every layer of `model` runs the operations of `module` from now on: this module, or `vitface.kernels.fused`."""
    ops = Ops(*(getattr(module, name) for name in Ops._fields))
    for layer in model.modules():
        if hasattr(layer, "ops"):
            layer.ops = ops  # type: ignore[assignment]
