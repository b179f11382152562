"""`vitface.kernels.fused` with packed attention, for CUDA devices with Triton; for `use_ops`, off by default."""

__all__ = ["activate", "attention", "linear", "lora_linear", "mlp"]

from vitface.kernels.fused import activate, linear, lora_linear, mlp
from vitface.kernels.packed_attention import attention
