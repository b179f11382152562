"""Self-attention straight from the qkv projection, forward and backward, for the CPU at a ViT's few hundred tokens.

    S = q kᵀ / sqrt(hd)    P = softmax(S)    O = P v
    dV = Pᵀ dO    dP = dO vᵀ    dS = P ⊙ (dP - rowsum(P ⊙ dP)) / sqrt(hd)    dQ = dS k    dK = dSᵀ q

Beside autograd's own five products this makes one copy of qkv, head by head, and one back; the scores become the
probabilities, and dP becomes dS, in the same memory. Kept for the backward pass: that copy and P.

Letters: B images, N tokens, Q queries, D width, nh heads, hd head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.kernels.onednn import softmax_backward_

MAX_TOKENS = 512  # above, the (N, N) map costs more memory than it saves time


def attention(qkv: Tensor, num_heads: int, num_queries: int | None = None) -> Tensor:
    """The contract of `vitface.model.ops.attention`: (B, N, 3 D) -> (B, num_queries or N, D).

    SDPA does it for longer sequences, and on devices that have a good kernel of their own.
    """
    if qkv.device.type != "cpu" or qkv.shape[1] > MAX_TOKENS:
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q[:, :, :num_queries], k, v).transpose(1, 2).flatten(2)
    return _attention(qkv, num_heads, qkv.shape[1] if num_queries is None else num_queries)[0]


@torch.library.custom_op("vitface::attention", mutates_args=())
def _attention(qkv: Tensor, num_heads: int, num_queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B, N, 3 D) -> O (B, Q, D), the heads' q, k, v (3, B nh, N, hd), P (B nh, Q, N)."""
    heads = _split(qkv, num_heads)
    q, k, v = heads
    p = q.new_empty(len(q), num_queries, q.shape[1])
    torch.baddbmm(p, q[:, :num_queries], k.mT, beta=0, alpha=q.shape[-1] ** -0.5, out=p)
    torch.softmax(p, -1, out=p)
    out = torch.bmm(p, v).view(len(qkv), num_heads, num_queries, -1).transpose(1, 2).flatten(2)
    return out, heads, p


@_attention.register_fake
def _(qkv, num_heads, num_queries):
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    rows = batch * num_heads
    heads = qkv.new_empty(3, rows, tokens, width // num_heads)
    return qkv.new_empty(batch, num_queries, width), heads, qkv.new_empty(rows, num_queries, tokens)


@torch.library.custom_op("vitface::attention_backward", mutates_args=())
def _backward(dout: Tensor, heads: Tensor, p: Tensor) -> Tensor:
    """dO (B, Q, D) -> dqkv (B, N, 3 D)."""
    q, k, v = heads
    num_queries, hd = p.shape[1], q.shape[-1]
    do = dout.unflatten(2, (-1, hd)).transpose(1, 2).reshape(len(q), num_queries, hd)
    dheads = torch.empty_like(heads)
    dq, dk, dv = dheads
    torch.bmm(p.mT, do, out=dv)
    ds = softmax_backward_(torch.bmm(do, v.mT), p)
    torch.baddbmm(dk, ds.mT, q[:, :num_queries], beta=0, alpha=hd**-0.5, out=dk)
    dq[:, num_queries:].zero_()
    torch.baddbmm(dq[:, :num_queries], ds, k, beta=0, alpha=hd**-0.5, out=dq[:, :num_queries])
    return dheads.view(3, len(dout), -1, *q.shape[1:]).permute(1, 3, 0, 2, 4).flatten(2)


@_backward.register_fake
def _(dout, heads, p):
    return dout.new_empty(len(dout), heads.shape[2], 3 * dout.shape[2])


def _split(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, N, 3 D) -> (3, B nh, N, hd), contiguous."""
    batch, tokens, _ = qkv.shape
    heads = qkv.view(batch, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return heads.clone(memory_format=torch.contiguous_format).view(3, batch * num_heads, tokens, -1)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dheads, dp):
    return None if dout is None else _backward(dout, *ctx.saved_tensors), None, None


_attention.register_autograd(_autograd, setup_context=_setup_context)
