"""The residual step against the plain formula and its derivatives by autograd, and blocks that are made of it."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_adapters, tiny_vit

from vitface.kernels.residual import _backward, _residual_norm
from vitface.model.lora import TARGETS, add_lora, use_impl
from vitface.model.ops import lora_linear, residual_norm

NAMES = ("sum", "h", "low", "dx", "dy", "dA")
CASES = [  # M, D, K, R (0: no adapter follows), a branch, LayerScale, contiguous
    (5, 7, 3, 2, True, True, True),
    (4, 6, 1, 4, True, False, False),
    (3, 5, 2, 2, False, False, True),
    (1, 4, 0, 0, True, True, True),
    (6, 3, 0, 0, False, False, False),
]


def draw(case):
    """float64 x, y, gamma, weight, bias, A, and the gradients of x', h, low; None where the case has no such tensor."""
    rows, width, domains, rank, branch, scale, _ = case
    generator = torch.Generator().manual_seed(rows * width)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return (
        normal(1, rows, width) * 2 + 1, normal(1, rows, width) if branch else None, normal(width) if scale else None,
        1 + normal(width) / 4, normal(width), normal(domains * rank, width) * width**-0.5 if rank else None,
        normal(1, rows, width), normal(1, rows, width), normal(1, rows, domains * rank) if rank else None,
    )  # fmt: skip


def plain(x, y, gamma, norm, lora_a):
    total = x if y is None else x + (y if gamma is None else y * gamma)
    h = norm(total)
    return total, h, None if lora_a is None else F.linear(h, lora_a.to(h.dtype))


def layer_norm(weight, bias):
    norm = torch.nn.LayerNorm(len(weight), eps=1e-6)
    norm.weight, norm.bias = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    return norm


def results(tensors, dtype, function, contiguous=True):
    """As NAMES, in float64 or None. In half precision A stays float32, as in training."""
    masters = torch.promote_types(dtype, torch.float32)
    x, y, gamma, weight, bias, a, *grads = (
        None if t is None else t.to(masters if n == 5 else dtype) for n, t in enumerate(tensors)
    )
    if not contiguous:  # every second column of a wider tensor
        x, y, *grads = (
            None if t is None else torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for t in (x, y, *grads)
        )
    leaves = [None if t is None else t.requires_grad_() for t in (x, y, a)]
    outputs = function(*leaves[:2], gamma, layer_norm(weight, bias), leaves[2])
    asked = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([o for o in outputs if o is not None], asked, [g for g in grads if g is not None]))
    derivatives = [None if t is None else next(found) for t in leaves]
    return [None if t is None else t.detach().double() for t in (*outputs, *derivatives)]


