"""The attention kernel against float64, beside the formula in the same dtype, for its output and its gradient."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision import assert_as_precise, poison

from vitface.kernels import fused
from vitface.kernels.attention import MAX_TOKENS, _attention, _backward
from vitface.model import ops

cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.sampled_from([1, 2, 17, 50, 65]),
        "heads": st.integers(1, 4),
        "head_dim": st.sampled_from([1, 4, 24, 64]),
        "queries": st.sampled_from([None, 1, 2]),
        "contiguous": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def draw(case):
    """float64 qkv (B, N, 3 D) and dO (B, Q, D)."""
    generator = torch.Generator().manual_seed(case["seed"])
    batch, tokens, width = case["batch"], case["tokens"], case["heads"] * case["head_dim"]
    qkv = torch.randn(batch, tokens, 3 * width, generator=generator, dtype=torch.float64)
    return qkv, torch.randn(batch, min(case["queries"] or tokens, tokens), width, generator=generator, dtype=qkv.dtype)


def results(qkv, dout, case, dtype, module):
    """Output and gradient, in float64."""
    qkv, dout = qkv.to(dtype), dout.to(dtype)
    if not case["contiguous"]:
        qkv, dout = qkv.mT.contiguous().mT, dout.mT.contiguous().mT
    qkv.requires_grad_()
    out = module.attention(qkv, case["heads"], case["queries"] and dout.shape[1])
    return out.detach().double(), torch.autograd.grad(out, qkv, dout)[0].double()


@given(cases)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_eager(dtype, case):
    tensors = [t.to(dtype).double() for t in draw(case)]
    exact = results(*tensors, case, torch.float64, ops)
    eager, ours = (results(*tensors, case, dtype, module) for module in (ops, fused))
    for name, *row in zip(("O", "dqkv"), exact, exact, eager, ours, strict=True):
        assert_as_precise(name, *row, dtype)


@given(cases)
def test_float64_is_the_reference(case):
    for want, got in zip(
        results(*draw(case), case, torch.float64, ops),
        results(*draw(case), case, torch.float64, fused),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


SMALL = {"batch": 2, "tokens": 5, "heads": 2, "head_dim": 3, "queries": None, "contiguous": True, "seed": 0}


@pytest.mark.parametrize("queries", [None, 2])
def test_gradcheck(queries):
    qkv = draw(SMALL)[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: fused.attention(qkv, 2, queries), qkv)


@pytest.mark.parametrize("queries", [5, 2])
def test_opcheck(queries):
    qkv = draw(SMALL)[0].requires_grad_()
    torch.library.opcheck(_attention, (qkv, 2, queries))
    out, heads, p = (t.detach() for t in _attention(qkv, 2, queries))
    torch.library.opcheck(_backward, (torch.ones_like(out), heads, p))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, inside inductor
def test_compiled_equals_eager():
    qkv, dout = draw(SMALL)
    qkv.requires_grad_()

    def layer(qkv):
        return fused.attention(2 * qkv, 2)

    out, compiled = layer(qkv), torch.compile(layer, fullgraph=True)(qkv)
    torch.testing.assert_close(compiled, out, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o, qkv, dout)[0] for o in (compiled, out)), rtol=0, atol=1e-12)


def test_nothing_read_from_fresh_memory(monkeypatch):
    poison(monkeypatch)
    for queries in (None, 2):
        case = {**SMALL, "queries": queries}
        assert all(t.isfinite().all() for t in results(*draw(case), case, torch.float32, fused))


def test_its_input_is_left_alone():
    for case in (SMALL, {**SMALL, "batch": 1, "tokens": 1, "heads": 1}):  # the second needs no copy to split the heads
        qkv, dout = draw(case)
        before, dbefore = qkv.clone(), dout.clone()
        results(qkv, dout, case, torch.float64, fused)
        assert torch.equal(qkv, before) and torch.equal(dout, dbefore)


def test_long_sequences_take_the_devices_own_kernel(monkeypatch):
    called = []
    monkeypatch.setattr("vitface.kernels.attention._attention", lambda *arguments: called.append(arguments) or [None])
    for tokens, ours in ((MAX_TOKENS, 1), (MAX_TOKENS + 1, 0)):
        qkv = torch.randn(1, tokens, 12, generator=torch.Generator().manual_seed(0))
        out = fused.attention(qkv, 2, 3)
        assert len(called) == ours
        if not ours:
            torch.testing.assert_close(out, ops.attention(qkv, 2, 3))
        called.clear()
