"""The fused operations: the five names of `vitface.model.ops` with the same contracts, for frozen weights.

They are the same functions with fewer passes over memory. A request that they cannot run raises a ValueError: weights
that are trained need the reference.
"""

__all__ = ["activate", "attention", "linear", "lora_linear", "mlp"]

from vitface.kernels.attention import attention
from vitface.kernels.frozen import activate, linear, mlp
from vitface.kernels.lora_linear import lora_linear
