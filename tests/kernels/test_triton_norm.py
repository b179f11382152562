"""The residual step's Triton kernels, interpreted on the CPU (see test_triton.py), by its operator and in a block."""

import sys

import pytest
import torch
from precision import assert_as_precise, poison, with_fault
from test_residual import NAMES, assert_a_vit_is_the_same, draw, plain, results

from vitface.kernels import frozen, lora_linear, norm, residual
from vitface.model.ops import residual_norm

CASES = [  # M, D, K, R (0: no adapter follows), a branch, LayerScale, contiguous
    (1, 64, 3, 16, True, True, True),
    (17, 64, 1, 4, True, True, False),
    (33, 96, 2, 4, True, False, True),
    (17, 96, 3, 4, False, False, True),
    (9, 384, 1, 16, True, True, True),
    (19, 96, 2, 16, True, True, False),
    (17, 384, 3, 16, True, False, False),
    (15, 384, 8, 16, True, True, True),
    (5, 96, 8, 4, False, False, False),
    (33, 64, 0, 0, True, True, True),
    (17, 384, 0, 0, True, False, True),
    (7, 384, 0, 0, False, False, False),
]


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    for module in (frozen, lora_linear, residual):
        monkeypatch.setattr(module, "runs_triton", lambda x: True)


def check(case, dtype):
    tensors = [None if t is None else t.to(dtype).double() for t in draw(case)]
    exact, eager = (results(tensors, kind, plain) for kind in (torch.float64, dtype))
    fused = results(tensors, dtype, residual_norm, contiguous=case[-1])
    assert len(fused) == len(exact)
    for name, want, other, got in zip(NAMES, exact, eager, fused, strict=True):
        if want is not None:
            assert_as_precise(name, want, want, other, got, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_is_at_most_twice_that_of_eager(case, dtype):
    check(case, dtype)


def test_rows_far_from_zero(monkeypatch):
    """A sum of squares would lose all digits here; float16 has them in x, and the statistics are float32."""
    tensors = [None if t is None else t.double() for t in draw((17, 384, 0, 0, False, False, True))]
    tensors[0] += 3000
    exact, eager, fused = (
        results([None if t is None else t.float().double() for t in tensors], kind, function)
        for kind, function in ((torch.float64, plain), (torch.float32, plain), (torch.float32, residual_norm))
    )
    for name, want, other, got in zip(NAMES, exact, eager, fused, strict=True):
        if want is not None:
            assert_as_precise(name, want, want, other, got, torch.float32)


def test_nothing_read_from_fresh_memory(monkeypatch):
    poison(monkeypatch)
    for case in CASES[:2] + CASES[3:4]:
        check(case, torch.float32)


def test_an_adapter_wider_than_a_tile(monkeypatch):
    monkeypatch.setattr(norm, "TILE_OF_A", 512)
    assert norm._sizes(torch.empty(1, 96), torch.empty(48, 96))["BLOCK_D"] == 16
    check((17, 96, 3, 16, True, True, True), torch.float32)


@pytest.mark.parametrize("changes", [{}, {"act": "quick_gelu", "layer_scale": False}])
def test_a_vit_of_fused_blocks_is_the_same(changes, monkeypatch):
    assert_a_vit_is_the_same(monkeypatch, torch.float32, **changes)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("delta * delta * (first * share)", "0.0"),
        ("mean += delta * share", "mean += delta * 0.5"),
        ("tl.where(inside, total - part[:, None], 0.0)", "total - part[:, None]"),
        (".to(x_ptr.dtype.element_ty).to(tl.float32)\n    return total", "\n    return total * 1.0001"),
        ("- normal * along[:, None]", ""),
        ("- plain[:, None]", ""),
        ("dh = tl.dot(dlow, a, dh", "dh = tl.dot(dlow, a, dh * 0.999"),
        ("dx += tl.load(dsum_ptr", "dx += 0 * tl.load(dsum_ptr"),
        ("dx * gamma[None, :]", "dx"),
        ("mask=(row < rows)[:, None] & (c < C)[None, :])", "mask=(row < rows - 1)[:, None] & (c < C)[None, :])"),
    ],
)
def test_planted_faults_are_caught(right, wrong, tmp_path, monkeypatch):
    faulty = with_fault(norm, tmp_path, right, wrong)
    monkeypatch.setitem(sys.modules, "vitface.kernels.norm", faulty)
    monkeypatch.setattr("vitface.kernels.norm", faulty)
    poison(monkeypatch)
    with pytest.raises(AssertionError, match=r"(sum|h|low|dx|dy|dA): "):
        check((9, 384 if "delta" in right else 96, 3, 4, True, True, True), torch.float32)
