"""docs/scaling.md holds what benchmarks/scaling.py computes, and that is what the parts it adds up are."""

import sys
from pathlib import Path

import pytest
import torch

from vitface.config import resolve
from vitface.model.margin import CosFace
from vitface.training.ranks.identities import ShardedMargin
from vitface.training.setup import build_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402


@pytest.fixture(scope="module")
def models():
    return [scaling.measure(backbone) for backbone in ("dinov2_vits14", "clip_vitb16")]


def test_the_tables_of_the_page_are_computed(models):
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in (scaling.disk_table(), scaling.memory_table(models, 128)):
        assert table in page
    assert "| dinov2_vits14 | 33 + 6 | 35 + 12 | 36 + 24 | 37 + 50 |" in scaling.traffic_table(models, 128)


def test_the_bytes_are_those_of_the_tensors(models):
    config = resolve({"backbone": "dinov2_vits14", "weights": "random", "dtype": "bf16", "device": "cpu"})
    model = build_model(config)
    assert models[0].trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = ShardedMargin(CosFace(0.35), 1000, scaling.E, 64.0)
    assert scaling.identity_bytes(1000, 1, 1.0) == 4 * head.weight.nbytes
    assert scaling.identity_bytes(1000, 8, 1.0) == 4 * head.weight.nbytes // 8
    sampled = ShardedMargin(CosFace(0.35), 1000, scaling.E, 64.0, sample_rate=0.1)
    assert scaling.identity_bytes(1000, 1, 0.1) == pytest.approx(
        sum(buffer.nbytes for buffer in sampled.buffers()) + 0.4 * head.weight.nbytes, rel=1e-6
    )
    assert scaling.logit_bytes(10**6, 8, 1024) == torch.zeros(1024, 2048).nbytes


def test_a_gpu_more_never_takes_longer_or_more_memory_for_identities(models):
    rates = scaling.Rates(images=1000, head_flops=1e13, bandwidth=1e10)
    for data in scaling.DATASETS.values():
        memory = [scaling.identity_bytes(data.identities, n, 1.0) for n in scaling.GPUS]
        assert memory == sorted(memory, reverse=True)
        epochs = [scaling.step_seconds(models[0], data.identities, n, 128, 1.0, rates) / n for n in scaling.GPUS]
        assert epochs == sorted(epochs, reverse=True)
    alone = scaling.step_seconds(models[0], 10_572, 1, 128, 1.0, rates)
    assert alone == pytest.approx(0.128 + 8 * 128 * 512 * 10_572 / 1e13)
