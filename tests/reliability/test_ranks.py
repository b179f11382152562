"""Runs on several ranks train what one process trains, whatever the number of ranks when they go on."""

import json
import os
import signal
import sys

import pytest
import torch
from ranks import in_ranks
from safetensors.torch import load_file
from tiny import LINEAR, fingerprint, settings, train, use_tiny

from vitface.errors import exit_code
from vitface.training import loop, setup, step
from vitface.training.loop import Trainer
from vitface.training.ranks.process_group import process_group, rank, world_size
from vitface.training.run import run

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    use_tiny(monkeypatch)


def tensors(run_dir, step="last"):
    folder = run_dir / "checkpoints" / step
    files = ["model.safetensors", "training.safetensors", *(path.name for path in folder.glob("identities-*"))]
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def difference(first, second):
    """The largest difference of two runs' trained parameters."""
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    kept = [name for name in one if not name.startswith(("optimizer.", "exp_avg"))]
    return max((one[name].double() - other[name].double()).abs().max().item() for name in kept)


@pytest.mark.parametrize(("epochs", "sizes"), [(2, "32:1,64"), pytest.param(13, 64, marks=pytest.mark.slow)])
def test_two_ranks_are_two_accumulated_shards_bit_for_bit(tmp_path, epochs, sizes):
    """13 epochs are 52 steps. All trained tensors and moments; the loss that is logged is added up in another order."""
    whole = {**LINEAR, "epochs": epochs, "image_size": sizes}
    ranks = fingerprint(train(tmp_path / "ranks", 2, **whole))
    shards = fingerprint(train(tmp_path / "shards", grad_accum=2, **whole))
    control = fingerprint(train(tmp_path / "control", seed=1, grad_accum=2, **whole))
    for file in ("model.safetensors", "training.safetensors"):
        assert ranks[file] == shards[file] != control[file]
    logs = [[row["loss"] for row in json.loads(each["log"])] for each in (ranks, shards)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


@pytest.mark.parametrize("epochs", [2, pytest.param(13, marks=pytest.mark.slow)])
def test_four_ranks_four_shards_and_the_whole_batch_agree_to_a_millionth(tmp_path, epochs):
    whole = {**LINEAR, "epochs": epochs}
    four = train(tmp_path / "four", 4, **whole)
    found = {
        "shards": difference(four, train(tmp_path / "shards", grad_accum=4, **whole)),
        "both": difference(four, train(tmp_path / "both", 2, grad_accum=2, **whole)),
        "whole batch": difference(four, train(tmp_path / "whole", **whole)),
        "sharded identities": difference(
            train(tmp_path / "sharded", 4, partial_fc=1.0, **whole),
            train(tmp_path / "chunked", partial_fc=1.0, **whole),
        ),
    }
    print(f"after {4 * epochs} steps:", found)
    assert max(found.values()) <= 1e-6


@pytest.mark.parametrize("world", [2, 4])
def test_batch_norm_load_balance_and_adaface_are_over_all_ranks(tmp_path, world):
    """One step of DA-LoRA with everything that depends on the batch: gradients and buffers of the whole batch."""
    config = setup.resolve_choices(settings(tmp_path, epochs=1, max_samples=8, holdout_people=0))
    expected = gradients(config)

    def act(number):
        with process_group("cpu", 60):
            got = gradients(config)
            for name, (gradient, size) in expected.items():
                assert (got[name][0] - gradient).norm() <= 1e-4 * size, name  # batch norm of 8 images in float32

    assert in_ranks(world, act) == [0] * world
    alone, others = gradients(config), dict(expected)
    assert all(torch.equal(alone[name][0], others[name][0]) for name in alone)


def gradients(config):
    """The gradients that reach the update of the first step, and the buffers: {name: (tensor, its scale)}."""
    trainer, found = Trainer(config, None), {}

    def note(optimizer, loss, *rest):
        loss.backward()
        named = {**dict(trainer.model.named_parameters()), "identities": trainer.margin.weight}
        found.update({name: (p.grad.clone(), p.grad.norm()) for name, p in named.items() if p.grad is not None})
        found["head.proj.bias"] = (torch.zeros(1), torch.ones(1))  # of a bias before a batch norm: rounding alone
        found["loss"] = (torch.tensor(loop.agree(False, [loss.item()])[1][0]), loss.detach())
        return step.Outcome(loss.detach(), torch.zeros(()), torch.zeros(()))

    real, loop.update = loop.update, note
    try:
        trainer.fit(None)
    finally:
        loop.update = real
    buffers = [*trainer.model.named_buffers(), *trainer.margin.named_buffers()]
    return {**found, **{name: (value.clone().float(), value.float().norm()) for name, value in buffers}}


def stop_after(count):
    """SIGTERM to the last rank in the middle of a step."""
    taken, update = iter(range(1, 1000)), loop.update

    def signalled(*arguments):
        if next(taken) == count and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments)

    loop.update = signalled


