"""Packed attention against float64, under Triton's interpreter; `test_packed_attention.py` runs this file.

The interpreter is wrong in bf16, so float32 and float16 only.
"""

import importlib.util
import math

import pytest
import torch
from conftest import tiny_vit
from precision import assert_as_precise, poison

from vitface.kernels import fused_packed, packed_attention, packed_triton
from vitface.kernels.packed_attention import _attention, _backward, attention
from vitface.model import ops


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is not written stays NaN."""
    poison(monkeypatch)


def draw(tokens, queries, heads=2, head_dim=16, batch=2, seed=0):
    """float64 qkv (B, N, 3 D), with scores of about +-3, and dO (B, Q, D), whose memory is not in order."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim, generator=generator, dtype=torch.float64)
    dout = torch.randn(batch, heads * head_dim, queries, generator=generator, dtype=torch.float64).mT
    return 1.5 * qkv, dout


def results(module, qkv, dout, heads, dtype):
    """O, dq, dk and dv of `module.attention` in `dtype`, as float64."""
    qkv = qkv.to(dtype).requires_grad_()
    out = module.attention(qkv, heads, None if dout.shape[1] == qkv.shape[1] else dout.shape[1])
    dqkv = torch.autograd.grad(out, qkv, dout.to(dtype))[0]
    assert out.dtype == dqkv.dtype == dtype
    return [t.double() for t in (out.detach(), *dqkv.chunk(3, 2))]


def sizes(qkv, dout, heads):
    """O, dq, dk and dv with the absolute values of all terms."""
    q, k, v = ops.split_heads(qkv, heads)
    p, scale = ops.attention_map(qkv, heads)[:, :, : dout.shape[1]].double(), q.shape[-1] ** -0.5
    do = dout.unflatten(2, (heads, -1)).transpose(1, 2).abs()
    q, k, v = q[:, :, : dout.shape[1]].abs(), k.abs(), v.abs()
    ds = p * (do @ v.mT + (p @ v * do).sum(-1, keepdim=True)) * scale
    return [t.transpose(1, 2).flatten(2) for t in (p @ v, ds @ k, ds.mT @ q, p.mT @ do)]


