"""What stands between two products of a block as one operator: residual, LayerScale, LayerNorm, LoRA's bottleneck.

    x' = x + γ y        x̂ = (x' - mean) rstd        h = x̂ w + b        low = h Aᵀ

y is what the branch before put out, A that of the adapted layer that follows: `lora_linear` takes `low` as it is, and h
is not read for it again. Backward, with w, b and γ frozen:

    dx̂ = (dh + dlow A) w        dx = dx' + rstd (dx̂ - mean(dx̂) - x̂ mean(dx̂ ⊙ x̂))        dy = γ dx        dA = dlowᵀ h

On CUDA it is two kernels (norm.py), elsewhere the formulas as they stand. Statistics are float32 at least. Kept for the
backward pass: x', two numbers a row, and h where there is an A.

Letters: M rows (images x tokens), D width, K domains, R rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.kernels.device import runs_triton


def residual_norm(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, norm: torch.nn.LayerNorm, lora_a: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The contract of `vitface.model.ops.residual_norm`."""
    if any(parameter is not None and parameter.requires_grad for parameter in (gamma, norm.weight, norm.bias)):
        raise ValueError("impl 'fused' is for frozen weights; use impl 'reference' to train norms and LayerScale")
    rows, branch = x.reshape(-1, x.shape[-1]), None if y is None else y.reshape(-1, x.shape[-1])
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
    total, h, low, _, _ = (_residual_norm if traced else _forward)(
        rows, branch, gamma, norm.weight, norm.bias, norm.eps, lora_a
    )
    lows = None if lora_a is None else low.view(*x.shape[:-1], -1)
    return x if y is None else total.view(x.shape), h.view(x.shape), lows


@torch.library.custom_op("vitface::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float, lora_a: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, y (M, D) -> x' (M, D), empty without y; h (M, D); low (M, K·R), empty without A; mean and rstd (M,)."""
    return _forward(x, y, gamma, weight, bias, eps, lora_a)


def _forward(x, y, gamma, weight, bias, eps, lora_a):
    if runs_triton(x):
        from vitface.kernels import norm

        return norm.forward(x, y, gamma, weight, bias, eps, lora_a)
    total = x if y is None else x + (y if gamma is None else y * gamma)
    wide = total.to(_statistics(x))
    variance, mean = torch.var_mean(wide, 1, correction=0)
    rstd = torch.rsqrt(variance + eps)
    h = ((wide - mean[:, None]) * rstd[:, None] * weight + bias).to(x.dtype)
    low = x.new_empty(0) if lora_a is None else F.linear(h, lora_a.to(x.dtype))
    return x.new_empty(0) if y is None else total, h, low, mean, rstd


def _statistics(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@_residual_norm.register_fake
def _(x, y, gamma, weight, bias, eps, lora_a):
    total = x.new_empty(0) if y is None else x.new_empty(x.shape)
    low = x.new_empty(0) if lora_a is None else x.new_empty(len(x), len(lora_a))
    mean, rstd = (x.new_empty(len(x), dtype=_statistics(x)) for _ in range(2))
    return total, x.new_empty(x.shape), low, mean, rstd


@torch.library.custom_op("vitface::residual_norm_backward", mutates_args=())
def _backward(
    dsum: Tensor | None,
    dh: Tensor,
    dlow: Tensor | None,
    x: Tensor,
    gamma: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    lora_a: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx' and dh (M, D), dlow (M, K·R), x' (M, D) -> dx (M, D), and dy (M, D), empty without gamma: then it is dx."""
    if runs_triton(x):
        from vitface.kernels import norm

        return norm.backward(dsum, dh, dlow, x, gamma, weight, mean, rstd, lora_a)
    if dlow is not None and lora_a is not None:
        dh = dh.addmm(dlow, lora_a.to(dlow.dtype))
    normal, dnormal = (x.to(mean.dtype) - mean[:, None]) * rstd[:, None], dh.to(mean.dtype) * weight
    along = (dnormal * normal).mean(1, keepdim=True)
    dx = rstd[:, None] * (dnormal - dnormal.mean(1, keepdim=True) - normal * along)
    dx = (dx if dsum is None else dx + dsum).to(x.dtype)
    return dx, x.new_empty(0) if gamma is None else dx * gamma


@_backward.register_fake
def _(dsum, dh, dlow, x, gamma, weight, mean, rstd, lora_a):
    return x.new_empty(x.shape), x.new_empty(0 if gamma is None else x.shape)


def _setup_context(ctx, inputs, output):
    x, y, gamma, weight, _, _, lora_a = inputs
    total, h, _, mean, rstd = output
    ctx.has_branch = y is not None
    kept = total if ctx.has_branch else x
    ctx.save_for_backward(kept, None if lora_a is None else h, gamma, weight, mean, rstd, lora_a)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dsum, dh, dlow, dmean, drstd):
    x, h, gamma, weight, mean, rstd, lora_a = ctx.saved_tensors
    da = (dlow.t() @ h).to(lora_a.dtype) if ctx.needs_input_grad[6] and dlow is not None else None
    dx = dy = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dh = torch.zeros_like(x) if dh is None else dh
        scale = gamma if ctx.has_branch else None
        dx, dy = _backward(dsum if ctx.has_branch else None, dh, dlow, x, scale, weight, mean, rstd, lora_a)
        dy = dx if scale is None else dy
    return dx, dy if ctx.has_branch else None, None, None, None, None, da


_residual_norm.register_autograd(_autograd, setup_context=_setup_context)
