"""The fused layer against float64, beside the eager reference in the same dtype, for outputs and every gradient.

Both forms, the CPU's and the GPU's, run here on the CPU.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from precision import assert_as_precise, poison

from vitface.kernels import concatenated, fused
from vitface.kernels.lora_linear import _backward, _lora_linear, forward
from vitface.model import ops

both = pytest.mark.parametrize("module", [fused, concatenated], ids=["cpu", "gpu"])
cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 4),
        "tokens": st.sampled_from([1, 3, 17, 50]),
        "inputs": st.sampled_from([1, 7, 24, 65, 96]),
        "outputs": st.sampled_from([1, 5, 33, 96, 131]),
        "rank": st.sampled_from([4, 5, 16, 64]),
        "domains": st.sampled_from([None, 1, 2, 3, 8]),
        "bias": st.booleans(),
        "contiguous": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


def draw(case):
    """float64 x, weight, bias, a, b, gate and dy; None where the case has no such input."""
    generator = torch.Generator().manual_seed(case["seed"])
    batch, tokens, i, o, rank = (case[key] for key in ("batch", "tokens", "inputs", "outputs", "rank"))
    columns = rank * (case["domains"] or 1)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    bias = normal(o) if case["bias"] else None
    gate = normal(batch, case["domains"]).softmax(1) if case["domains"] else None
    weight, a = normal(o, i) * i**-0.5, normal(columns, i) * i**-0.5
    return normal(batch, tokens, i), weight, bias, a, normal(o, columns), gate, normal(batch, tokens, o)


def results(tensors, dtype, module, contiguous=True):
    """Output and gradients by name, in float64. Under bf16, adapters and gate stay float32, as in training."""
    masters = torch.promote_types(dtype, torch.float32)
    x, weight, bias, a, b, gate, dy = (
        None if t is None else t.to(masters if n in (3, 4, 5) else dtype) for n, t in enumerate(tensors)
    )
    if not contiguous:  # every second column of a wider tensor, and transposed ones
        x = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
        dy = dy.mT.contiguous().mT
    named = {"x": x, "lora_a": a, "lora_b": b, "gate": gate}
    asked = {name: t.requires_grad_() for name, t in named.items() if t is not None}
    y = module.lora_linear(x, weight, bias, a, b, 0.5, gate)
    gradients = torch.autograd.grad(y, tuple(asked.values()), dy)
    return {name: t.double() for name, t in zip(("y", *asked), (y.detach(), *gradients), strict=True)}


@given(cases)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_error_is_at_most_twice_that_of_eager(module, dtype, case):
    tensors = [None if t is None else t.to(dtype).double() for t in draw(case)]
    exact = results(tensors, torch.float64, ops)
    eager = results(tensors, dtype, ops)
    ours = results(tensors, dtype, module, case["contiguous"])
    sizes = results([None if t is None else t.abs() for t in tensors], torch.float64, ops)
    for name in exact:
        assert_as_precise(name, exact[name], sizes[name], eager[name], ours[name], dtype)


@given(cases)
@both
def test_float64_is_the_reference(module, case):
    tensors = draw(case)
    want, got = (results(tensors, torch.float64, each) for each in (ops, module))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


SMALL = {"batch": 2, "tokens": 3, "inputs": 5, "outputs": 4, "rank": 2, "bias": True, "contiguous": True, "seed": 0}


@pytest.mark.parametrize("domains", [None, 1, 3])
@pytest.mark.parametrize("outputs", [4, 9])  # narrower and wider than x, which has 5
@both
def test_gradcheck(module, outputs, domains):
    x, weight, bias, a, b, gate, _ = draw({**SMALL, "outputs": outputs, "domains": domains})
    asked = [t.requires_grad_() for t in (x, a, b, gate) if t is not None]
    assert torch.autograd.gradcheck(
        lambda x, *rest: module.lora_linear(x, weight, bias, *rest[:2], 0.7, *rest[2:]), asked
    )


@pytest.mark.parametrize("domains", [None, 3])
def test_opcheck(domains):
    x, weight, bias, a, b, gate, _ = draw({**SMALL, "domains": domains})
    x, a, b = (t.requires_grad_() for t in (x.flatten(0, 1), a, b))
    torch.library.opcheck(_lora_linear, (x, weight, bias, a, b, 0.7, gate))
    xa = x.detach() @ a.detach().T
    dy = torch.ones(len(x), len(weight), dtype=x.dtype)
    tensors = (dy, x.detach(), weight, a.detach(), b.detach(), 0.7, gate, xa)
    for needs_dx in (True, False):
        torch.library.opcheck(_backward, (*tensors, needs_dx))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, inside inductor
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # and inside dynamo
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@both
def test_compiled_equals_eager(module, backend):
    x, weight, bias, a, b, gate, dy = draw({**SMALL, "outputs": 9, "domains": 3})
    asked = [t.requires_grad_() for t in (x, a, b, gate)]

    def layer(x, a, b, gate):
        return torch.nn.functional.gelu(module.lora_linear(2 * x, weight, bias, a, b, 0.7, gate))

    y, compiled = layer(*asked), torch.compile(layer, backend=backend, fullgraph=True)(*asked)
    torch.testing.assert_close(compiled, y, rtol=0, atol=1e-12)
    for got, want in zip(torch.autograd.grad(compiled, asked, dy), torch.autograd.grad(y, asked, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_nothing_read_from_fresh_memory(monkeypatch):
    poison(monkeypatch)
    tensors = draw({**SMALL, "domains": 3})
    assert all(t.isfinite().all() for t in results(tensors, torch.float32, fused).values())


@both
def test_saves_the_input_and_the_bottleneck_only(module):
    """No tensor as wide as the output, and nothing K times: x and xa, beside parameters and gate."""
    x, weight, bias, a, b, gate, _ = draw({**SMALL, "tokens": 50, "outputs": 33, "domains": 8})
    parameters = {t.data_ptr() for t in (weight, bias, a, b, gate)}
    saved = []
    for t in (x, a, b, gate):
        t.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        module.lora_linear(x, weight, bias, a, b, 0.7, gate)
    kept = sorted(tuple(t.shape) for t in saved if t.data_ptr() not in parameters)
    assert kept == sorted([(100, 5), (100, 8 * SMALL["rank"])])


@both
def test_frozen_inputs_get_no_gradient_and_what_cannot_run_is_refused(module):
    x, weight, bias, a, b, gate, dy = draw({**SMALL, "domains": 2})
    module.lora_linear(x, weight, bias, a.requires_grad_(), b.requires_grad_(), 1.0).backward(dy)
    assert a.grad is not None and x.grad is None and weight.grad is None
    for wrong in (gate[:1], gate[:, :1].repeat(1, 3), gate[0]):
        with pytest.raises(ValueError, match="must be"):
            module.lora_linear(x, weight, bias, a, b, 1.0, wrong)
    with pytest.raises(ValueError, match="frozen"):
        module.lora_linear(x, weight.requires_grad_(), bias, a, b, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_residual_is_added_and_left_alone(dtype):
    """What the prepared model uses: no gradient, rows (M, I)."""
    x, weight, bias, a, b, gate, residual = (t.to(dtype) for t in draw({**SMALL, "outputs": 5, "domains": 3}))
    before = residual.clone()
    y, _ = forward(x.flatten(0, 1), weight, bias, a, b, 0.7, gate, residual.flatten(0, 1))
    want = (residual + ops.lora_linear(x, weight, bias, a, b, 0.7, gate)).flatten(0, 1)
    rounding = 4 * torch.finfo(dtype).eps * want.abs().max()
    torch.testing.assert_close(y, want, rtol=0, atol=float(rounding))
    assert torch.equal(residual, before)


def test_each_device_gets_its_form(monkeypatch):
    called = []
    monkeypatch.setattr(concatenated, "lora_linear", lambda x, *rest: called.append(x.device.type) or x)
    x, weight, bias, a, b, gate, _ = draw({**SMALL, "outputs": 5, "domains": 3})
    fused.lora_linear(x, weight, bias, a, b, 0.7, gate)
    assert called == []
    fused.lora_linear(x.to("meta"), weight, bias, a, b, 0.7, gate)
    assert called == ["meta"]
