"""Training in fp16: a gradient that overflows costs a step and nothing else, and is counted; a bad loss still stops."""

import hashlib
import json
import os
import signal

import numpy as np
import pytest
import torch
from ranks import in_ranks
from safetensors.torch import load_file
from tiny import EPOCHS, STEPS_PER_EPOCH, fingerprint, settings, use_tiny

import vitface
from vitface.config import resolve
from vitface.store.tensors import tensor_bytes
from vitface.training import loop, loss_scale, non_finite, step
from vitface.training.loop import Trainer
from vitface.training.non_finite import NonFiniteError
from vitface.training.ranks import parallel
from vitface.training.ranks.process_group import process_group
from vitface.training.run import run
from vitface.training.runs.resume import configure
from vitface.training.setup import resolve_choices

START = 4.0  # the tiny model's gradients are large: from 2^16 it would skip the whole run
LINEAR = dict(use_dalora=False, head="linear", loss="cosface")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    use_tiny(monkeypatch)
    monkeypatch.setattr(loss_scale, "START", START)


def fp16(run_dir, **changes):
    return settings(run_dir, dtype="fp16", **changes)


class Overflows:
    """An infinity in one gradient of each of the `steps`; keeps what trained tensors and moments those began with."""

    def __init__(self, patch, steps, stop=None):
        self.steps, self.stop, self.begun, self.kept = steps, stop, 0, []
        self.update = loop.update
        patch.setattr(loop, "update", self)

    def __call__(self, optimizer, loss, trained, *rest):
        self.begun += 1
        if self.begun == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.begun not in self.steps:
            return self.update(optimizer, loss, trained, *rest)
        handle = trained[0].register_hook(lambda gradient: gradient * float("inf"))
        before = state_of(optimizer)
        outcome = self.update(optimizer, loss, trained, *rest)
        handle.remove()
        self.kept.append((before, state_of(optimizer)))
        return outcome


def state_of(optimizer):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [value.clone() for p in parameters for value in optimizer.state[p].values()]
    return [*(p.detach().clone() for p in parameters), *moments]


def state(run_dir):
    return json.loads((run_dir / "checkpoints" / "last" / "training.json").read_text())


def tensors(run_dir):
    return load_file(run_dir / "checkpoints" / "last" / "training.safetensors")


def scale_of(run_dir):
    return tuple(tensors(run_dir)[f"loss_scale.{name}"].item() for name in ("scale", "held"))


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_an_overflow_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    overflows = Overflows(monkeypatch, {3, 6, 7})
    run(fp16(tmp_path / "run"))
    assert len(overflows.kept) == 3
    for before, after in overflows.kept:
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert scale_of(tmp_path / "run") == (START / 8, 5)
    assert [row["skipped"] for row in rows(tmp_path / "run") if "holdout_auc" in row] == [1, 3, 3]
    assert "overflowed in fp16: 3." in (tmp_path / "run" / "results.md").read_text()
    assert "3 steps skipped so far" in "".join(capsys.readouterr())
    assert tensors(tmp_path / "run")["optimizer.0.step"] == EPOCHS * STEPS_PER_EPOCH - 3
    embeddings = vitface.load(tmp_path / "run", weights="random").embed(np.zeros((2, 112, 112, 3), np.uint8))
    assert embeddings.dtype == np.float32 and np.isfinite(embeddings).all()


def test_twenty_overflows_in_a_row_are_an_error(tmp_path, monkeypatch):
    """The count starts again at a good step: three, one that is taken, then twenty."""
    overflows = Overflows(monkeypatch, {*range(3, 6), *range(7, 99)})
    message = "step 26: the last 20 steps were skipped, .*gradient norm .*--dtype fp32.*non_finite.json"
    with pytest.raises(NonFiniteError, match=message):
        run(fp16(tmp_path / "run", epochs=8))
    assert overflows.begun == 26
    for before, after in overflows.kept:
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert json.loads((tmp_path / "run" / "non_finite.json").read_text())["gradients_not_finite"]


def test_a_loss_that_is_not_finite_stops_at_once(tmp_path, monkeypatch):
    total_loss, begun = loop.total_loss, []

    def bad(*arguments):
        begun.append(1)
        parts = total_loss(*arguments)
        return parts if len(begun) != 5 else {**parts, "loss": parts["loss"] * float("nan")}

    monkeypatch.setattr(loop, "total_loss", bad)
    with pytest.raises(NonFiniteError, match="step 5: loss nan"):
        run(fp16(tmp_path / "run"))


