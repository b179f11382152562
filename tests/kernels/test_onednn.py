"""oneDNN's private operators, and the public ones that replace them, against the formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from vitface.kernels import onednn
from vitface.model.ops import activate

OPERATORS = ("_linear_pointwise", "_reorder_linear_weight", "_is_mkldnn_bf16_supported")


class Without:
    """A namespace of operators that lacks one of them."""

    def __init__(self, namespace, missing):
        self.namespace, self.missing = namespace, missing

    def __getattr__(self, name):
        if name == self.missing:
            raise AttributeError(name)
        return getattr(self.namespace, name)


class OtherArguments(Without):
    """A namespace in which one operator takes other arguments, as that of another version of torch may."""

    def __getattr__(self, name):
        found = getattr(self.namespace, name)
        return (lambda: None) if name == self.missing else found


@pytest.fixture(params=[None, *((kind, name) for kind in (Without, OtherArguments) for name in OPERATORS[:2])])
def torch_of_any_kind(request, monkeypatch):
    """torch as it is, and with each operator removed or changed; the value says whether it is changed."""
    if request.param is not None:
        kind, name = request.param
        monkeypatch.setattr(torch.ops, "mkldnn", kind(torch.ops.mkldnn, name))
    onednn._onednn_works.cache_clear()
    yield request.param is not None
    onednn._onednn_works.cache_clear()


def draw(dtype):
    """x (2, 5, 8), weight (6, 8), bias (6), residual (2, 5, 6)."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 5, 8), (6, 8), (6,), (2, 5, 6)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_with_and_without_the_private_operators(torch_of_any_kind, dtype):
    x, weight, bias, residual = draw(dtype)
    packed = onednn.pack(weight)
    assert (packed is weight) if torch_of_any_kind or dtype == torch.float64 else packed.is_mkldnn
    y = F.linear(x.double(), weight.double(), bias.double())
    without_bias = F.linear(x.double(), weight.double())
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for w in (weight, packed):
        torch.testing.assert_close(onednn.product(x, w, bias).double(), y, **close)
        torch.testing.assert_close(onednn.product(x, w, None).double(), without_bias, **close)
        strided = residual.mT.contiguous().mT
        torch.testing.assert_close(onednn.product(x, w, bias, strided).double(), y + residual.double(), **close)
        for act in ("gelu", "gelu_tanh", "quick_gelu", "relu6", "swiglu"):
            torch.testing.assert_close(onednn.activated_product(x, w, bias, act).double(), activate(y, act), **close)


def test_without_the_answer_on_bfloat16_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", Without(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"))
    onednn._onednn_works.cache_clear()
    assert not onednn._onednn_works()
    onednn._onednn_works.cache_clear()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
def test_the_private_operators_serve_this_torch():
    assert onednn._onednn_works()


def test_no_rows_are_no_error():
    x, weight, bias, _ = draw(torch.float32)
    assert onednn.product(x[:0], weight, bias).shape == (0, 5, 6)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_of_softmax(monkeypatch, dtype, private):
    if not private:
        monkeypatch.setattr(torch.ops, "aten", Without(torch.ops.aten, "_softmax_backward_data"))
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64).requires_grad_()
    dp = torch.randn(3, 4, 7, generator=generator, dtype=torch.float64).to(dtype)
    (want,) = torch.autograd.grad(torch.softmax(scores, -1), scores, dp.double())
    got = onednn.softmax_backward_(dp, torch.softmax(scores, -1).detach().to(dtype))
    assert got.data_ptr() == dp.data_ptr()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps)
