"""The activation's Triton kernels, interpreted on the CPU (see test_triton.py), inside the MLP and alone."""

import pytest
import torch
from precision import assert_as_precise, poison, with_fault
from test_frozen import draw, eager, results

from vitface.kernels import activation, frozen
from vitface.model.ops import activate, frozen_mlp

DTYPES = (torch.float32, torch.float16)
ACTS = ("gelu", "quick_gelu")


def draw_alone(shape, dtype):
    """u over all that matters of the function, and dh, as float64 values that `dtype` has."""
    generator = torch.Generator().manual_seed(0)
    u, dh = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return (4 * u).to(dtype).double(), dh.to(dtype).double()


def check(kernels, act, dtype, shape=(41, 25), contiguous=True):
    u, dh = draw_alone(shape, dtype)
    found = []
    for kind in (torch.float64, dtype):
        leaf = u.to(kind).requires_grad_()
        h = activate(leaf, act)
        found.append((h.detach().double(), torch.autograd.grad(h, leaf, dh.to(kind))[0].double()))
    own, down = u.to(dtype), dh.to(dtype)
    if not contiguous:
        own, down = (torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for t in (own, down))
    fused = kernels.forward(own, act).double(), kernels.backward(down, own, act).double()
    for name, want, other, got in zip(("h", "du"), *found, fused, strict=True):
        assert_as_precise(name, want, want, other, got, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_error_is_at_most_twice_that_of_eager(act, dtype):
    for shape, contiguous in (((41, 25), True), ((1024,), True), ((3, 11, 31), False), ((33,), False)):
        check(activation, act, dtype, shape, contiguous)


@pytest.mark.parametrize("act", ACTS)
def test_the_gradient_stands_where_it_was_asked_for(act):
    u, dh = (t.float() for t in draw_alone((9, 5), torch.float32))
    assert activation.backward(dh, u, act).data_ptr() == dh.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_inside_the_mlp(act, dtype, monkeypatch):
    monkeypatch.setattr(frozen, "runs_triton", lambda x: True)
    for case in ({"batch": 2, "tokens": 17, "width": 33}, {"batch": 1, "tokens": 3, "width": 64}):
        case = {**case, "act": act, "residual": False, "contiguous": case["batch"] > 1, "seed": 1}
        tensors = [None if t is None else t.to(dtype).double() for t in draw(case)]
        exact = results(tensors, case, torch.float64, eager)
        plain, fused = (results(tensors, case, dtype, function) for function in (eager, frozen_mlp))
        for name in exact:
            assert_as_precise(name, exact[name], exact[name], plain[name], fused[name], dtype)


def test_nothing_read_from_fresh_memory(monkeypatch):
    poison(monkeypatch)
    for act in ACTS:
        check(activation, act, torch.float32)


@pytest.mark.parametrize(
    ("act", "right", "wrong"),
    [
        ("gelu", "inner + u * density", "inner"),
        ("quick_gelu", "* (1 - inner)) if", ") if"),
        ("gelu", "tl.erf(u * 0.7071067811865476)", "tl.erf(u * 0.7072)"),
        ("gelu", "mask=at < size)\n", "mask=at < size - 1)\n"),
    ],
)
def test_planted_faults_are_caught(act, right, wrong, tmp_path):
    with pytest.raises(AssertionError, match=r"(h|du): "):
        check(with_fault(activation, tmp_path, right, wrong), act, torch.float32)
