"""The private operators of torch that the kernels use, and what replaces each one where torch lacks it.

| private operator of torch                  | what it is used for                       | replaced by               |
| ------------------------------------------ | ----------------------------------------- | ------------------------- |
| mkldnn._linear_pointwise, and its .binary  | bias, residual, activation in the product | F.linear, `+`, F.gelu ... |
| mkldnn._reorder_linear_weight              | a weight in the layout of oneDNN          | the weight itself         |
| mkldnn._is_mkldnn_bf16_supported           | whether oneDNN multiplies bfloat16 here   | the answer no             |
| aten._softmax_backward_data                | the gradient of a softmax in one pass     | its formula, three passes |

oneDNN's operators serve together or not at all: a torch that lacks one, or gives it other arguments, serves none. With
them each of bias, residual and activation is a pass over the output that is not made, and the sum is rounded once.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.kernels.activations import activate

_POINTWISE = {
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "relu6": ("hardtanh", [0.0, 6.0], "none"),
}
_PACKED_ROWS = 2048  # the rows that a packed layout is chosen for: 8 images of 257 tokens; it serves any number


def product(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """x Wᵀ + b + residual: x (..., I), weight (O, I) or as `pack` returns it, residual (..., O) -> (..., O)."""
    if not serves(x):
        y = F.linear(x, weight, bias)
        return y if residual is None else y + residual
    if residual is not None:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual.contiguous(), weight, bias, "add")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")


def activated_product(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """act(x Wᵀ + b), shapes as in `product`, without a gradient."""
    if act in _POINTWISE and serves(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *_POINTWISE[act])
    return activate(product(x, weight, bias), act)


def pack(weight: Tensor) -> Tensor:
    """A weight (O, I) in the layout that `product` reads fastest; the weight itself where oneDNN does not serve it."""
    if not serves(weight):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)


def softmax_backward_(dp: Tensor, p: Tensor) -> Tensor:
    """p ⊙ (dp - rowsum(p ⊙ dp)) in the memory of dp: the gradient of softmax's input from that of its output p."""
    if hasattr(torch.ops.aten, "_softmax_backward_data"):
        return torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
    return dp.sub_((p * dp).sum(-1, keepdim=True)).mul_(p)


def serves(x: Tensor) -> bool:
    """Whether oneDNN has products for x. In float32 torch would take MKL's, which are slow on processors by AMD."""
    if x.device.type != "cpu" or not x.numel() or not _onednn_works():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def _onednn_works() -> bool:
    """Whether this torch has oneDNN's operators and they take the arguments above: each is called once."""
    one = torch.ones(1, 1)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(one, _PACKED_ROWS)
        for pointwise in _POINTWISE.values():
            torch.ops.mkldnn._linear_pointwise(one, packed, None, *pointwise)
        torch.ops.mkldnn._linear_pointwise.binary(one, one, packed, None, "add")
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True
