"""The adapted linear layer for GPUs: two products forward and two backward, for `torch.compile` to fuse around.

    y = [x, xa ⊙ g] [W, sB]ᵀ + b, where y is wider than x        [dx, dgated] = dy [W, sB], then dx += dxa A

s is the scaling, the other letters are those of `lora_linear.py`, which has the rest of the algebra. The operation
before writes x and xa ⊙ g side by side, so a compiled layer copies neither; and no operator of ours stands in its way.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.kernels.lora_linear import check, gate_gradient, gated


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gate: Tensor | None = None,
) -> Tensor:
    """The contract of `vitface.model.ops.lora_linear`; ValueError if `weight` or `bias` asks for a gradient."""
    check(x, weight, bias, lora_a, gate)
    rows = x.reshape(-1, x.shape[-1])
    return _LoraLinear.apply(rows, weight, bias, lora_a, lora_b, scaling, gate).view(*x.shape[:-1], -1)  # type: ignore[union-attr]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        gate: Tensor | None,
    ) -> Tensor:
        b = (lora_b * scaling).to(x.dtype)
        xa = F.linear(x, lora_a.to(x.dtype))
        weighted = xa if gate is None else gated(xa, gate, 1.0)
        ctx.save_for_backward(x, weight, lora_a, lora_b, gate, xa)
        ctx.scaling = scaling
        if len(weight) > x.shape[1]:
            return F.linear(torch.cat([x, weighted], 1), torch.cat([weight, b], 1), bias)
        return F.linear(x, weight, bias) + F.linear(weighted, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, lora_a, lora_b, gate, xa = ctx.saved_tensors
        b, dx, dgate = (lora_b * ctx.scaling).to(x.dtype), None, None
        if ctx.needs_input_grad[0]:
            dx, dgated = (dy @ torch.cat([weight, b], 1)).split([x.shape[1], b.shape[1]], 1)
        else:
            dgated = dy @ b
        dxa, weighted = dgated, xa
        if gate is not None:
            dxa, weighted = gated(dgated, gate, 1.0), gated(xa, gate, 1.0)
            dgate = gate_gradient(dgated, xa, gate, 1.0)
        if dx is not None:
            dx = dx + dxa @ lora_a.to(x.dtype)
        da, db = (dxa.t() @ x).to(lora_a.dtype), (dy.t() @ weighted).to(lora_b.dtype) * ctx.scaling
        return dx, None, None, da, db, None, dgate