def compare(qkv, dout, heads, dtype):
    qkv, dout = qkv.to(dtype).double(), dout.to(dtype).double()
    exact = results(ops, qkv, dout, heads, torch.float64)
    eager, ours = (results(module, qkv, dout, heads, dtype) for module in (ops, packed_attention))
    for name, size, *row in zip(("O", "dq", "dk", "dv"), sizes(qkv, dout, heads), exact, eager, ours, strict=True):
        (want, *found), beyond = [t[:, : size.shape[1]] for t in row], row[2][:, size.shape[1] :]
        assert_as_precise(name, want, size, *found, dtype)
        assert not beyond.any(), f"{name} of what is no query"
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", packed_attention.HEAD_DIMS)
@pytest.mark.parametrize(
    "tokens", [1, 17, 65, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 16, 50, 197, 257))]
)
def test_error_is_at_most_twice_that_of_eager(tokens, head_dim, dtype):
    for queries in sorted({1, tokens // 3 + 1, tokens}):
        batch, heads = (1, 1) if queries > 50 else (2, 2)  # a single row of P would leave much to chance
        compare(*draw(tokens, queries, heads, head_dim, batch), heads, dtype)


def test_more_tokens_than_224_pixels_give():
    compare(*draw(577, 577, 1, batch=1), 1, torch.float16)


def test_one_head_may_have_scores_of_any_size():
    """Rows of P are one-hot; a key beyond the last would have the highest score, zero, of all."""
    qkv, dout = draw(50, 50, 1, 64)
    qkv[..., :64], qkv[..., 64:128] = 30.0, -qkv[..., 64:128].abs()
    for tensor in compare(qkv, dout, 1, torch.float32):
        assert tensor.isfinite().all()


def test_the_kept_sums_are_those_of_the_scores():
    qkv, _ = draw(50, 50)
    q, k, _ = ops.split_heads(qkv, 2)
    want = torch.logsumexp(q[:, :, :20] @ k.mT / 4, -1)
    torch.testing.assert_close(_attention(qkv.float(), 2, 20)[1].double() * math.log(2), want, rtol=1e-6, atol=1e-6)


def test_the_same_bits_twice_and_for_a_copy_of_other_strides():
    qkv, dout = draw(65, 65)
    for one, *others in zip(
        results(packed_attention, qkv, dout, 2, torch.float16),
        results(packed_attention, qkv, dout, 2, torch.float16),
        results(packed_attention, qkv.mT.contiguous().mT, dout.contiguous(), 2, torch.float16),
        strict=True,
    ):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("queries", [pytest.param(17, marks=pytest.mark.slow), 5])
def test_opcheck(queries):
    qkv, dout = (t.float() for t in draw(17, queries))
    torch.library.opcheck(_attention, (qkv.requires_grad_(), 2, queries))
    torch.library.opcheck(_backward, (dout, qkv.detach(), *(t.detach() for t in _attention(qkv, 2, queries))))


def test_one_graph():
    qkv, dout = (t.float() for t in draw(17, 17))
    qkv.requires_grad_()
    compiled = torch.compile(lambda qkv: attention(2 * qkv, 2), fullgraph=True, backend="aot_eager")
    for got, want in zip(
        *((o, *torch.autograd.grad(o, qkv, dout)) for o in (compiled(qkv), attention(2 * qkv, 2))), strict=True
    ):
        assert torch.equal(got, want)


def test_a_model_runs_with_it():
    vit = tiny_vit(num_heads=1).requires_grad_(False)
    vit.keep_queries(1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for module in (ops, fused_packed):
        ops.use_ops(vit, module)
        tokens = vit(images)
        found.append((tokens, *torch.autograd.grad(tokens.square().sum(), images)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


FAULTS = {  # what is wrong: (tokens, queries, text in the source, its replacement)
    "scale of O": (17, 17, "scale: tl.constexpr = hd**-0.5 * LOG2E", "scale: tl.constexpr = hd**-0.5"),
    "scale of dk": (17, 17, "dk * scale, 0", "dk, 0"),
    "keys beyond the last": (
        20,
        20,
        's = _within(tl.dot(queries, tl.trans(k), input_precision="ieee") * scale, first, N - 1, STEP)',
        "s = tl.dot(queries, tl.trans(k)) * scale",
    ),
    "keys beyond the last for the class token": (
        20,
        1,
        "s = _within(_times(k, q0) * scale, first, N - 1, STEP)",
        "s = _times(k, q0) * scale",
    ),
    "class token's query left out of dk": (17, 17, "dk, dv = ds0", "dk, dv = 0.0 * ds0"),
    "class token's query left out of dv": (17, 17, "p0[:, None] * do0", "0.0 * p0[:, None] * do0"),
    "class token's key left out of dq": (17, 17, "dqs = ds0", "dqs = 0.0 * ds0"),
    "class token with itself left out of dk": (17, 1, "ds00 * q0", "0.0 * q0"),
    "class token's dq from the last keys alone": (65, 65, "dq0 += ", "dq0 = "),
    "class token's dk from the last queries alone": (65, 65, "dk0 += ", "dk0 = "),
    "dk from the last queries alone": (65, 65, "queries, dk, ", "queries, "),
    "rowsum(O dO) left out of dq": (17, 17, " - delta[:, None]", ""),
    "rowsum(O dO) left out of dk": (17, 17, " - delta[None, :]", ""),
    "dq of what is no query left unwritten": (17, 5, "if Q < N", "if False"),
    "last row left unwritten": (18, 18, "(offs < stop)", "(offs < stop - 1)"),
    "heads exchanged": (17, 17, "* (Q * D) + (head % nh) * hd", "* (Q * D) + (nh - 1 - head % nh) * hd"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, tmp_path, monkeypatch):
    tokens, queries, text, replacement = FAULTS[name]
    with open(packed_triton.__file__) as file:
        source = file.read()
    assert text in source
    (tmp_path / "planted.py").write_text(source.replace(text, replacement))
    spec = importlib.util.spec_from_file_location("planted", tmp_path / "planted.py")
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(packed_attention, "packed_triton", planted)
    with pytest.raises(AssertionError):
        compare(*draw(tokens, queries, batch=1), 2, torch.float16)
