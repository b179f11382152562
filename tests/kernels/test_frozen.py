"""The frozen layers' kernels against float64, beside eager PyTorch in the same dtype."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from precision import assert_as_precise, poison

from vitface.kernels import frozen
from vitface.model.lora import use_impl
from vitface.model.ops import activate, frozen_mlp, linear
from vitface.model.vit import Mlp

cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.sampled_from([1, 2, 17, 50]),
        "width": st.sampled_from([1, 8, 33, 64]),
        "act": st.sampled_from(["gelu", "quick_gelu"]),
        "residual": st.booleans(),
        "contiguous": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)
SMALL = {"batch": 2, "tokens": 3, "width": 4, "act": "gelu", "residual": True, "contiguous": True, "seed": 0}


def draw(case):
    """float64 x, w1, b1, w2, b2, residual or None, dy."""
    generator = torch.Generator().manual_seed(case["seed"])
    batch, tokens, d = case["batch"], case["tokens"], case["width"]
    shapes = ((batch, tokens, d), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (batch, tokens, d), (batch, tokens, d))
    x, w1, b1, w2, b2, residual, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, w1 * d**-0.5, b1, w2 * (4 * d) ** -0.5, b2, residual if case["residual"] else None, dy


def eager(x, w1, b1, w2, b2, act, residual=None):
    y = F.linear(activate(F.linear(x, w1, b1), act), w2, b2)
    return y if residual is None else residual + y


def results(tensors, case, dtype, function):
    """Output and gradients by name, in float64."""
    x, *weights, residual, dy = (None if t is None else t.to(dtype) for t in tensors)
    if not case["contiguous"]:
        x, residual, dy = (None if t is None else t.mT.contiguous().mT for t in (x, residual, dy))
    asked = {name: t.requires_grad_() for name, t in (("x", x), ("residual", residual)) if t is not None}
    y = function(x, *weights, case["act"], residual)
    gradients = torch.autograd.grad(y, tuple(asked.values()), dy)
    return {name: t.double() for name, t in zip(("y", *asked), (y.detach(), *gradients), strict=True)}


@given(cases)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_eager(dtype, case):
    tensors = [None if t is None else t.to(dtype).double() for t in draw(case)]
    exact = results(tensors, case, torch.float64, eager)
    size = results([None if t is None else t.abs() for t in tensors], case, torch.float64, eager)
    plain, fused = (results(tensors, case, dtype, function) for function in (eager, frozen_mlp))
    for name in exact:
        assert_as_precise(name, exact[name], size[name], plain[name], fused[name], dtype)


@given(cases)
def test_float64_is_the_formula(case):
    want, got = (results(draw(case), case, torch.float64, function) for function in (eager, frozen_mlp))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@given(cases)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_it_is_the_same(dtype, case):
    x, *weights, residual, _ = (None if t is None else t.to(dtype) for t in draw(case))
    if not case["contiguous"]:
        x, residual = (None if t is None else t.mT.contiguous().mT for t in (x, residual))
    square = weights[2][:, : x.shape[-1]]
    with torch.no_grad():
        for name, function, arguments in (
            ("mlp", (eager, frozen_mlp), (x, *weights, case["act"], residual)),
            ("linear", (added, partial(added, impl="fused")), (x, square, weights[3], residual)),
        ):
            exact = function[0](*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
            size = function[0](*(t.double().abs() if isinstance(t, torch.Tensor) else t for t in arguments))
            plain, fused = (f(*arguments).double() for f in function)
            assert_as_precise(name, exact, size, plain, fused, dtype)


def added(x, weight, bias, residual, impl="reference"):
    return linear(x, weight, bias, residual=residual, impl=impl)


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_gradcheck_and_opcheck(act):
    x, *weights, residual, dy = draw(SMALL)
    asked = x.requires_grad_(), residual.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, residual: frozen_mlp(x, *weights, act, residual), asked)
    for last in (None, residual):
        torch.library.opcheck(frozen._mlp, (x, *weights, act, last))
    u = F.linear(x.detach(), *weights[:2])
    torch.library.opcheck(frozen._backward, (dy, u, weights[0], weights[2], act))
    torch.library.opcheck(frozen._linear, (x.detach(), *weights[:2], None))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, inside inductor
def test_compiled_equals_eager():
    x, *weights, residual, dy = draw(SMALL)
    asked = x.requires_grad_(), residual.requires_grad_()

    def layer(x, residual):
        with torch.no_grad():
            early = linear(x, weights[2].mT, None, impl="fused").mean()
        return frozen_mlp(2 * x, *weights, "gelu", 3 * residual) * early

    y, compiled = layer(*asked), torch.compile(layer, fullgraph=True)(*asked)
    torch.testing.assert_close(compiled, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o, asked, dy) for o in (compiled, y)), rtol=0, atol=1e-12)


def test_nothing_read_from_fresh_memory(monkeypatch):
    poison(monkeypatch)
    assert all(t.isfinite().all() for t in results(draw(SMALL), SMALL, torch.float32, frozen_mlp).values())


def test_keeps_the_hidden_layer_once():
    x, *weights, residual, _ = draw(SMALL)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        frozen_mlp(x.requires_grad_(), *weights, "gelu", residual)
    parameters = {t.data_ptr() for t in weights}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in parameters] == [(2, 3, 16)]


def test_weights_that_train_are_refused():
    module = Mlp(4, "gelu")
    use_impl(module, "fused")
    with pytest.raises(ValueError, match="impl 'fused' is for frozen weights"):
        module(torch.zeros(1, 2, 4))
