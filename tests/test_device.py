"""What "auto" stands for: a GPU's fastest dtype is known, a CPU's is measured."""

import dataclasses
import json
import math

import pytest
import torch
from PIL import Image

import vitface
from vitface import device
from vitface.__main__ import main
from vitface.config import resolve
from vitface.device import dtype_note, inference_dtype, lead_of_fp32, resolve_dtype
from vitface.errors import ConfigError
from vitface.store.faces import open_checkpoint, trained_tensors
from vitface.training.ranks.process_group import local_device
from vitface.training.runs.checkpoint import save_checkpoint
from vitface.training.runs.resume import configure
from vitface.training.setup import resolve_choices

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def plant(monkeypatch, lead):
    monkeypatch.setattr(device, "lead_of_fp32", lambda dtype, width: lead)


@pytest.mark.parametrize(("name", "current"), [("cuda", []), ("cuda:1", [1])])
def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch, name, current):
    """`set_device` takes no device without a number."""
    seen, zeros = [], torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda count, device: zeros(count))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(torch._utils._get_device_index(device)))
    assert device.resolve_device(name) == torch.device(name) and seen == current


@pytest.mark.parametrize(("gpus", "device"), [(4, "cuda:2"), (1, "cuda:0")])
def test_a_rank_has_the_gpu_of_its_number_or_the_only_one_that_it_sees(monkeypatch, gpus, device):
    """Under SLURM a process may see its own GPU alone."""
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert local_device("auto") == local_device("cuda") == device and local_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="--device cuda:1 is one GPU for all ranks; --device cuda gives each rank"):
        local_device("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # one rank on each machine
    assert local_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize(
    ("bf16", "capability", "dtype"), [(True, (8, 0), "bf16"), (False, (7, 5), "fp16"), (False, (6, 1), "fp32")]
)
def test_auto_is_what_the_gpu_is_fast_in(monkeypatch, bf16, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(device, "lead_of_fp32", lambda *_: pytest.fail("measured the CPU"))
    assert resolve_dtype("auto", GPU, 384) == dtype
    assert inference_dtype(dtype, GPU, 384) == dtype and dtype_note(dtype, GPU, 384) == dtype


@pytest.mark.parametrize(
    ("lead", "auto", "trained_in_bf16", "note"),
    [
        (1.6, "fp32", "fp32", "fp32, 1.6x the speed of bf16 on this processor"),  # AVX-512 without AMX
        (0.3, "bf16", "bf16", "bf16, 3.3x the speed of fp32 on this processor"),  # AMX
        (1.2, "fp32", "bf16", "fp32, 1.2x the speed of bf16 on this processor"),
        (0.85, "fp32", "bf16", "fp32, 0.8x the speed of bf16 on this processor"),
        (math.inf, "fp32", "fp32", "fp32"),  # no bf16 at all
    ],
)
def test_auto_is_what_the_cpu_is_measured_to_be_fast_in(monkeypatch, lead, auto, trained_in_bf16, note):
    plant(monkeypatch, lead)
    assert resolve_dtype("auto", CPU, 384) == auto and resolve_dtype("fp16", CPU, 384) == "fp16"
    assert inference_dtype("bf16", CPU, 384) == trained_in_bf16
    assert inference_dtype("fp32", CPU, 384) == "fp32"  # never a less exact one than in training
    assert dtype_note(auto, CPU, 384) == note


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_the_measurement_times_both_products_and_is_made_once(monkeypatch, two_threads):
    """With a clock that moves during products only: 3 ms for bf16, 2 ms for fp32; and 20 ms more in two of three,
    where another program has the core, or in all where several threads wait for each other."""
    now, calls = [0.0], []

    def product(x, weight, bias):
        calls.append((x.dtype, (tuple(x.shape), tuple(weight.shape))))
        now[0] += 0.003 if x.dtype == torch.bfloat16 else 0.002
        now[0] += 0.02 if len(calls) % 3 or torch.get_num_threads() > 1 else 0

    monkeypatch.setattr(device.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(device.onednn, "product", product)
    monkeypatch.setattr(device.onednn, "serves", lambda x: x.dtype != torch.float16)
    monkeypatch.setattr(device.onednn, "pack", lambda weight: weight)
    lead_of_fp32.cache_clear()
    try:
        assert lead_of_fp32("bf16", 192) == pytest.approx(1.5)
        assert {dtype for dtype, _ in calls} == {torch.float32, torch.bfloat16}
        assert {shapes for _, shapes in calls} == {((64, 192), (768, 192))}
        assert 0.1 <= now[0] < 0.2 and torch.get_num_threads() == 2
        count = len(calls)
        assert lead_of_fp32("bf16", 192) == pytest.approx(1.5) and len(calls) == count
        assert lead_of_fp32("fp16", 192) == math.inf and len(calls) == count
        lead_of_fp32("bf16", 1024)
        assert calls[-1][1] == ((64, 1024), (1024, 1024))
    finally:
        lead_of_fp32.cache_clear()


def test_a_run_keeps_its_dtype_on_another_machine(tmp_path, monkeypatch):
    plant(monkeypatch, 0.5)
    config = resolve_choices(resolve({"device": "cpu", "backbone": "vit_nano", "save_dir": str(tmp_path)}))
    assert config.dtype == "bf16"
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    plant(monkeypatch, 1.6)
    for given in ({}, {"dtype": "auto"}):
        again = configure({"save_dir": str(tmp_path), "resume": "auto", **given})
        assert resolve_choices(again).dtype == "bf16"
    assert configure({"save_dir": str(tmp_path), "resume": "auto", "dtype": "fp32"}).dtype == "fp32"


def test_a_model_trained_in_bf16_is_used_in_what_is_fast_here(tmp_path, monkeypatch, capsys, tiny_run):
    stored = open_checkpoint(tiny_run)
    settings = dataclasses.asdict(dataclasses.replace(stored.config, dtype="bf16"))
    save_checkpoint(tmp_path / "half", 1, trained_tensors(stored.load("bf16")), settings, {}, {}, is_best=True)
    Image.new("RGB", (112, 112)).save(tmp_path / "a.png")
    explain = ["explain", str(tmp_path / "a.png"), "-o", str(tmp_path / "out.png"), "--checkpoint"]
    for lead, dtype, tensors in ((0.5, "bf16", torch.bfloat16), (1.6, "fp32", torch.float32)):
        plant(monkeypatch, lead)
        model = vitface.load(tmp_path / "half")
        assert model.config.dtype == dtype and model.model.vit.dtype == tensors
        assert vitface.load(tmp_path / "half", dtype="bf16").config.dtype == "bf16"
    assert vitface.load(tiny_run).config.dtype == "fp32"
    assert main([*explain, str(tmp_path / "half")]) == 0
    assert "dtype: fp32, 1.6x the speed of bf16 on this processor; trained in bf16" in capsys.readouterr().err
    assert main([*explain, str(tiny_run)]) == 0
    assert "dtype" not in capsys.readouterr().err


def test_a_named_gpu_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert device.resolve_device("cuda:1") == torch.device("cuda:1") and chosen == [torch.device("cuda:1")]
    device.resolve_device("cpu")
    assert chosen == [torch.device("cuda:1")]
