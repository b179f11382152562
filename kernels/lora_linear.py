"""The adapted linear layer as one operator, forward and backward, for the CPU (README.md has the algebra).

Forward, where g repeats an image's gate R times along the columns, times the scaling:

    xa = x Aᵀ        y = x Wᵀ + b, then y += (xa ⊙ g) Bᵀ inside the second product

Backward, from dy:

    dgated = dy B    dxa = dgated ⊙ g     dgate = sum over tokens and ranks of dgated ⊙ xa · scaling
    dA = dxaᵀ x      dB = dyᵀ (xa ⊙ g)    dx = dy W, then dx += dxa A inside the second product

The K domains are K·R columns of the same products: an adapter makes no pass over anything as wide as x or y. Beside the
inputs only the bottleneck `xa` is kept. W and b are frozen and get no gradient.

Letters: B images, M rows (images x tokens), I in, O out, K domains, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.kernels.onednn import product


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
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    rows = x.reshape(-1, x.shape[-1])
    y, _ = (_lora_linear if traced else forward)(rows, weight, bias, lora_a, lora_b, scaling, gate)
    return y.view(*x.shape[:-1], -1)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, gate: Tensor | None) -> None:
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the fused layer is for frozen weights; use the reference operations to train weight or bias")
    if gate is not None and (gate.dim() != 2 or len(gate) != len(x) or len(lora_a) % gate.shape[1]):
        raise ValueError(f"gate {tuple(gate.shape)} must be (B, K) with B = {len(x)} and K dividing {len(lora_a)}")


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gate: Tensor | None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (M, I) -> y (M, O) plus `residual` (M, O), and xa (M, K·R); autograd sees nothing of it."""
    xa = F.linear(x, lora_a.to(x.dtype))
    return product(x, weight, bias, residual).addmm_(gated(xa, gate, scaling), lora_b.to(x.dtype).t()), xa


@torch.library.custom_op("vitface::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return forward(x, weight, bias, lora_a, lora_b, scaling, gate)


@_lora_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, scaling, gate):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(lora_a))


@torch.library.custom_op("vitface::lora_linear_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gate: Tensor | None,
    xa: Tensor,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy (M, O) -> dx (M, I), dA, dB and dgate in the dtypes of x, A, B and gate; empty where not needed."""
    dgated = dy @ lora_b.to(dy.dtype)
    dxa, weighted = gated(dgated, gate, scaling), gated(xa, gate, scaling)
    dgate = dy.new_empty(0) if gate is None else gate_gradient(dgated, xa, gate, scaling)
    dx = (dy @ weight).addmm_(dxa, lora_a.to(dy.dtype)) if needs_dx else dy.new_empty(0)
    return dx, (dxa.t() @ x).to(lora_a.dtype), (dy.t() @ weighted).to(lora_b.dtype), dgate


@_backward.register_fake
def _(dy, x, weight, lora_a, lora_b, scaling, gate, xa, needs_dx):
    nothing = dy.new_empty(0)
    dx, dgate = torch.empty_like(x if needs_dx else nothing), torch.empty_like(nothing if gate is None else gate)
    return dx, torch.empty_like(lora_a), torch.empty_like(lora_b), dgate


def gated(xa: Tensor, gate: Tensor | None, scaling: float) -> Tensor:
    """xa ⊙ g: xa (M, K·R) times the scaling and the gate (B, K) of each row's image."""
    if gate is None:
        return xa * scaling
    images, domains = gate.shape
    per_column = (gate * scaling).to(xa.dtype).repeat_interleave(xa.shape[1] // domains, dim=1)
    return (xa.view(images, -1, xa.shape[1]) * per_column[:, None]).view_as(xa)


def gate_gradient(dgated: Tensor, xa: Tensor, gate: Tensor, scaling: float) -> Tensor:
    """dgate (B, K), in the dtype of the gate."""
    images, domains = gate.shape
    per_column = (dgated * xa).view(images, -1, xa.shape[1]).sum(1, dtype=gate.dtype)
    return per_column.view(images, domains, -1).sum(2) * scaling


def _setup_context(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, ctx.scaling, gate = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, gate, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dxa):
    if dy is None:
        return (None,) * 7
    x, weight, lora_a, lora_b, gate, xa = ctx.saved_tensors
    dx, da, db, dgate = _backward(dy, x, weight, lora_a, lora_b, ctx.scaling, gate, xa, ctx.needs_input_grad[0])
    return dx if ctx.needs_input_grad[0] else None, None, None, da, db, None, None if gate is None else dgate


_lora_linear.register_autograd(_autograd, setup_context=_setup_context)
