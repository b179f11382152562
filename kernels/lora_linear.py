"""The adapted linear layer as one operator, forward and backward: `impl="fused"` of `vitface.model.ops.lora_linear`.

Forward, with g the gate of an image repeated R times along the columns, times the scaling (README.md has the algebra):

    low = x Aᵀ        y = x Wᵀ + b + residual, then y += (low ⊙ g) Bᵀ inside the second product

Backward, from dy:

    dgated = dy B     dlow = dgated ⊙ g     dgate = sum over tokens and ranks of dgated ⊙ low · scaling
    dA = dlowᵀ x      dB = dyᵀ (low ⊙ g)    dx = dy W, then dx += dlow A inside the second product

The K domains are K·R columns of the same products: no pass over anything as wide as x or y is made for an adapter, K
times or once, and beside the inputs only `low` is kept. W and b are frozen and get no gradient.

Letters: B images, M rows (images x tokens), I in, O out, K domains, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.kernels.frozen import product


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gate: Tensor | None,
    residual: Tensor | None = None,
) -> Tensor:
    """The contract of `vitface.model.ops.lora_linear`; ValueError if `weight` or `bias` asks for a gradient."""
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("impl 'fused' is for frozen weights; use impl 'reference' to train weight or bias")
    rows = x.reshape(-1, x.shape[-1])
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    residual = None if residual is None else residual.reshape(-1, len(weight))
    out, _ = (_lora_linear if traced else _forward)(rows, weight, bias, lora_a, lora_b, scaling, gate, residual)
    return out.view(*x.shape[:-1], -1)


@torch.library.custom_op("vitface::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    gate: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x (M, I), residual (M, O) -> y (M, O), low (M, K·R)."""
    return _forward(x, weight, bias, lora_a, lora_b, scaling, gate, residual)


def _forward(x, weight, bias, lora_a, lora_b, scaling, gate, residual):
    low = F.linear(x, lora_a.to(x.dtype))
    return product(x, weight, bias, residual).addmm_(_gated(low, gate, scaling), lora_b.to(x.dtype).t()), low


@_lora_linear.register_fake
def _(x, weight, bias, lora_a, lora_b, scaling, gate, residual):
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
    low: Tensor,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy (M, O) -> dx (M, I), dA, dB and dgate in the dtypes of x, A, B and gate; empty where not needed."""
    dgated = dy @ lora_b.to(dy.dtype)
    dlow, gated = _gated(dgated, gate, scaling), _gated(low, gate, scaling)
    dgate = dy.new_empty(0) if gate is None else _dgate(dgated, low, gate, scaling)
    dx = (dy @ weight).addmm_(dlow, lora_a.to(dy.dtype)) if needs_dx else dy.new_empty(0)
    return dx, (dlow.t() @ x).to(lora_a.dtype), (dy.t() @ gated).to(lora_b.dtype), dgate


@_backward.register_fake
def _(dy, x, weight, lora_a, lora_b, scaling, gate, low, needs_dx):
    dx = torch.empty_like(x) if needs_dx else dy.new_empty(0)
    return (
        dx,
        torch.empty_like(lora_a),
        torch.empty_like(lora_b),
        torch.empty_like(dy.new_empty(0) if gate is None else gate),
    )


def _gated(low: Tensor, gate: Tensor | None, scaling: float) -> Tensor:
    """low (M, K·R) times the scaling and the gate (B, K) of each row's image."""
    if gate is None:
        return low * scaling
    images, domains = gate.shape
    per_column = (gate * scaling).to(low.dtype).repeat_interleave(low.shape[1] // domains, dim=1)
    return (low.view(images, -1, low.shape[1]) * per_column[:, None]).view_as(low)


def _dgate(dgated: Tensor, low: Tensor, gate: Tensor, scaling: float) -> Tensor:
    images, domains = gate.shape
    per_column = (dgated * low).view(images, -1, low.shape[1]).sum(1, dtype=gate.dtype)
    return per_column.view(images, domains, -1).sum(2) * scaling


def _setup_context(ctx, inputs, output):
    x, weight, _, lora_a, lora_b, ctx.scaling, gate, _ = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, gate, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dlow):
    if dy is None:
        return (None,) * 8
    x, weight, lora_a, lora_b, gate, low = ctx.saved_tensors
    dx, da, db, dgate = _backward(dy, x, weight, lora_a, lora_b, ctx.scaling, gate, low, ctx.needs_input_grad[0])
    dx, dgate = dx if ctx.needs_input_grad[0] else None, None if gate is None else dgate
    return dx, None, None, da, db, None, dgate, dy if ctx.needs_input_grad[7] else None


_lora_linear.register_autograd(_autograd, setup_context=_setup_context)
