"""Frozen layers without an adapter: the linear map, and for the CPU an MLP with a backward pass of its own.

    u = x W1ᵀ + b1    h = act(u)    y = h W2ᵀ + b2
    dh = dy W2        du = dh ⊙ act'(u), in the memory of dh        dx = du W1

Only u is kept for the backward pass. Autograd keeps u too, writes dh and du to two places, and computes four gradients
that nobody needs. The bias is added inside oneDNN's product. Other devices get the formulas, which `torch.compile` can
fuse with what stands around them.

Letters: I in, O out, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.kernels.activations import activate, activate_backward
from vitface.kernels.onednn import activated_product, product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The contract of `vitface.model.ops.linear`. The product is torch's own where a gradient is asked for.

    RuntimeError if the weight is then in the layout of oneDNN, see `onednn.pack`.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        if weight.is_mkldnn:  # which F.linear cannot read
            raise RuntimeError("the model is prepared for inference: call it under torch.no_grad()")
        return F.linear(x, weight, bias)
    return (_linear if torch.compiler.is_compiling() else product)(x, weight, bias)


@torch.library.custom_op("vitface::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, act: str) -> Tensor:
    """The contract of `vitface.model.ops.mlp`; ValueError if a weight or bias asks for a gradient."""
    if any(parameter.requires_grad for parameter in (w1, b1, w2, b2)):
        raise ValueError("the fused MLP is for frozen weights; use the reference operations to train it")
    if x.device.type != "cpu":
        return F.linear(activate(F.linear(x, w1, b1), act), w2, b2)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _mlp(x, w1, b1, w2, b2, act)[0]
    return product(activated_product(x, w1, b1, act), w2, b2)


@torch.library.custom_op("vitface::mlp", mutates_args=())
def _mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """x (..., D) -> y (..., D), u = x W1ᵀ + b1."""
    u = product(x, w1, b1)
    return product(activate(u, act), w2, b2), u


@_mlp.register_fake
def _(x, w1, b1, w2, b2, act):
    return x.new_empty(x.shape), x.new_empty(*x.shape[:-1], len(w1))


@torch.library.custom_op("vitface::mlp_backward", mutates_args=())
def _backward(dy: Tensor, u: Tensor, w1: Tensor, w2: Tensor, act: str) -> Tensor:
    return activate_backward(dy @ w2, u, act) @ w1


@_backward.register_fake
def _(dy, u, w1, w2, act):
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, w1, _, w2, _, ctx.act = inputs
    ctx.save_for_backward(output[1], w1, w2)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, du):
    dx = _backward(dy, *ctx.saved_tensors, ctx.act) if dy is not None and ctx.needs_input_grad[0] else None
    return dx, None, None, None, None, None


_mlp.register_autograd(_autograd, setup_context=_setup_context)
