"""Numbers that go wrong: a run stops before they reach its parameters, and says when it stops learning."""

import json
import shutil

import numpy as np
import pytest
import torch
from matrix import ROWS, sizes
from tiny import fingerprint, settings, use_tiny

from vitface.errors import exit_code
from vitface.training import loop
from vitface.training.holdout import alarms
from vitface.training.non_finite import NonFiniteError
from vitface.training.run import run

VALUES = (float("nan"), float("inf"), float("-inf"))
STEPS = (2, 7)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    use_tiny(monkeypatch)


class Injection:
    """Plants `value` at one place of step `step`, and keeps the parameters that the step began with."""

    def __init__(self, patch, place, step, value):
        self.place, self.step, self.value, self.fired = place, step, value, False
        self.begun, self.before, self.parameters = 0, [], []
        total_loss, update = loop.total_loss, loop.update
        self.total_loss, self.update = total_loss, update
        patch.setattr(loop, "total_loss", self.with_bad_input)
        patch.setattr(loop, "update", self.with_bad_gradient)

    def poison(self, tensor):
        self.fired = True
        with torch.no_grad():
            tensor.view(-1)[0] = self.value

    def with_bad_input(self, model, margin, batch, config):
        self.begun += 1
        self.parameters = [p for module in (model, margin) for p in module.parameters()]
        hook = None
        if self.begun == self.step and self.place == "pixels":
            self.poison(batch.images)
        elif self.begun == self.step and self.place == "parameter":
            self.poison(model.head.proj.weight)
        elif self.begun == self.step and self.place == "activation":
            hook = model.vit.blocks[1].attn.register_forward_hook(lambda module, inputs, out: self.poison(out))
        self.before = [parameter.detach().clone() for parameter in self.parameters]
        parts = self.total_loss(model, margin, batch, config)
        if hook is not None:
            hook.remove()
        return parts

    def with_bad_gradient(self, optimizer, loss, trained, *rest):
        if self.begun == self.step and self.place == "loss":
            self.fired = True
            loss = loss * self.value
        if self.begun == self.step and self.place == "gradient":
            handle = trained[1].register_hook(lambda gradient: (self.poison(gradient), gradient)[1])
            try:
                return self.update(optimizer, loss, trained, *rest)
            finally:
                handle.remove()
        return self.update(optimizer, loss, trained, *rest)


CASES = [
    (place, step, value)
    for place in ("pixels", "activation", "loss", "gradient", "parameter")
    for step in STEPS
    for value in VALUES
]


@sizes("non-finite")
def test_not_a_number_stops_before_the_update(tmp_path, monkeypatch, ran, cases, capsys):
    run(settings(tmp_path / "whole"))
    message = r"step {}: loss .* stopped before the update.*non_finite\.json"
    chosen = CASES[:: len(CASES) // cases]
    for place, step, value in chosen:
        with monkeypatch.context() as patch:
            injection = Injection(patch, place, step, value)
            with pytest.raises(NonFiniteError, match=message.format(step)):
                run(settings(tmp_path / "run"))
        assert injection.fired and injection.begun == step, (place, step, value)
        for parameter, before in zip(injection.parameters, injection.before, strict=True):
            assert torch.equal(parameter.nan_to_num(7.0), before.nan_to_num(7.0)), (place, step, value)
        diagnosis = json.loads((tmp_path / "run" / "non_finite.json").read_text())
        assert (diagnosis["step"], diagnosis["epoch"]) == (step, 1 + (step - 1) // 4)
        assert diagnosis["images"]["finite"] is (place != "pixels")
        assert diagnosis["parameters_not_finite"] == (["model.head.proj.weight"] if place == "parameter" else [])
        assert bool(diagnosis["gradients_not_finite"])
        assert ("saved up to step 4" if step > 4 else "before the first checkpoint") in capsys.readouterr().out
        if step > 4:  # nothing was lost: without the fault the run goes on as if there had been none
            run(settings(tmp_path / "run", resume="auto"))
            assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")
        shutil.rmtree(tmp_path / "run")
    assert len(chosen) == cases
    ran(ROWS["non-finite"].fault, cases)


def test_the_user_reads_what_happened_without_a_traceback(tmp_path, monkeypatch, capsys):
    Injection(monkeypatch, "loss", 6, float("nan"))
    assert exit_code(lambda: run(settings(tmp_path / "run")) and 0) == 2
    printed = capsys.readouterr()
    assert "stopped; saved up to step 4, continue with" in printed.out
    last = printed.err.splitlines()[-1]
    assert last.startswith("error: step 6: loss nan, gradient norm nan: stopped before the update")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_collapse_is_told_from_a_harmless_offset():
    rng = np.random.default_rng(0)
    spread, constant = unit(rng.normal(size=(40, 8))), unit(1 + 1e-3 * rng.normal(size=(40, 8)))
    assert alarms(spread, 0.5, None) == {}
    assert alarms(constant, 0.95, None) == {}
    assert list(alarms(constant, 0.5, None)) == ["collapse"]
    assert "mean cosine 1.0000 between held-out images, AUC 0.500" in alarms(constant, 0.5, None)["collapse"]
    for n, text in ((2, "0.0"), (3, "1.0")):  # brute force over all pairs
        rows = unit(rng.normal(size=(n, 3)) + float(text) * 100)
        pairs = [rows[i] @ rows[j] for i in range(n) for j in range(n) if i != j]
        assert bool(alarms(rows, 0.0, None)) == (np.mean(pairs) > 0.99)


def test_a_dead_router_is_named():
    spread = unit(np.random.default_rng(0).normal(size=(40, 8)))
    even = np.full((40, 3), 1 / 3)
    one_sided = np.tile([0.6, 0.399, 0.001], (40, 1))
    rare = np.eye(3)[[0, 1] * 19 + [0, 2]]  # one image in forty is its own
    assert alarms(spread, 0.9, even) == {} and alarms(spread, 0.9, rare) == {}
    assert list(alarms(spread, 0.9, one_sided)) == ["dead router"]
    assert "domain 2 of 3 gets almost no image" in alarms(spread, 0.9, one_sided)["dead router"]


def test_an_alarm_is_printed_once_and_logged_every_epoch(tmp_path, monkeypatch, capsys):
    total_loss = loop.total_loss

    def frozen_shut(model, *arguments):
        with torch.no_grad():  # a router that knows one domain only, and a head that maps all faces to one point
            model.router.fc2.weight.zero_()
            model.router.fc2.bias.copy_(torch.tensor([20.0, -20.0]))
            model.head.norm.weight.zero_()
            model.head.norm.bias.fill_(1.0)
        return total_loss(model, *arguments)

    monkeypatch.setattr(loop, "total_loss", frozen_shut)
    run(settings(tmp_path / "run", epochs=2))
    printed = "".join(capsys.readouterr())
    assert printed.count("ALARM collapse:") == 1 and printed.count("ALARM dead router: domain 1 of 2") == 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["alarms"] for row in rows if "alarms" in row] == ["collapse, dead router"] * 2
