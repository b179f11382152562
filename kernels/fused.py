"""The fused operations: the five names of `vitface.model.ops` with the same contracts, for frozen weights.

They are the same functions with fewer passes over memory. A request that they cannot run raises a ValueError: weights
that are trained need the reference. On the CPU they are operators with a backward pass of their own; on other devices
plain PyTorch, arranged so that `torch.compile` finds less to move.
"""

__all__ = ["activate", "attention", "linear", "lora_linear", "mlp"]

from torch import Tensor

import vitface.kernels.concatenated as on_gpu
import vitface.kernels.lora_linear as on_cpu
from vitface.kernels.activations import activate
from vitface.kernels.attention import attention
from vitface.kernels.frozen import linear, mlp


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
    module = on_cpu if x.device.type == "cpu" else on_gpu
    return module.lora_linear(x, weight, bias, lora_a, lora_b, scaling, gate)
