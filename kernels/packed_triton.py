"""The Triton programs of `packed_attention`, which has the formulas.

The class token stays out of the tiles, so that 256 patches are whole tiles: its key starts each sum, its query is a
row of its own. q and k stand for the class token's row of one head, where row n is 3 D n elements further on.

Letters: N tokens, Q queries, D width, nh heads, hd head dim; a program computes OWN rows, from tiles of STEP others.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # probabilities are powers of two: exp(s) = 2^(s log2(e))


@triton.jit
def forward(
    qkv,
    out,
    lse,
    N: tl.constexpr,
    Q: tl.constexpr,
    nh: tl.constexpr,
    hd: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """For each image and head, a program for the class token's query and one for each tile of other queries."""
    D: tl.constexpr = nh * hd
    tiles: tl.constexpr = 1 + (Q - 1 + OWN - 1) // OWN
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)
    q = qkv + (head // nh) * (N * 3 * D) + (head % nh) * hd
    o = out + (head // nh) * (Q * D) + (head % nh) * hd
    if tile == 0:
        _forward_cls(q, o, lse + head * Q, N, D, hd, STEP)
    elif Q > 1:
        _forward_queries(q, o, lse + head * Q, (tile - 1) * OWN, N, Q, D, hd, OWN, STEP)


@triton.jit
def backward(
    qkv,
    out,
    lse,
    dout,
    dqkv,
    N: tl.constexpr,
    Q: tl.constexpr,
    nh: tl.constexpr,
    hd: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """For each image and head, a program for the class token, one for each tile of other keys, one for each of queries.

    Each computes P again and writes what nobody else does, after one sum in one order: no atomics.
    """
    D: tl.constexpr = nh * hd
    key_tiles: tl.constexpr = (N - 1 + OWN - 1) // OWN
    tiles: tl.constexpr = 1 + key_tiles + (Q - 1 + OWN - 1) // OWN
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)
    at, at_out = (head // nh) * (N * 3 * D) + (head % nh) * hd, (head // nh) * (Q * D) + (head % nh) * hd
    q, dq, o, do, lse = qkv + at, dqkv + at, out + at_out, dout + at_out, lse + head * Q
    if tile == 0:
        _backward_cls(q, o, do, lse, dq, N, Q, D, hd, STEP)
    elif tile <= key_tiles:
        _backward_keys(q, o, do, lse, dq, (tile - 1) * OWN, N, Q, D, hd, OWN, STEP)
    elif Q > 1:
        _backward_queries(q, o, do, lse, dq, (tile - 1 - key_tiles) * OWN, N, Q, D, hd, OWN, STEP)


@triton.jit
def _forward_cls(q, o, lse, N: tl.constexpr, D: tl.constexpr, hd: tl.constexpr, STEP: tl.constexpr):
    scale: tl.constexpr = hd**-0.5 * LOG2E
    q0 = _row(q, hd)
    most = tl.sum(q0 * _row(q + D, hd), 0) * scale
    total = 1.0
    acc = _row(q + 2 * D, hd)
    for first in range(0, N - 1, STEP):
        k, v = _load_pair(q + 4 * D, first, N, D, STEP, hd)
        s = _within(_times(k, q0) * scale, first, N - 1, STEP)
        higher = tl.maximum(most, tl.max(s, 0))
        p, shrink = tl.exp2(s - higher), tl.exp2(most - higher)
        acc = acc * shrink + tl.sum(p[:, None] * v.to(tl.float32), 0)
        total = total * shrink + tl.sum(p, 0)
        most = higher
    tl.store(o + tl.arange(0, hd), (acc / total).to(o.dtype.element_ty))
    tl.store(lse, most + tl.log2(total))


@triton.jit
def _forward_queries(
    q,
    o,
    lse,
    first_query,
    N: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    hd: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    scale: tl.constexpr = hd**-0.5 * LOG2E
    queries = _load(q + 3 * D, first_query, Q - 1, 3 * D, OWN, hd)
    most = _times(queries, _row(q + D, hd)) * scale
    total = tl.full((OWN,), 1.0, tl.float32)
    acc = tl.zeros((OWN, hd), tl.float32) + _row(q + 2 * D, hd)[None, :]
    for first in range(0, N - 1, STEP):
        k, v = _load_pair(q + 4 * D, first, N, D, STEP, hd)
        s = _within(tl.dot(queries, tl.trans(k), input_precision="ieee") * scale, first, N - 1, STEP)
        higher = tl.maximum(most, tl.max(s, 1))
        p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(most - higher)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        most = higher
    _store(o + D, first_query, acc / total[:, None], 0, Q - 1, D, OWN, hd)
    offs = first_query + tl.arange(0, OWN)
    tl.store(lse + 1 + offs, most + tl.log2(total), mask=offs < Q - 1)


@triton.jit
def _backward_cls(
    q, o, do, lse, dq, N: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, hd: tl.constexpr, STEP: tl.constexpr
):
    """The class token's dq, from all keys, and its dk and dv, from all queries."""
    scale: tl.constexpr = hd**-0.5
    k0, v0 = _row(q + D, hd), _row(q + 2 * D, hd)
    q0, do0, lse0, delta0 = _cls(q, o, do, lse, hd)
    p00 = tl.exp2(tl.sum(q0 * k0, 0) * (scale * LOG2E) - lse0)
    ds00 = p00 * (tl.sum(do0 * v0, 0) - delta0)
    dq0, dk0, dv0 = ds00 * k0, ds00 * q0, p00 * do0
    for first in range(0, N - 1, STEP):
        k, v = _load_pair(q + 4 * D, first, N, D, STEP, hd)
        p, ds = _weights(_times(k, q0), _times(v, do0), lse0, delta0, first, N, STEP, hd)
        dq0 += tl.sum(ds[:, None] * k.to(tl.float32), 0)
    for first in range(0, Q - 1, STEP):
        queries, douts, sums, delta = _load_queries(q, o, do, lse, first, Q, D, STEP, hd)
        p, ds = _weights(_times(queries, k0), _times(douts, v0), sums, delta, first, Q, STEP, hd)
        dk0 += tl.sum(ds[:, None] * queries.to(tl.float32), 0)
        dv0 += tl.sum(p[:, None] * douts.to(tl.float32), 0)
    offs = tl.arange(0, hd)
    tl.store(dq + offs, (dq0 * scale).to(dq.dtype.element_ty))
    tl.store(dq + D + offs, (dk0 * scale).to(dq.dtype.element_ty))
    tl.store(dq + 2 * D + offs, dv0.to(dq.dtype.element_ty))


@triton.jit
def _backward_keys(
    q,
    o,
    do,
    lse,
    dq,
    first_key,
    N: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    hd: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """dk and dv of a tile of keys, from all queries; zeros as dq of those of its tokens that are no queries."""
    scale: tl.constexpr = hd**-0.5
    k, v = _load_pair(q + 4 * D, first_key, N, D, OWN, hd)
    q0, do0, lse0, delta0 = _cls(q, o, do, lse, hd)
    p0, ds0 = _weights(_times(k, q0), _times(v, do0), lse0, delta0, first_key, N, OWN, hd)
    dk, dv = ds0[:, None] * q0[None, :], p0[:, None] * do0[None, :]
    for first in range(0, Q - 1, STEP):
        queries, douts, sums, delta = _load_queries(q, o, do, lse, first, Q, D, STEP, hd)
        s = tl.dot(k, tl.trans(queries), input_precision="ieee") * (scale * LOG2E)
        if (N - 1) % OWN != 0:
            s = tl.where((first_key + tl.arange(0, OWN) < N - 1)[:, None], s, float("-inf"))
        p = tl.exp2(s - sums[None, :])
        dv = tl.dot(p.to(k.dtype), douts, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(douts), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(k.dtype), queries, dk, input_precision="ieee")
    _store(dq + 4 * D, first_key, dk * scale, 0, N - 1, 3 * D, OWN, hd)
    _store(dq + 5 * D, first_key, dv, 0, N - 1, 3 * D, OWN, hd)
    if Q < N:
        _store(dq + 3 * D, first_key, tl.zeros((OWN, hd), tl.float32), Q - 1, N - 1, 3 * D, OWN, hd)


@triton.jit
def _backward_queries(
    q,
    o,
    do,
    lse,
    dq,
    first_query,
    N: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    hd: tl.constexpr,
    OWN: tl.constexpr,
    STEP: tl.constexpr,
):
    """dq of a tile of queries, from all keys."""
    scale: tl.constexpr = hd**-0.5
    queries, douts, sums, delta = _load_queries(q, o, do, lse, first_query, Q, D, OWN, hd)
    k0, v0 = _row(q + D, hd), _row(q + 2 * D, hd)
    _, ds0 = _weights(_times(queries, k0), _times(douts, v0), sums, delta, first_query, Q, OWN, hd)
    dqs = ds0[:, None] * k0[None, :]
    for first in range(0, N - 1, STEP):
        k, v = _load_pair(q + 4 * D, first, N, D, STEP, hd)
        s = _within(tl.dot(queries, tl.trans(k), input_precision="ieee") * (scale * LOG2E), first, N - 1, STEP)
        ds = tl.exp2(s - sums[:, None]) * (tl.dot(douts, tl.trans(v), input_precision="ieee") - delta[:, None])
        dqs = tl.dot(ds.to(k.dtype), k, dqs, input_precision="ieee")
    _store(dq + 3 * D, first_query, dqs * scale, 0, Q - 1, 3 * D, OWN, hd)


@triton.jit
def _cls(q, o, do, lse, hd: tl.constexpr):
    """The class token's q, dO, lse and rowsum(O ⊙ dO)."""
    do0 = _row(do, hd)
    return _row(q, hd), do0, tl.load(lse), tl.sum(_row(o, hd) * do0, 0)


@triton.jit
def _weights(s, dp, lse, delta, first, rows: tl.constexpr, BLOCK: tl.constexpr, hd: tl.constexpr):
    """P and sqrt(hd) dS (BLOCK,) of the class token and a tile of others, of sqrt(hd) S and dP; zero beyond these."""
    p = tl.exp2(_within(s * (hd**-0.5 * LOG2E), first, rows - 1, BLOCK) - lse)
    return p, p * (dp - delta)


@triton.jit
def _load_queries(q, o, do, lse, first, Q: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, hd: tl.constexpr):
    """A tile of q and of dO, and their lse and rowsum(O ⊙ dO); all are zero beyond the last query, and so is dS."""
    queries = _load(q + 3 * D, first, Q - 1, 3 * D, BLOCK, hd)
    douts = _load(do + D, first, Q - 1, D, BLOCK, hd)
    delta = tl.sum(_load(o + D, first, Q - 1, D, BLOCK, hd).to(tl.float32) * douts.to(tl.float32), 1)
    offs = first + tl.arange(0, BLOCK)
    return queries, douts, tl.load(lse + 1 + offs, mask=offs < Q - 1, other=0.0), delta


@triton.jit
def _within(s, first, rows: tl.constexpr, BLOCK: tl.constexpr):
    """s (..., BLOCK) of tokens `first` and on; -inf from `rows` on."""
    if rows % BLOCK != 0:
        s = tl.where(first + tl.arange(0, BLOCK) < rows, s, float("-inf"))
    return s


@triton.jit
def _row(base, hd: tl.constexpr):
    return tl.load(base + tl.arange(0, hd)).to(tl.float32)


@triton.jit
def _times(tile, row):
    """tile (BLOCK, hd) times row (hd,): (BLOCK,), in float32."""
    return tl.sum(tile.to(tl.float32) * row[None, :], 1)


@triton.jit
def _load(base, first, rows: tl.constexpr, stride: tl.constexpr, BLOCK: tl.constexpr, hd: tl.constexpr):
    """(BLOCK, hd), from row `first` on; zeros from row `rows` on."""
    offs = first + tl.arange(0, BLOCK)
    pointers = base + offs[:, None] * stride + tl.arange(0, hd)[None, :]
    if rows % BLOCK == 0:  # noqa: SIM108 - whole tiles need no mask
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=offs[:, None] < rows, other=0.0)
    return tile


@triton.jit
def _store(
    base,
    first,
    tile,
    start: tl.constexpr,
    stop: tl.constexpr,
    stride: tl.constexpr,
    BLOCK: tl.constexpr,
    hd: tl.constexpr,
):
    """Those rows of `tile` (BLOCK, hd), which are rows `first` and on, that are from `start` on and before `stop`."""
    offs = first + tl.arange(0, BLOCK)
    pointers = base + offs[:, None] * stride + tl.arange(0, hd)[None, :]
    if start == 0 and stop % BLOCK == 0:
        tl.store(pointers, tile.to(base.dtype.element_ty))
    else:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=((offs >= start) & (offs < stop))[:, None])


@triton.jit
def _load_pair(k, first, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, hd: tl.constexpr):
    """A tile of keys and one of values, D elements further on; `k` is where the first patch's key is."""
    return _load(k, first, N - 1, 3 * D, BLOCK, hd), _load(k + D, first, N - 1, 3 * D, BLOCK, hd)
