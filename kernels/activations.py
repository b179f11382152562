"""The activations of an MLP, forward and backward: h = act(u), du = dh ⊙ act'(u)."""

import torch
import torch.nn.functional as F
from torch import Tensor

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def activate(u: Tensor, act: str) -> Tensor:
    """The contract of `vitface.model.ops.activate`."""
    if act == "swiglu":
        a, b = u.chunk(2, -1)
        return F.silu(a) * b
    if act == "quick_gelu":
        return u * torch.sigmoid(1.702 * u)
    return F.relu6(u) if act == "relu6" else F.gelu(u, approximate=_APPROXIMATE[act])


def activate_backward(dh: Tensor, u: Tensor, act: str) -> Tensor:
    """dh ⊙ act'(u), in the memory of dh but for SwiGLU, whose u is twice as wide."""
    if act in _APPROXIMATE:
        return torch.ops.aten.gelu_backward.grad_input(dh, u, approximate=_APPROXIMATE[act], grad_input=dh)
    if act == "relu6":
        return dh.mul_((u > 0) & (u < 6))
    if act == "swiglu":
        a, b = u.chunk(2, -1)
        s = torch.sigmoid(a)
        return torch.cat([dh * b * s * (1 + a * (1 - s)), dh * a * s], -1)
    s = torch.sigmoid(1.702 * u)
    return dh.mul_(s * (1 + 1.702 * u * (1 - s)))
