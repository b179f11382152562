"""Frozen layers without an adapter: the linear map, and the MLP with its own backward pass.

    u = x W1ᵀ + b1    h = act(u)    y = h W2ᵀ + b2
    dh = dy W2        du = dh ⊙ act'(u), where dh stands        dx = du W1

Nothing but u is kept, which autograd keeps too; it also writes dh and du to two places and asks for none of the four
gradients that nobody needs. On the CPU the bias is added
inside oneDNN's product, and so is the residual that the layer's output is added to: each is a pass over the output
that is not made, and the sum is rounded once.

Letters: M rows (images x tokens), I in, O out, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKED_ROWS = 2048  # that a packed layout is chosen for: 8 images of 257 tokens; it serves any number


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """The contract of `vitface.model.ops.linear`, without a gradient."""
    return (_linear if torch.compiler.is_compiling() else product)(x, weight, bias, residual)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x Wᵀ + b + residual, (..., I) -> (..., O)."""
    if _onednn(x) and x.numel():
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual.contiguous(), weight, bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")
    y = F.linear(x, weight, bias)
    return y if residual is None else y + residual


def pack(weight: Tensor) -> Tensor:
    """The contract of `vitface.model.ops.pack_weight`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS) if _onednn(weight) else weight


def _onednn(x: Tensor) -> bool:
    """Whether oneDNN has products for it. In float32 torch would take MKL's, which are slow on processors by AMD."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@torch.library.custom_op("vitface::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    return product(x, weight, bias, residual)


@_linear.register_fake
def _(x, weight, bias, residual):
    return x.new_empty(*x.shape[:-1], len(weight))


def _activate(u: Tensor, act: str) -> Tensor:
    return F.gelu(u) if act == "gelu" else u * torch.sigmoid(1.702 * u)


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, act: str, residual: Tensor | None = None) -> Tensor:
    """The contract of `vitface.model.ops.frozen_mlp`."""
    if any(parameter.requires_grad for parameter in (w1, b1, w2, b2)):
        raise ValueError("impl 'fused' is for frozen weights; use impl 'reference' to train the MLP")
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _mlp(x, w1, b1, w2, b2, act, residual)[0]
    if act == "gelu" and _onednn(x) and x.numel():
        h = torch.ops.mkldnn._linear_pointwise(x, w1, b1, "gelu", [], "none")
    else:
        h = _activate(product(x, w1, b1), act)
    return product(h, w2, b2, residual)


@torch.library.custom_op("vitface::mlp", mutates_args=())
def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, act: str, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x (..., D) -> y (..., D), u (..., 4 D)."""
    u = product(x, w1, b1)
    return product(_activate(u, act), w2, b2, residual), u


@_mlp.register_fake
def _(x, w1, b1, w2, b2, act, residual):
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], len(w1))


@torch.library.custom_op("vitface::mlp_backward", mutates_args=())
def _backward(dy: Tensor, u: Tensor, w1: Tensor, w2: Tensor, act: str) -> Tensor:
    return _activate_backward(dy @ w2, u, act) @ w1


def _activate_backward(dh: Tensor, u: Tensor, act: str) -> Tensor:
    """dh ⊙ act'(u), where dh stands."""
    if act == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(dh, u, grad_input=dh)
    s = torch.sigmoid(1.702 * u)
    return dh.mul_(s * (1 + 1.702 * u * (1 - s)))


@_backward.register_fake
def _(dy, u, w1, w2, act):
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, w1, _, w2, _, ctx.act, _ = inputs
    ctx.save_for_backward(output[1], w1, w2)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, du):
    dx = _backward(dy, *ctx.saved_tensors, ctx.act) if dy is not None and ctx.needs_input_grad[0] else None
    return dx, None, None, None, None, None, dy if ctx.needs_input_grad[6] else None


_mlp.register_autograd(_autograd, setup_context=_setup_context)
