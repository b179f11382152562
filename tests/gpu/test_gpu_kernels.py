"""The Triton kernels on a GPU: the oracles of tests/kernels, in every dtype, at the sizes of a ViT.

python -m pytest -m gpu
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # its oracle

from precision import assert_as_precise

from vitface.model.ops import activate, frozen_mlp, lora_linear, residual_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),  # Triton 3.9 announces 3.10
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = {384: 257, 768: 197, 96: 17}  # by width: both presets at 224 px, and something small


@pytest.fixture(autouse=True)
def triton():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    pytest.importorskip("triton")


def normal(*shape, seed, dtype, size=1.0):
    """float64 values that `dtype` has."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return (size * torch.randn(shape, generator=generator, device="cuda", dtype=torch.float64)).to(dtype).double()


def results(function, tensors, masters, grads, dtype):
    """Outputs and gradients in float64. `masters` (name -> tensor) stay float32 at least, as in training."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {name: t.to(wide if name in masters else dtype).requires_grad_() for name, t in tensors.items()}
    outputs = function(**leaves)
    found = torch.autograd.grad(outputs, list(leaves.values()), [g.to(dtype) for g in grads])
    names = [*(f"output {n}" for n in range(len(outputs))), *(f"d {name}" for name in leaves)]
    return {name: t.detach().double() for name, t in zip(names, (*outputs, *found), strict=True)}


def compare(plain, fused, tensors, grads, dtype, masters=(), sizes=None):
    exact, eager = (results(plain, tensors, masters, grads, kind) for kind in (torch.float64, dtype))
    got = results(fused, tensors, masters, grads, dtype)
    for name, want in exact.items():
        assert_as_precise(name, want, (sizes or {}).get(name, want), eager[name], got[name], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("width", TOKENS)
def test_mlp(width, act, dtype):
    w1, w2 = (normal(*s, seed=0, dtype=dtype, size=s[1] ** -0.5) for s in ((4 * width, width), (width, 4 * width)))
    b1, b2 = (normal(n, seed=1, dtype=dtype) for n in (4 * width, width))
    x, dy = (normal(3, TOKENS[width], width, seed=s, dtype=dtype) for s in (2, 3))

    def cast(x):
        return [t.to(x.dtype) for t in (w1, b1, w2, b2)]

    def plain(x):
        weights = cast(x)
        return [F.linear(activate(F.linear(x, *weights[:2]), act), *weights[2:])]

    compare(plain, lambda x: [frozen_mlp(x, *cast(x), act)], {"x": x}, [dy], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("domains", "rank"), [(None, 16), (1, 4), (3, 16), (8, 16), (3, 64)])
@pytest.mark.parametrize("width", TOKENS)
def test_residual_step_and_the_adapted_layer_behind_it(width, domains, rank, dtype):
    columns, tokens = rank * (domains or 1), TOKENS[width]
    gamma, scale, shift = (normal(width, seed=s, dtype=dtype) for s in range(3))
    weight, bias = (
        normal(3 * width, width, seed=3, dtype=dtype, size=width**-0.5),
        normal(3 * width, seed=4, dtype=dtype),
    )
    x, y = (normal(3, tokens, width, seed=s, dtype=dtype, size=3) for s in (5, 6))
    a = normal(columns, width, seed=7, dtype=dtype, size=width**-0.5)
    tensors = {"x": x, "y": y, "a": a, "b": normal(3 * width, columns, seed=8, dtype=dtype)}
    if domains:
        tensors["gate"] = normal(3, domains, seed=9, dtype=dtype).softmax(1).to(dtype).double()
    grads = [normal(3, tokens, n * width, seed=9 + n, dtype=dtype) for n in (1, 3)]

    def norm(x):
        layer = torch.nn.LayerNorm(width, eps=1e-6)
        layer.weight, layer.bias = (torch.nn.Parameter(t.to(x.dtype), requires_grad=False) for t in (scale, shift))
        return layer

    def plain(x, y, a, b, gate=None):
        total = x + y * gamma.to(x.dtype)
        h = norm(x)(total)
        return total, lora_linear(h, weight.to(x.dtype), bias.to(x.dtype), a, b, 0.5, gate, impl="reference")

    def fused(x, y, a, b, gate=None):
        total, h, low = residual_norm(x, y, gamma.to(x.dtype), norm(x), a)
        frozen = weight.to(x.dtype), bias.to(x.dtype)
        return total, lora_linear(h, *frozen, a, b, 0.5, gate, low=low, impl="fused")

    sizes = {}
    if domains:  # few sums of many terms
        terms = (grads[1] @ tensors["b"]).abs() * (norm(x)(x + y * gamma) @ a.mT).abs()
        sizes["d gate"] = 0.5 * terms.unflatten(2, (domains, rank)).sum((1, 3))
    compare(plain, fused, tensors, grads, dtype, ("a", "b", "gate"), sizes)


def test_two_runs_agree_to_the_bit():
    """Nothing is added atomically."""
    x, dy = (normal(8, 257, 384, seed=s, dtype=torch.bfloat16).bfloat16() for s in (0, 1))
    a, b = normal(48, 384, seed=2, dtype=torch.float32).float(), normal(384, 48, seed=3, dtype=torch.float32).float()
    weight = normal(384, 384, seed=4, dtype=torch.bfloat16).bfloat16()
    gate = normal(8, 3, seed=5, dtype=torch.float32).softmax(1).float()
    norm = torch.nn.LayerNorm(384, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    runs = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (x, a, b, gate)]
        _, h, low = residual_norm(leaves[0], None, None, norm, leaves[1])
        y = lora_linear(h, weight, None, leaves[1], leaves[2], 0.5, leaves[3], low=low, impl="fused")
        runs.append((y, *torch.autograd.grad(y, leaves, dy)))
    for later in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], later, strict=True))


def test_float64_keeps_its_precision():
    x = normal(2, 5, 384, seed=0, dtype=torch.float64)
    norm = torch.nn.LayerNorm(384, device="cuda", dtype=torch.float64).requires_grad_(False)
    torch.testing.assert_close(residual_norm(x, x, None, norm, None)[1], norm(2 * x), rtol=1e-12, atol=1e-12)
