"""The residual step in Triton: one kernel forward, one backward. residual.py has the formulas and calls this on CUDA.

A program has BLOCK_M rows to itself and walks through their width twice, BLOCK_D columns at a time, since a width such
as 384 is no power of two: first for the statistics, then for what they are needed for. The second walk finds the rows
in the cache. The bottleneck's product runs over the columns in between; its K·R columns are padded to a power of two.

Statistics and sums are float32. Parts of a row are combined by their means (Chan et al. 1979), without the
cancellation of a sum of squares.

Letters: M rows, D width, C columns of the bottleneck (K·R).
"""

# Triton takes plain numbers for `tl.constexpr` at a launch; its annotations deny it
# pyright: reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

# Predictions until a GPU has measured them: 16 rows are the fewest that `tl.dot` takes and leave some 2,000 programs
# for a batch of 128 images; a tile of A is 64 registers of each of the 128 threads; without stages it fits any GPU.
BLOCK_M, MAX_BLOCK_D, TILE_OF_A = 16, 128, 8192
HOW = {"num_warps": 4, "num_stages": 1}


@triton.jit
def _tile_of_a(a_ptr, column, in_width, D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """(BLOCK_C, BLOCK_D) of A (C, D), zero beyond it."""
    c = tl.arange(0, BLOCK_C)
    return tl.load(a_ptr + c[:, None] * D + column[None, :], mask=(c < C)[:, None] & in_width[None, :], other=0.0)


@triton.jit
def _tile_of_sum(x_ptr, y_ptr, gamma_ptr, at, inside, column, in_width, HAS_Y: tl.constexpr, HAS_GAMMA: tl.constexpr):
    """x + γ y, in float32, rounded as it is in memory."""
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_Y:
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_GAMMA:
            y *= tl.load(gamma_ptr + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
        total = (total + y).to(x_ptr.dtype.element_ty).to(tl.float32)
    return total


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, gamma_ptr, weight_ptr, bias_ptr, a_ptr, sum_ptr, h_ptr, low_ptr, mean_ptr, rstd_ptr, rows, eps,
    D: tl.constexpr, C: tl.constexpr, HAS_Y: tl.constexpr, HAS_GAMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = row.to(tl.int64) * D
    mean = tl.zeros((BLOCK_M,), tl.float32)
    spread = tl.zeros((BLOCK_M,), tl.float32)  # sum of squared distances from the mean
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        at = start[:, None] + column[None, :]
        total = _tile_of_sum(x_ptr, y_ptr, gamma_ptr, at, inside, column, column < D, HAS_Y, HAS_GAMMA)
        if HAS_Y:
            tl.store(sum_ptr + at, total, mask=inside)
        count = tl.minimum(D - first, BLOCK_D)
        part = tl.sum(total, 1) / count
        off = tl.where(inside, total - part[:, None], 0.0)
        delta = part - mean
        share = count / (first + count)
        spread += tl.sum(off * off, 1) + delta * delta * (first * share)
        mean += delta * share
    rstd = tl.rsqrt(spread / D + eps)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)

    low = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        at = start[:, None] + column[None, :]
        total = _tile_of_sum(x_ptr, y_ptr, gamma_ptr, at, inside, column, column < D, HAS_Y, HAS_GAMMA)
        weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        h = (total - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        h = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, h, mask=inside)
        if C > 0:
            a = _tile_of_a(a_ptr, column, column < D, D, C, BLOCK_C).to(h.dtype)
            low = tl.dot(h, tl.trans(a), low, input_precision="ieee")  # float32 is not rounded to TF32
    if C > 0:
        c = tl.arange(0, BLOCK_C)
        at = row.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(low_ptr + at, low, mask=(row < rows)[:, None] & (c < C)[None, :])


@triton.jit
def _tiles_backward(
    dh_ptr, dlow, x_ptr, weight_ptr, a_ptr, mean, rstd, at, inside, column, in_width,
    D: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The normalised row x̂ before weight and bias, and its gradient (dh + dlow A) ⊙ w."""
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if C > 0:
        a = _tile_of_a(a_ptr, column, in_width, D, C, BLOCK_C).to(dlow.dtype)
        dh = tl.dot(dlow, a, dh, input_precision="ieee")
    weight = tl.load(weight_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    return (x - mean[:, None]) * rstd[:, None], dh * weight[None, :]


@triton.jit
def _backward_kernel(
    dsum_ptr, dh_ptr, dlow_ptr, x_ptr, gamma_ptr, weight_ptr, a_ptr, mean_ptr, rstd_ptr, dx_ptr, dy_ptr, rows,
    D: tl.constexpr, C: tl.constexpr, HAS_DSUM: tl.constexpr, HAS_GAMMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = row.to(tl.int64) * D
    mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    c = tl.arange(0, BLOCK_C)
    dlow = tl.load(
        dlow_ptr + row.to(tl.int64)[:, None] * C + c[None, :], mask=(row < rows)[:, None] & (c < C)[None, :], other=0.0
    )
    plain = tl.zeros((BLOCK_M,), tl.float32)  # mean of x̂'s gradient, and of its product with x̂
    along = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        at = start[:, None] + column[None, :]
        normal, dnormal = _tiles_backward(
            dh_ptr, dlow, x_ptr, weight_ptr, a_ptr, mean, rstd, at, inside, column, column < D, D, C, BLOCK_C
        )
        plain += tl.sum(dnormal, 1) / D
        along += tl.sum(dnormal * normal, 1) / D
    for first in range(0, D, BLOCK_D):
        column = first + tl.arange(0, BLOCK_D)
        inside = (row < rows)[:, None] & (column < D)[None, :]
        at = start[:, None] + column[None, :]
        normal, dnormal = _tiles_backward(
            dh_ptr, dlow, x_ptr, weight_ptr, a_ptr, mean, rstd, at, inside, column, column < D, D, C, BLOCK_C
        )
        dx = rstd[:, None] * (dnormal - plain[:, None] - normal * along[:, None])
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
        if HAS_GAMMA:
            gamma = tl.load(gamma_ptr + column, mask=column < D, other=0.0).to(tl.float32)
            tl.store(dy_ptr + at, dx * gamma[None, :], mask=inside)


def _sizes(x: Tensor, lora_a: Tensor | None) -> dict[str, int]:
    """D, C and the tile; the narrower the wider A is, `tl.dot` takes no side below 16."""
    columns = 0 if lora_a is None else len(lora_a)
    block_c = max(16, triton.next_power_of_2(columns))
    block_d = max(16, min(MAX_BLOCK_D, TILE_OF_A // block_c, triton.next_power_of_2(x.shape[1])))
    return {"D": x.shape[1], "C": columns, "BLOCK_M": BLOCK_M, "BLOCK_D": block_d, "BLOCK_C": block_c}


def forward(
    x: Tensor, y: Tensor | None, gamma: Tensor | None, weight: Tensor, bias: Tensor, eps: float, lora_a: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `residual._residual_norm`: x, y (M, D) -> x' and h (M, D), low (M, C), mean and rstd (M,) in float32."""
    x, y = x.contiguous(), None if y is None else y.contiguous()
    total = x.new_empty(0) if y is None else torch.empty_like(x)
    h, low = torch.empty_like(x), x.new_empty(0 if lora_a is None else (len(x), len(lora_a)))
    mean, rstd = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(len(x), BLOCK_M),)](
            x, x if y is None else y, weight if gamma is None else gamma, weight, bias,
            x if lora_a is None else lora_a.contiguous(), total, h, low, mean, rstd, len(x), eps,
            HAS_Y=y is not None, HAS_GAMMA=gamma is not None, **_sizes(x, lora_a), **HOW,
        )  # fmt: skip
    return total, h, low, mean, rstd


def backward(
    dsum: Tensor | None, dh: Tensor, dlow: Tensor | None, x: Tensor, gamma: Tensor | None, weight: Tensor,
    mean: Tensor, rstd: Tensor, lora_a: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `residual._backward`: dx' and dh (M, D), dlow (M, C) -> dx (M, D), and dy (M, D) if there is a gamma."""
    x, dh, lora_a = x.contiguous(), dh.contiguous(), None if dlow is None else lora_a
    dx, dy = torch.empty_like(x), x.new_empty(0) if gamma is None else torch.empty_like(x)
    with torch.cuda.device_of(x):
        _backward_kernel[(triton.cdiv(len(x), BLOCK_M),)](
            x if dsum is None else dsum.contiguous(), dh, x if dlow is None else dlow.contiguous(), x,
            weight if gamma is None else gamma, weight, x if lora_a is None else lora_a.contiguous(), mean, rstd,
            dx, dy, len(x), HAS_DSUM=dsum is not None, HAS_GAMMA=gamma is not None, **_sizes(x, lora_a), **HOW,
        )  # fmt: skip
    return dx, dy