def assert_same(want, got, **tolerance):
    for name, a, b in zip(NAMES, want, got, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(b, a, **tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_the_formula(case):
    want, got = (results(draw(case), torch.float64, f, case[-1]) for f in (plain, residual_norm))
    assert_same(want, got, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("read", [(0,), (1,), (2,), (0, 2)])
def test_outputs_that_nobody_reads(read):
    found = []
    for function in (plain, residual_norm):
        x, y, gamma, weight, bias, a, *grads = draw(CASES[0])
        leaves = [t.requires_grad_() for t in (x, y, a)]
        outputs = function(*leaves[:2], gamma, layer_norm(weight, bias), leaves[2])
        asked = [outputs[n] for n in read], leaves, [grads[n] for n in read]
        found.append(torch.autograd.grad(*asked, materialize_grads=True))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    x, y, gamma, weight, bias, a, dsum, dh, dlow = (
        None if t is None else t.flatten(0, t.dim() - 2) for t in draw(case)
    )
    asked = [None if t is None else t.requires_grad_() for t in (x, y, a)]
    torch.library.opcheck(_residual_norm, (*asked[:2], gamma, weight, bias, 1e-6, asked[2]))
    x, y, a = (None if t is None else t.detach() for t in asked)
    total, _, _, mean, rstd = _residual_norm(x, y, gamma, weight, bias, 1e-6, a)
    inputs = (None if y is None else dsum, dh, dlow, x if y is None else total, gamma, weight, mean, rstd, a)
    torch.library.opcheck(_backward, inputs)


@pytest.mark.parametrize("domains", [None, 3])
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_a_layer_that_is_given_its_bottleneck(impl, domains):
    generator = torch.Generator().manual_seed(0)
    x, dy, weight, b, a = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 5), (2, 3, 4), (4, 5), (4, 6), (6, 5))
    )
    gate = torch.rand(2, domains, generator=generator, dtype=torch.float64).requires_grad_() if domains else None
    residual = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    asked = [t.requires_grad_() for t in (x, a, b, residual, gate) if t is not None]
    rows = []
    for low, how in ((None, "reference"), (F.linear(x, a), impl)):
        y = lora_linear(x, weight, None, a, b, 0.5, gate, low=low, residual=residual, impl=how)
        rows.append([y, *torch.autograd.grad(y, asked, dy)])
    for want, got in zip(*rows, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def assert_a_vit_is_the_same(monkeypatch, dtype, **changes):
    """Output and every gradient of a ViT of fused blocks, all layers adapted, in its last block CLS alone."""
    vit = tiny_vit(**changes).requires_grad_(False)
    add_lora(vit, TARGETS["attn+mlp"], rank=4, alpha=8.0, num_domains=3, generator=torch.Generator().manual_seed(0))
    randomise_adapters(vit)
    vit.to(dtype)
    generator = torch.Generator().manual_seed(1)
    x, dout = (torch.randn(2, n, 16, generator=generator, dtype=dtype) for n in (17, 1))
    gate = torch.rand(2, 3, generator=generator, dtype=dtype)
    asked = [t.requires_grad_() for t in (x, gate, *(p for n, p in vit.named_parameters() if "lora_" in n))]
    found = []
    for impl in ("reference", "fused"):
        use_impl(vit, impl)
        monkeypatch.setattr("vitface.model.vit.fuses_residuals", lambda impl, x: impl == "fused")
        with torch.no_grad():
            early = vit.blocks[0](x, adapted=False)
        out = vit.encode(x, gate, queries=1)
        found.append([early, out, *torch.autograd.grad(out, asked, dout)])
    assert len(found[0]) == 2 + 2 + 2 * 4 * len(vit.blocks)
    scale = 1e-10 if dtype == torch.float64 else 2e-4
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=scale, atol=scale * want.abs().max().item())


@pytest.mark.parametrize("changes", [{}, {"act": "quick_gelu", "layer_scale": False}])
def test_a_vit_of_fused_blocks_is_the_same(changes, monkeypatch):
    assert_a_vit_is_the_same(monkeypatch, torch.float64, **changes)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, inside inductor
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_fused_blocks_compile_as_one_graph(monkeypatch, backend):
    """Output and every gradient as without; `fullgraph` raises where the compiler would have to stop."""
    monkeypatch.setattr("vitface.model.vit.fuses_residuals", lambda impl, x: True)
    vit = tiny_vit().requires_grad_(False)
    add_lora(vit, TARGETS["attn"], rank=4, alpha=8.0, num_domains=2, generator=torch.Generator().manual_seed(0))
    randomise_adapters(vit)
    use_impl(vit, "fused")
    generator = torch.Generator().manual_seed(1)
    x, dout = torch.randn(2, 2, 17, 16, generator=generator)
    gate = torch.rand(2, 2, generator=generator)
    asked = [t.requires_grad_() for t in (x, gate, *(p for n, p in vit.named_parameters() if "lora_" in n))]
    torch._dynamo.reset()
    found = []
    for encode in (vit.encode, torch.compile(vit.encode, backend=backend, fullgraph=True)):
        out = encode(x, gate)
        # not the sum of squares: after the last norm that hardly changes, and its gradient is rounding
        found.append([out, *torch.autograd.grad(out, asked, dout)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_a_block_on_the_cpu_is_the_plain_equations(monkeypatch):
    monkeypatch.setattr("vitface.model.vit.fused_block", None)
    vit = tiny_vit().requires_grad_(False)
    use_impl(vit, "fused")
    assert vit.blocks[0](torch.zeros(1, 17, 16)).shape == (1, 17, 16)


def test_norms_that_train_are_refused():
    x, norm = torch.zeros(1, 2, 4), torch.nn.LayerNorm(4)
    with pytest.raises(ValueError, match="impl 'fused' is for frozen weights"):
        residual_norm(x, None, None, norm, None)
    with pytest.raises(ValueError, match="impl 'fused' is for frozen weights"):
        residual_norm(x, x, torch.ones(4, requires_grad=True), norm.requires_grad_(False), None)
