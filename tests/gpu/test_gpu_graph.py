"""`--cuda-graph`: the steps are those without it, whatever is in them, and nothing in them waits for the GPU."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import train
from vitface.config import resolve
from vitface.training import loop
from vitface.training.cuda_graph import WARM_UP
from vitface.training.loop import Trainer
from vitface.training.setup import resolve_choices
from vitface.training.step import NonFiniteError

pytestmark = pytest.mark.gpu
FLAGS = ["--exp", "demo", "--device", "cuda", "--batch-size", "32", "--limit-batches", "25", "--epochs", "2"]


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")


def outcome(run_dir):
    """The logged losses, and all adapters as one vector."""
    tensors = load_file(run_dir / "checkpoints" / "last" / "model.safetensors")
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    adapters = torch.cat([tensors[name].flatten() for name in sorted(tensors) if "lora_" in name])
    return torch.tensor([row["loss"] for row in rows]), adapters


def assert_same_run(one, other):
    """SDPA adds atomically in its backward pass: losses to 0.1 % and adapters to 1 % of their size, not to the bit."""
    torch.testing.assert_close(outcome(one)[0], outcome(other)[0], rtol=1e-3, atol=0)
    assert (outcome(one)[1] - outcome(other)[1]).norm() < 0.01 * outcome(one)[1].norm()


@pytest.mark.parametrize("extra", [[], ["--loss", "adaface", "--memory-budget", "1"]], ids=["demo", "adaface"])
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_fifty_steps_are_those_without_a_graph(tmp_path, impl, extra):
    if impl == "fused":
        pytest.importorskip("triton")
    flags = [*FLAGS, "--dtype", "fp32", "--impl", impl, *extra]
    for name in ("--cuda-graph", "--no-cuda-graph"):
        assert train.main([*flags, name, "--save-dir", str(tmp_path / name)]) == 0
    assert_same_run(tmp_path / "--cuda-graph", tmp_path / "--no-cuda-graph")


@pytest.mark.parametrize("first", ["--cuda-graph", "--no-cuda-graph"])
def test_a_run_goes_on_with_and_without(tmp_path, monkeypatch, first):
    flags = [*FLAGS, "--dtype", "fp32"]
    second = "--no-cuda-graph" if first == "--cuda-graph" else "--cuda-graph"
    assert train.main([*flags, "--save-dir", str(tmp_path / "whole")]) == 0
    step, taken = Trainer._step, []

    def stopped(self, batches):
        taken.append(1)
        if len(taken) == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopped)
        assert train.main([*flags, first, "--save-dir", str(tmp_path / "broken")]) == 130
    assert train.main(["--save-dir", str(tmp_path / "broken"), "--resume", "auto", second]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def trainer(**changes):
    flags = dict(exp="demo", device="cuda", batch_size=16, max_samples=400, holdout_people=0, cuda_graph=True)
    return Trainer(resolve_choices(resolve({**flags, **changes})), None)


def parameters(one):
    return [parameter.detach().clone() for parameter in one.trained]


@pytest.mark.parametrize("at", [WARM_UP, WARM_UP + 1, WARM_UP + 3])
def test_an_overflow_is_skipped_under_the_graph(at):
    """In the last step before it, in the one that is recorded and in a later one."""
    one = trainer(dtype="fp16")
    poison = torch.ones((), device="cuda")
    one.trained[0].register_hook(lambda gradient: gradient * poison)
    one.loss_scale.scale.fill_(256.0)
    batches = one._batches(0)
    for number in range(1, WARM_UP + 6):
        poison.fill_(float("inf") if number == at else 1.0)
        before = parameters(one)
        one._step(batches)
        same = [torch.equal(old, new) for old, new in zip(before, one.trained, strict=True)]
        assert all(same) if number == at else not any(same[:1])
    assert one.progress.skipped == 1 and one.loss_scale.scale == 128


def test_a_bad_loss_stops_the_graph_before_the_update(monkeypatch):
    poison, total_loss = torch.ones((), device="cuda"), loop.total_loss

    def poisoned(*arguments):
        parts = total_loss(*arguments)
        return {**parts, "loss": parts["loss"] * poison}

    monkeypatch.setattr(loop, "total_loss", poisoned)
    one = trainer(dtype="fp32")
    batches = one._batches(0)
    for _ in range(WARM_UP + 2):
        one._step(batches)
    before = parameters(one)
    poison.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="loss nan"):
        one._step(batches)
    assert all(torch.equal(old, new) for old, new in zip(before, one.trained, strict=True))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_nothing_waits_for_the_gpu_until_the_step_is_read(dtype):
    """Forward, backward, clipping, update and scale, without a graph."""
    one = trainer(dtype=dtype, cuda_graph=False)
    batches = one._batches(0)
    for _ in range(2):
        one._step(batches)
    images, labels, domains, _ = next(batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        told = one._micro_step(images, labels, domains, {}, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert told["loss"].isfinite()