@pytest.mark.parametrize(
    "sharded",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"partial_fc": 1.0}, marks=pytest.mark.slow),
        {"partial_fc": 0.5, "image_size": "32:1,64:1,48"},
    ],
)
def test_a_run_moves_from_one_rank_to_two_to_four_and_back_with_every_tensor(tmp_path, monkeypatch, sharded):
    """Each part is stopped after 3 steps by a signal to its last rank; what the next one loads, it saves the same."""
    monkeypatch.setattr("vitface.training.ranks.identities.BLOCK", 3)
    changes = {**LINEAR, **sharded, "epochs": 3}
    run_dir = tmp_path / "run"
    for part, world in enumerate((1, 2, 4, 1), 1):
        assert move(run_dir, world, tmp_path / f"again-{part}", changes) == [130] * world
        assert (run_dir / "checkpoints" / "last").resolve().name == f"step-{3 * part}"
    assert difference(run_dir, train(tmp_path / "whole", **changes)) <= 1e-5
    logs = [
        [(row["step"], pytest.approx(row["loss"], rel=1e-5)) for row in map(json.loads, text.splitlines())]
        for text in ((folder / "log.jsonl").read_text() for folder in (run_dir, tmp_path / "whole"))
    ]
    assert logs[0] == logs[1]


def move(run_dir, world, again, changes):
    """Three more steps of the run; before them, what it loads is saved in `again` and must be the same."""

    def act(number):
        if (run_dir / "checkpoints").exists():
            reload_and_save(run_dir, again, changes)
        stop_after(3)
        return exit_code(lambda: run(settings(run_dir, resume="auto", **changes)) and 0)

    return in_ranks(world, act)


def reload_and_save(run_dir, elsewhere, changes):
    last = (run_dir / "checkpoints" / "last").resolve()
    with process_group("cpu", 60):
        trainer = Trainer(setup.resolve_choices(settings(run_dir, **changes)), run_dir)
        trainer.restore(last)
        trainer.run_dir = elsewhere
        trainer.save(False)
        if rank() == 0:
            before, after = tensors(run_dir, last.name), tensors(elsewhere)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_rank_0_writes(tmp_path):
    def act(number):
        allowed = ("/dev/null", "/proc", "/sys")
        if number:
            sys.addaudithook(lambda event, args: _no_write(event, args, allowed))
        run(settings(tmp_path / "run", partial_fc=1.0))

    assert in_ranks(2, act) == [0, 0]
    assert (tmp_path / "run" / "results.md").is_file()


def _no_write(event, arguments, allowed):
    if event == "open" and isinstance(arguments[0], str) and not arguments[0].startswith(allowed):
        mode, flags = arguments[1] or "", arguments[2] or 0
        if set(str(mode)) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise AssertionError(f"wrote {arguments[0]}")
    if event in ("os.rename", "os.mkdir", "os.symlink", "os.remove"):
        raise AssertionError(f"{event} {arguments[0]}")


def test_one_device_needs_no_process_group(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.distributed.init_process_group", None)
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc-per-node 1
    assert world_size() == 1
    run(settings(tmp_path / "run", epochs=1))
