"""Self-attention for GPUs, in Triton: q, k and v are read where the projection left them, dq, dk and dv written there.

    S = q kᵀ / sqrt(hd)    P = softmax(S)    O = P v
    dV = Pᵀ dO    dP = dO vᵀ    dS = P ⊙ (dP - rowsum(O ⊙ dO)) / sqrt(hd)    dQ = dS k    dK = dSᵀ q

Kept for the backward pass: qkv, O, and a number for each row of S. It computes P twice, once for the programs of dV and
dK and once for those of dQ, so that each adds up in one order, without atomics: the same input gives the same bits.

Letters: B images, N tokens, Q queries, D width, nh heads, hd head dim.
"""

import torch
import triton
from torch import Tensor
from triton import knobs

import vitface.kernels.packed_triton as packed_triton

HEAD_DIMS = (16, 32, 64)
INTERPRETED = knobs.runtime.interpret  # then it runs on the CPU, slowly, for tests
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def attention(qkv: Tensor, num_heads: int, num_queries: int | None = None) -> Tensor:
    """The contract of `vitface.model.ops.attention`, on CUDA: (B, N, 3 D) -> (B, num_queries or N, D).

    ValueError for a head dim other than 16, 32 and 64, and for a dtype other than bf16, fp16 and fp32.
    """
    tokens, head_dim = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    queries = tokens if num_queries is None else min(num_queries, tokens)
    if head_dim not in HEAD_DIMS or qkv.shape[2] != 3 * num_heads * head_dim:
        raise ValueError(f"{qkv.shape[2]} = 3 x {num_heads} heads x head dim, which must be one of {HEAD_DIMS}")
    if qkv.dtype not in DTYPES or queries < 1:
        raise ValueError(f"packed attention is in bf16, fp16 or fp32, of a query or more: {qkv.dtype}, {queries}")
    if qkv.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"packed attention runs on CUDA devices: qkv is on {qkv.device}")
    return _attention(qkv, num_heads, queries)[0]


def launch(qkv: Tensor, heads: int, queries: int, backward: bool) -> dict[str, int]:
    """A program's sizes. They are fixed: tuned while it runs, they would leave the order of sums to chance."""
    tokens, exact = qkv.shape[1], qkv.dtype == torch.float32
    own, step = (32, 32) if exact else (64, 32) if backward else (64, 64)
    own, step = (min(most, max(16, triton.next_power_of_2(tokens - 1))) for most in (own, step))
    shape = {"N": tokens, "Q": queries, "nh": heads, "hd": qkv.shape[2] // (3 * heads)}
    return {**shape, "OWN": own, "STEP": step, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@torch.library.custom_op("vitface::packed_attention", mutates_args=())
def _attention(qkv: Tensor, num_heads: int, num_queries: int) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3 D) -> O (B, Q, D), log2 of the sum of each row of exp(S) (B, nh, Q) float32."""
    sizes = launch(qkv, num_heads, num_queries, backward=False)
    out = qkv.new_empty(len(qkv), num_queries, qkv.shape[2] // 3)
    lse = qkv.new_empty(len(qkv), num_heads, num_queries, dtype=torch.float32)
    tiles = 1 + triton.cdiv(num_queries - 1, sizes["OWN"])
    with torch.cuda.device_of(qkv):
        packed_triton.forward[(len(qkv) * num_heads * tiles,)](qkv.contiguous(), out, lse, **sizes)
    return out, lse


@_attention.register_fake
def _(qkv, num_heads, num_queries):
    lse = qkv.new_empty(len(qkv), num_heads, num_queries, dtype=torch.float32)
    return qkv.new_empty(len(qkv), num_queries, qkv.shape[2] // 3), lse


@torch.library.custom_op("vitface::packed_attention_backward", mutates_args=())
def _backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """dO (B, Q, D), and what the forward pass had and gave -> dqkv (B, N, 3 D)."""
    batch, num_heads, num_queries = lse.shape
    sizes = launch(qkv, num_heads, num_queries, backward=True)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    tiles = 1 + triton.cdiv(qkv.shape[1] - 1, sizes["OWN"]) + triton.cdiv(num_queries - 1, sizes["OWN"])
    with torch.cuda.device_of(qkv):
        packed_triton.backward[(batch * num_heads * tiles,)](
            qkv.contiguous(), out, lse, dout.contiguous(), dqkv, **sizes
        )
    return dqkv


@_backward.register_fake
def _(dout, qkv, out, lse):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    return None if dout is None else _backward(dout, *ctx.saved_tensors), None, None


_attention.register_autograd(_autograd, setup_context=_setup_context)
