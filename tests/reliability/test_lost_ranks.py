"""Several ranks act as one: an infinity, a signal, other data or an error on one of them ends all, with its reason."""

import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from matrix import ROWS, sizes
from ranks import in_ranks, started, wait
from tiny import LINEAR, Faces, fingerprint, settings, train, use_tiny

from vitface.errors import DataError, exit_code
from vitface.training import batches, loop, non_finite, setup, step
from vitface.training import run as run_module
from vitface.training.loop import Trainer
from vitface.training.ranks import parallel
from vitface.training.ranks.process_group import process_group, rank
from vitface.training.run import run
from vitface.training.runs import state as run_state

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
TIMEOUT = 15.0  # seconds that a rank waits for the others: more than a busy machine needs for a step
REASON = 60.0  # more than a rank needs to find out whom it waited for, on a machine that is busy with other things


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    use_tiny(monkeypatch)


def poisoned(number, at, where):
    """Rank `number` meets an infinity in its loss, or in the gradient of its own identities, in one step."""
    taken, total_loss = iter(range(1, 1000)), loop.total_loss

    def bad(model, margin, *arguments):
        parts = total_loss(model, margin, *arguments)
        if next(taken) == at and rank() == number:
            if where == "loss":
                parts["loss"] = parts["loss"] * float("inf")
            else:
                margin.weight.register_hook(lambda gradient: gradient * float("inf"))
        return parts

    loop.total_loss = bad


INFINITIES = [
    (2, "loss", False),
    (2, "shard", True),
    (4, "loss", True),
    (4, "shard", True),
    (2, "loss", True),
    (4, "loss", False),
]


@sizes("infinity on a rank")
def test_an_infinity_on_one_rank_stops_all_before_the_update(tmp_path, ran, cases):
    chosen = INFINITIES[:cases]
    for case in chosen:
        stop_at_infinity(tmp_path / "-".join(map(str, case)), *case)
    assert len(chosen) == cases
    ran(ROWS["infinity on a rank"].fault, cases)


def stop_at_infinity(folder, world, where, sharded):
    changes = {**LINEAR, "partial_fc": 1.0 if sharded else None, "save_every": 5}
    folder.mkdir()

    def act(number):
        poisoned(world - 1, 6, where)
        return run(settings(folder / "run", **changes))

    codes, last = ended(folder, world, act)
    assert codes == [2] * world and len(set(last)) == 1
    assert last[0].startswith(f"error: step 6: rank {world - 1}: loss ") and "stopped before the update" in last[0]
    assert json.loads((folder / "run" / "non_finite.json").read_text())["gradients_not_finite"]
    train(folder / "run", world, resume="auto", **changes)  # without the fault, from step 5
    assert fingerprint(folder / "run") == fingerprint(train(folder / "whole", world, **changes))


def ended(folder, world, act, lost=()):
    """Exit codes and the last lines on stderr of all ranks but the `lost` ones."""

    def logged(number):
        sys.stderr = open(folder / f"{number}.txt", "w")  # noqa: SIM115
        return exit_code(lambda: act(number) and 0)

    others = [number for number in range(world) if number not in lost]
    with started(world, logged) as pids:
        codes = wait([pids[number] for number in others], 2 * TIMEOUT + REASON)
    return codes, [(folder / f"{number}.txt").read_text().splitlines()[-1] for number in others]


def test_without_agreement_an_infinity_on_one_rank_would_part_them(tmp_path):
    """The control: each rank judges its own shard by itself, and the ranks go on with other adapters."""

    def act(number):
        poisoned(1, 3, "shard")
        non_finite.all_gather, step.on_any_rank = lambda value: [value], lambda flag: flag
        parallel.sum_over_ranks = lambda x: x  # in the norm of the gradient; the shards' loss has its own
        with process_group("cpu", 10):
            trainer = Trainer(setup.resolve_choices(settings(tmp_path, **LINEAR, partial_fc=1.0)), None)
            with suppress(non_finite.NonFiniteError, RuntimeError):  # the other finds out a step later
                trainer._epoch(None, threading.Event())
            parameters = [p.detach().numpy().tobytes() for p in trainer.model.parameters()]
            (tmp_path / f"{number}.txt").write_text(hashlib.sha256(b"".join(parameters)).hexdigest())
            os._exit(0)  # no need to hear why the other one is gone

    in_ranks(2, act)
    assert (tmp_path / "0.txt").read_text() != (tmp_path / "1.txt").read_text()


# (ranks, who is lost, how, in what, the how-manieth time); by default the first alone
LOST = [
    (2, 1, signal.SIGKILL, "total_loss", 7),
    (2, 0, signal.SIGKILL, "update", 8),
    (4, 2, signal.SIGSTOP, "update", 6),
    (4, 3, signal.SIGKILL, "save", 2),
    (2, 1, signal.SIGSTOP, "embed_held_out", 2),
    (4, 0, signal.SIGSTOP, "save_checkpoint", 1),
    (2, 0, signal.SIGSTOP, "total_loss", 9),
    (2, 0, signal.SIGKILL, "save_checkpoint", 2),
    (4, 0, signal.SIGKILL, "total_loss", 10),
    (2, 1, signal.SIGKILL, "embed_held_out", 1),
    (2, 1, signal.SIGSTOP, "total_loss", 3),
    (4, 1, signal.SIGKILL, "read_batches", 2),
]