@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_resumed_run_goes_on_with_the_scale_and_the_counts(tmp_path, monkeypatch, stop_at):
    """Stopped in a row of skipped steps, or after it. Every file of the last checkpoint and the log, bit for bit."""
    overflows = {2, 3, 4, 8}
    monkeypatch.setattr(loss_scale, "GROWTH", 3)
    with monkeypatch.context() as patch:
        Overflows(patch, overflows)
        run(fp16(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        Overflows(patch, overflows, stop=stop_at)
        with pytest.raises(KeyboardInterrupt):
            run(fp16(tmp_path / "stopped"))
    kept = state(tmp_path / "stopped")
    assert kept["progress"]["skipped_in_a_row"] == (2 if stop_at == 3 else 0) and kept["progress"]["skipped"] > 1
    with monkeypatch.context() as patch:
        Overflows(patch, {step - stop_at for step in overflows})
        run(configure({"save_dir": str(tmp_path / "stopped"), "resume": "auto"}))
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    assert scale_of(tmp_path / "whole")[0] == START / 2**4 * 2**2  # steps 5 to 7 and 9 to 11


def test_micro_batches_are_scaled_alike(tmp_path, monkeypatch):
    """Two accumulated halves have the gradient of float32's, at any scale."""
    norms = {}
    for dtype, start in (("fp32", START), ("fp16", START), ("fp16", START / 8)):
        monkeypatch.setattr(loss_scale, "START", start)
        trainer = Trainer(resolve_choices(settings(tmp_path, dtype=dtype, grad_accum=2, **LINEAR)), None)
        norms[dtype, start] = trainer._step(trainer._batches())[0]
    assert norms["fp16", START] == pytest.approx(norms["fp32", START], rel=0.02)
    assert norms["fp16", START / 8] == pytest.approx(norms["fp32", START], rel=0.02)


@pytest.mark.parametrize("agreed", [True, False])
def test_an_overflow_on_one_rank_is_skipped_by_all(tmp_path, agreed):
    """In a shard of the identity matrix, whose gradients no other rank sees. Without agreement the ranks part."""

    def act(number):
        if not agreed:
            step.on_any_rank = lambda flag: flag
            parallel.sum_over_ranks = lambda x: x  # in the norm of the gradient
            loop.agree = non_finite.agree = lambda flag, values: (flag, values)
        with process_group("cpu", 60):
            config = resolve_choices(fp16(tmp_path, partial_fc=1.0, **LINEAR))
            trainer, begun = Trainer(config, None), []

            def sometimes(gradient):
                begun.append(1)
                return gradient * float("inf") if number == 1 and len(begun) == 2 else gradient

            trainer.margin.weight.register_hook(sometimes)
            batches = trainer._batches()
            for _ in range(2):
                trainer._step(batches)
            trained = {"scale": trainer.loss_scale.scale, **dict(trainer.model.named_parameters())}
            (tmp_path / f"{number}.json").write_text(
                json.dumps([trainer.state.progress.skipped, hashlib.sha256(tensor_bytes(trained)).hexdigest()])
            )

    assert in_ranks(2, act) == [0, 0]
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert (first == second) is agreed and second[0] == 1


def test_fp16_follows_fp32(tmp_path, monkeypatch):
    """Six steps of the demo: every loss within half a percent, and nothing is skipped from a scale of 1,024."""
    monkeypatch.undo()
    monkeypatch.setattr(loss_scale, "START", 1024.0)
    flags = dict(exp="demo", device="cpu", batch_size=8, epochs=1, max_samples=100, holdout_people=0)
    losses = {}
    for dtype in ("fp32", "fp16"):
        trainer = Trainer(resolve_choices(resolve({**flags, "dtype": dtype})), None)
        batches = trainer._batches()
        losses[dtype] = [trainer._step(batches)[1]["loss"] for _ in range(6)]
        assert trainer.state.progress.skipped == 0
    assert losses["fp16"] == pytest.approx(losses["fp32"], rel=5e-3) and losses["fp16"] != losses["fp32"]
