"""The gate's Triton kernels, interpreted on the CPU (see test_triton.py), inside the adapted layer."""

import sys

import pytest
import torch
from precision import assert_as_precise, poison, with_fault
from test_lora_linear import draw, results

from vitface.kernels import gate, lora_linear

SMALL = {
    "batch": 2, "tokens": 5, "inputs": 24, "outputs": 33, "rank": 4, "domains": 3, "bias": True, "residual": False,
    "seed": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    monkeypatch.setattr(lora_linear, "runs_triton", lambda x: True)


def check(case, dtype, contiguous=True):
    tensors = [None if t is None else t.to(dtype).double() for t in draw(case)]
    exact, eager = (results(tensors, kind, "reference") for kind in (torch.float64, dtype))
    fused = results(tensors, dtype, "fused", contiguous)
    sizes = results([None if t is None else t.abs() for t in tensors], torch.float64, "reference")
    for name in exact:
        assert_as_precise(name, exact[name], sizes[name], eager[name], fused[name], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rank", [4, 16, 5])
@pytest.mark.parametrize("domains", [1, 2, 3, 8])
def test_error_is_at_most_twice_that_of_eager(domains, rank, dtype):
    check({**SMALL, "domains": domains, "rank": rank, "seed": rank}, dtype, contiguous=domains % 2 == 0)


def test_more_tokens_than_a_program_takes_at_a_time(monkeypatch):
    monkeypatch.setattr(gate, "BLOCK_T", 8)
    for tokens in (7, 8, 33):
        check({**SMALL, "tokens": tokens}, torch.float32)


def test_nothing_read_from_fresh_memory(monkeypatch):
    poison(monkeypatch)
    check(SMALL, torch.float32)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("domain = at % (K * R) // R", "domain = at % K"),
        ("image = at // (K * R) // tokens", "image = at * 0"),
        ("tl.sum(tl.sum(total, 1), 0) * scaling", "tl.sum(tl.sum(total, 1), 0)"),
        ("dgated * g, mask", "dgated, mask"),
        ("(token < tokens)[:, None]", "(token < tokens - 1)[:, None]"),
    ],
)
def test_planted_faults_are_caught(right, wrong, tmp_path, monkeypatch):
    faulty = with_fault(gate, tmp_path, right, wrong)
    monkeypatch.setitem(sys.modules, "vitface.kernels.gate", faulty)
    monkeypatch.setattr("vitface.kernels.gate", faulty)
    poison(monkeypatch)
    with pytest.raises(AssertionError, match=r"(y|x|lora_a|lora_b|gate): "):
        check(SMALL, torch.float32)
