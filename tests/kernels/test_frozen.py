"""The frozen layers' kernels against float64, beside eager PyTorch in the same dtype."""

import typing

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config
from hypothesis import given
from hypothesis import strategies as st
from precision import assert_as_precise, poison

from vitface.kernels import frozen, fused
from vitface.model import ops
from vitface.model.vit import Mlp
from vitface.presets import Act

ACTS = typing.get_args(Act)
cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "tokens": st.sampled_from([1, 2, 17, 50]),
        "width": st.sampled_from([1, 8, 33, 64]),
        "act": st.sampled_from(ACTS),
        "contiguous": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)
SMALL = {"batch": 2, "tokens": 3, "width": 4, "act": "gelu", "contiguous": True, "seed": 0}


def draw(case):
    """float64 x, w1, b1, w2, b2, dy."""
    generator = torch.Generator().manual_seed(case["seed"])
    batch, tokens, d = case["batch"], case["tokens"], case["width"]
    hidden = 8 * d if case["act"] == "swiglu" else 4 * d
    shapes = ((batch, tokens, d), (hidden, d), (hidden,), (d, 4 * d), (d,), (batch, tokens, d))
    x, w1, b1, w2, b2, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, w1 * d**-0.5, b1, w2 * (4 * d) ** -0.5, b2, dy


def results(tensors, case, dtype, module):
    """Output and gradient by name, in float64."""
    x, *weights, dy = (t.to(dtype) for t in tensors)
    if not case["contiguous"]:
        x, dy = (t.mT.contiguous().mT for t in (x, dy))
    y = module.mlp(x.requires_grad_(), *weights, case["act"])
    return {"y": y.detach().double(), "x": torch.autograd.grad(y, x, dy)[0].double()}


@given(cases)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_eager(dtype, case):
    tensors = [t.to(dtype).double() for t in draw(case)]
    exact = results(tensors, case, torch.float64, ops)
    size = results([t.abs() for t in tensors], case, torch.float64, ops)
    plain, ours = (results(tensors, case, dtype, module) for module in (ops, fused))
    for name in exact:
        assert_as_precise(name, exact[name], size[name], plain[name], ours[name], dtype)


@given(cases)
def test_float64_is_the_formula(case):
    want, got = (results(draw(case), case, torch.float64, module) for module in (ops, fused))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@given(cases)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gradient_it_is_the_same(dtype, case):
    x, *weights, _ = (t.to(dtype) for t in draw(case))
    if not case["contiguous"]:
        x = x.mT.contiguous().mT
    square = weights[2][:, : x.shape[-1]]
    with torch.no_grad():
        for name, arguments in (("mlp", (x, *weights, case["act"])), ("linear", (x, square, weights[3]))):
            reference, fast = getattr(ops, name), getattr(fused, name)
            exact = reference(*(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
            size = reference(*(t.double().abs() if isinstance(t, torch.Tensor) else t for t in arguments))
            assert_as_precise(name, exact, size, reference(*arguments).double(), fast(*arguments).double(), dtype)


@pytest.mark.parametrize("act", ACTS)
def test_gradcheck_and_opcheck(act):
    x, *weights, dy = draw({**SMALL, "act": act})
    assert torch.autograd.gradcheck(lambda x: fused.mlp(x, *weights, act), x.requires_grad_())
    torch.library.opcheck(frozen._mlp, (x, *weights, act))
    u = F.linear(x.detach(), *weights[:2])
    torch.library.opcheck(frozen._backward, (dy, u, weights[0], weights[2], act))
    torch.library.opcheck(frozen._linear, (x.detach(), *weights[:2]))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, inside inductor
def test_compiled_equals_eager():
    x, *weights, dy = draw(SMALL)
    x.requires_grad_()

    def layer(x):
        with torch.no_grad():
            early = fused.linear(x, weights[2].mT, None).mean()
        return fused.mlp(2 * x, *weights, "gelu") * early

    y, compiled = layer(x), torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(compiled, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(o, x, dy)[0] for o in (compiled, y)), rtol=0, atol=1e-12)


def test_nothing_read_from_fresh_memory(monkeypatch):
    poison(monkeypatch)
    assert all(t.isfinite().all() for t in results(draw(SMALL), SMALL, torch.float32, fused).values())


def test_keeps_the_hidden_layer_once():
    x, *weights, _ = draw(SMALL)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused.mlp(x.requires_grad_(), *weights, "gelu")
    parameters = {t.data_ptr() for t in weights}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in parameters] == [(2, 3, 16)]


def test_weights_that_train_are_refused():
    module = Mlp(tiny_config(embed_dim=4))
    ops.use_ops(module, fused)
    with pytest.raises(ValueError, match="frozen weights"):
        module(torch.zeros(1, 2, 4))