def lose(number, how, where, count):
    """Rank `number` gets a signal that no process can handle when it calls `where` for the `count`-th time."""
    owner = {"save": Trainer, "read_batches": batches, "save_checkpoint": run_state}.get(where, loop)
    taken, called = iter(range(1, 1000)), getattr(owner, where)

    def deadly(*arguments, **options):
        if rank() == number and next(taken) == count:
            os.kill(os.getpid(), how)
        return called(*arguments, **options)

    setattr(owner, where, deadly)


@sizes("lost ranks")
def test_a_killed_or_stopped_rank_ends_all_in_an_error_that_names_it(tmp_path, ran, cases):
    changes = dict(save_every=3, partial_fc=1.0, loss="cosface")
    chosen = LOST[:: len(LOST) // cases]
    worlds = {world for world, *_ in chosen}
    expected = {world: fingerprint(train(tmp_path / f"{world}", world, **changes)) for world in worlds}
    for case in chosen:
        folder = tmp_path / "-".join(map(str, case))
        lose_and_resume(folder, *case, changes)
        assert fingerprint(folder / "run") == expected[case[0]], folder.name
        shutil.rmtree(folder)
    assert len(chosen) == cases
    ran(ROWS["lost ranks"].fault, cases)


def lose_and_resume(folder, world, lost, how, where, count, changes):
    folder.mkdir()

    def act(number):
        lose(lost, how, where, count)
        run_module.process_group = functools.partial(process_group, seconds=TIMEOUT)
        return run(settings(folder / "run", **changes))

    codes, last = ended(folder, world, act, lost=[lost])
    assert codes == [2] * (world - 1), folder.name
    assert all(line.startswith(f"error: rank {lost} was lost (killed, stopped") for line in last), (folder.name, last)
    train(folder / "run", world, resume="auto", **changes)


class OtherFaces(Faces):
    def __init__(self):
        super().__init__()
        self.labels = self.labels[::-1].copy()


class Unreadable(Faces):
    def read(self, index):
        raise DataError(f"image {index} cannot be read")


def test_unequal_settings_and_data_are_found_before_the_first_step(tmp_path):
    def other_settings(number):
        return run(settings(tmp_path / "a", lr=1e-3 * (1 + number)))

    codes, last = ended(tmp_path, 2, other_settings)
    assert codes == [2, 2] and last[0] == last[1]
    assert "rank 1 has other lr than rank 0: 0.002 instead of 0.001; every rank needs the same command" in last[0]
    assert not (tmp_path / "a" / "checkpoints").exists()

    def other_data(number):
        setup.open_inputs = lambda config: (OtherFaces if number == 2 else Faces)()
        return run(settings(tmp_path / "b", batch_size=6))

    codes, last = ended(tmp_path, 3, other_data)
    assert codes == [2] * 3 and all("rank 2 has other sha256 than rank 0" in line for line in last)


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path):
    codes, last = ended(tmp_path, 3, lambda number: run(settings(tmp_path / "run")))
    assert codes == [2] * 3
    assert all(line == "error: --batch-size 8 is no multiple of 3 ranks x --grad-accum 1" for line in last)


def test_what_goes_wrong_on_one_rank_is_told_by_all(tmp_path):
    def unreadable(number):
        if number == 1:
            setup.open_inputs = lambda config: Unreadable()
        return run(settings(tmp_path / "a", holdout_people=0))

    codes, last = ended(tmp_path, 2, unreadable)
    assert codes == [2, 2]
    assert "rank 1 stopped: image" in last[0] and "cannot be read" in last[1]

    def full_disk(number):
        def refuse(*arguments):
            raise OSError(28, "No space left on device")

        run_state.save_checkpoint = refuse
        return run(settings(tmp_path / "b"))

    codes, last = ended(tmp_path, 2, full_disk)
    assert codes == [2, 2]
    assert last[1] == "error: rank 0 stopped: [Errno 28] No space left on device"

    def bug(number):
        if number == 1:
            batches.augment = None
        return run(settings(tmp_path / "c"))

    codes, last = ended(tmp_path, 2, bug)
    assert codes == [2, 1] and last[0] == "error: rank 1 stopped: TypeError: 'NoneType' object is not callable"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(run_dir, *kills, restarts):
    """Runs torchrun_train.py on two ranks; `kills` are STEP:RANK:ATTEMPT at which a rank kills itself."""
    options = f"--nproc-per-node 2 --max-restarts {restarts} --rdzv-backend c10d --local-addr 127.0.0.1"
    options += f" --rdzv-endpoint 127.0.0.1:{free_port()}"
    script = Path(__file__).with_name("torchrun_train.py")
    command = [sys.executable, "-m", "torch.distributed.run", *options.split(), script, run_dir, *kills]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_torchrun_restarts_a_run_and_it_ends_bit_for_bit_the_same(tmp_path):
    done = torchrun(tmp_path / "run", "6:1:0", restarts=1)
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "run") == fingerprint(train(tmp_path / "whole", 2, save_every=3))
    assert done.stdout.count("resumed ") == 1 and "at step 4" in done.stdout


@pytest.mark.slow
def test_torchrun_restarts_twice_and_gives_up_after_the_last_restart(tmp_path):
    done = torchrun(tmp_path / "run", "6:1:0", "9:0:1", restarts=2)
    assert done.returncode == 0, done.stderr
    assert fingerprint(tmp_path / "run") == fingerprint(train(tmp_path / "whole", 2, save_every=3))
    done = torchrun(tmp_path / "again", "2:1:0", "2:1:1", restarts=1)
    assert done.returncode != 0
    assert not list((tmp_path / "again" / "checkpoints").glob("step-*"))
