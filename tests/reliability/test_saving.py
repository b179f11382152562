"""Whatever happens while a checkpoint is written, a whole one is there afterwards."""

import errno
import os
import random
import resource
import shutil
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from disk import FILE_RULES, NAME_RULES, Disk, replay
from matrix import ROWS, sizes
from safetensors.torch import load_file
from tiny import fingerprint, in_child, settings, start, use_tiny

from vitface.__main__ import main
from vitface.errors import CheckpointError, exit_code
from vitface.store.faces import MODEL_FILES, step_directories
from vitface.training.run import run
from vitface.training.runs.checkpoint import (
    ALL_FILES,
    newest_checkpoint,
    save_checkpoint,
    verify_step,
)
from vitface.training.runs.interrupt import stop_requests

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def save(run_dir, step):
    """A checkpoint whose every tensor and counter is its step; every third one is the best."""
    tensors = {"x": torch.full((64,), float(step)), "y": torch.tensor([step])}
    save_checkpoint(run_dir, step, tensors, {"step": step}, tensors, {"step": step}, is_best=step % 3 == 0)


def newest(run_dir) -> int:
    """The step of the newest verified checkpoint, after checking that it holds what was saved as that step; 0: none."""
    found = newest_checkpoint(run_dir)
    if found is None:
        return 0
    step = int(found.name[5:])
    for name in ("model.safetensors", "training.safetensors"):
        assert all((tensor == step).all() for tensor in load_file(found / name).values())
    assert f'"step": {step}' in (found / "training.json").read_text()
    return step


@sizes("kill saving")
def test_sigkill_at_a_random_instant(tmp_path, ran, cases):
    rng, torn = random.Random(0), 0
    for case in range(cases):
        run_dir = tmp_path / str(case)
        reader, writer = os.pipe()

        def save_on(run_dir=run_dir, writer=writer):
            for step in range(1, 10_000):
                save(run_dir, step)
                os.write(writer, step.to_bytes(4, "little"))

        pid = start(save_on)
        os.close(writer)
        first = os.read(reader, 4)  # the process is at work
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        said = first + os.read(reader, 1 << 16)
        os.close(reader)
        acknowledged = int.from_bytes(said[-4:], "little")
        torn += any(run_dir.glob("checkpoints/.*"))
        assert acknowledged <= newest(run_dir) <= acknowledged + 1
        save(run_dir, acknowledged + 2)
        assert not list(run_dir.glob("checkpoints/.*")) and newest(run_dir) == acknowledged + 2
        shutil.rmtree(run_dir)
    assert torn > cases / 4  # most kills came in the middle of a save
    ran(ROWS["kill saving"].fault, cases)


def recorded(tmp_path, monkeypatch):
    """The operations of five saves, and (operations done, step) for each that was acknowledged."""
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        (tmp_path / "disk").mkdir()
        acknowledged = [(0, 0)]
        for step in range(1, 6):
            save(tmp_path / "disk" / "run", step)
            acknowledged.append((len(disk.ops), step))
    return disk.ops, acknowledged


def outcome(tmp_path, ops, rules, fsync=True) -> int | None:
    """The newest step after a power loss, None if there are checkpoints but none is whole."""
    target = tmp_path / "after"
    shutil.rmtree(target, ignore_errors=True)
    replay(ops, tmp_path / "disk", target, *rules, fsync)
    try:
        return newest(target / "run")
    except CheckpointError:
        return None


@sizes("power loss")
def test_power_loss(tmp_path, monkeypatch, ran, cases):
    ops, acknowledged = recorded(tmp_path, monkeypatch)
    rules = [(file_rule, name_rule) for file_rule in FILE_RULES for name_rule in NAME_RULES]
    states = [(end, rule) for end in range(len(ops) + 1) for rule in rules]
    assert len(states) >= cases
    states = random.Random(0).sample(states, cases)
    lost_without = 0
    for end, rule in states:
        safe = max(step for done, step in acknowledged if done <= end)
        assert outcome(tmp_path, ops[:end], rule) in (safe, safe + 1), (end, rule)
        without = outcome(tmp_path, ops[:end], rule, fsync=False)  # a bad one accepted would fail in `newest`
        lost_without += without is None or without < safe
    assert lost_without > cases / 3
    ran(ROWS["power loss"].fault, cases)


def test_best_and_last_survive_a_power_loss(tmp_path, monkeypatch):
    ops, acknowledged = recorded(tmp_path, monkeypatch)
    for end in range(acknowledged[1][0], acknowledged[3][0] + 1):  # up to where 3 is the best, and 1 deleted
        step = max(step for done, step in acknowledged if done <= end)
        for name_rule in NAME_RULES:
            shutil.rmtree(tmp_path / "after", ignore_errors=True)
            replay(ops[:end], tmp_path / "disk", tmp_path / "after", "empty", name_rule)
            parent = tmp_path / "after" / "run" / "checkpoints"
            assert (parent / "best" / "manifest.json").is_file(), (end, name_rule)  # never left pointing at nothing
            assert (parent / "last").readlink().name in (f"step-{step}", f"step-{step + 1}")
            if step >= 3:
                assert (parent / "best").readlink().name == "step-3"


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)  # the signal arrives in here


def refuse(number):
    def fault():
        raise OSError(number, os.strerror(number))

    return fault


def exhaust():
    raise MemoryError


FAULTS = {
    "KILL": kill,
    "TERM": terminate,
    "Ctrl-C": interrupt,
    "ENOSPC": refuse(errno.ENOSPC),
    "EIO": refuse(errno.EIO),
    "MemoryError": exhaust,
}


def struck_save(monkeypatch, run_dir, at, name) -> None:
    """Saves step 4 with a fault at operation `at`, and checks what the caller is told."""
    with monkeypatch.context() as patch:
        disk = Disk(patch, at, FAULTS[name])
        if name == "KILL":
            assert in_child(lambda: save(run_dir, 4)) == -signal.SIGKILL
            return
        if name == "TERM":  # the request of a training run: the save is finished first
            with stop_requests() as stop:
                save(run_dir, 4)
            assert stop.is_set() and newest(run_dir) == 4
        elif name == "Ctrl-C":  # the second one, which does not wait
            with pytest.raises(KeyboardInterrupt):
                save(run_dir, 4)
        else:
            said = {"ENOSPC": "No space left", "EIO": "Input/output error", "MemoryError": "out of memory"}[name]
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    save(run_dir, 4)
                    text = str(warned[0].message)  # only an old checkpoint could not be deleted
                    assert "could not be deleted" in text
                except CheckpointError as error:
                    text = str(error)
                    assert "step 4 could not be saved" in text
            assert said in text or name == "MemoryError"
        assert disk.fired


@sizes("failpoints")
def test_a_fault_at_every_operation(tmp_path, monkeypatch, ran, cases):
    for step in (1, 2, 3):
        save(tmp_path / "template", step)
    with monkeypatch.context() as patch:
        shutil.copytree(tmp_path / "template", tmp_path / "counted", symlinks=True)
        disk = Disk(patch)
        save(tmp_path / "counted", 4)
    kinds = {op[0] for op in disk.ops}
    assert kinds == {"mkdir", "create", "write", "fsync", "rename", "symlink", "rmtree"}
    points = [round(at) for at in np.linspace(0, len(disk.ops) - 1, cases // 6)]
    assert len(set(points)) == cases // 6
    if cases == ROWS["failpoints"].cases.full:
        assert points == list(range(len(disk.ops)))
    run_dir = tmp_path / "run"
    for at in points:
        for name in FAULTS:
            shutil.copytree(tmp_path / "template", run_dir, symlinks=True)
            struck_save(monkeypatch, run_dir, at, name)
            assert newest(run_dir) in (3, 4), (at, name)
            assert all(verify_step(path) for path in step_directories(run_dir))  # no half-written, no half-deleted one
            assert (run_dir / "checkpoints" / "best" / "manifest.json").is_file()
            if name != "KILL":
                assert not list(run_dir.glob("checkpoints/.partial-*"))
            save(run_dir, 5)
            assert newest(run_dir) == 5 and not list(run_dir.glob("checkpoints/.[pd]*"))
            shutil.rmtree(run_dir)
    ran(ROWS["failpoints"].fault, cases)


def damage(rng, good, bad, other) -> str:
    """Damages the step directory `bad`, whose neighbour `other` is older; what was done."""
    file = bad / rng.choice((*ALL_FILES, "manifest.json"))
    data = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "flip", "flip", "zeros", "cut", "missing", "swapped file", "swapped step", "stale"])
    if kind == "flip":
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        count = rng.randint(1, len(data))
        data[-count:] = bytes(count)
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    if kind == "missing":
        file.unlink()
    elif kind == "swapped file":
        shutil.copy(other / file.name, file)
    elif kind == "swapped step":
        shutil.rmtree(bad)
        shutil.copytree(other, bad)
    elif kind == "stale":
        shutil.copy(other / "manifest.json", bad)
    else:
        file.write_bytes(data)
    return f"{kind} {file.name}"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@sizes("damage")
def test_damage_is_named_and_passed_over(tmp_path, ran, cases, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step)
    steps = tmp_path / "checkpoints"
    bad, other = steps / "step-3", steps / "step-2"
    shutil.copytree(bad, tmp_path / "good")
    rng, kinds = random.Random(0), set()
    for _ in range(cases):
        done = damage(rng, tmp_path / "good", bad, other)
        assert contents(bad) != contents(tmp_path / "good"), done
        assert newest_checkpoint(tmp_path) == other, done
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 1 and printed[0].startswith(f"passed over: {bad}"), printed
        kinds.add(done.split()[0])
        shutil.rmtree(bad)
        shutil.copytree(tmp_path / "good", bad)
    assert newest(tmp_path) == 3 and kinds == {"flip", "zeros", "cut", "missing", "swapped", "stale"}
    ran(ROWS["damage"].fault, cases)


def test_nothing_is_deleted_before_two_newer_ones_verify(tmp_path):
    for step in (3, 4, 5):
        save(tmp_path, step)
    assert [path.name for path in step_directories(tmp_path)] == ["step-5", "step-4", "step-3"]
    (tmp_path / "checkpoints" / "step-5" / "model.json").unlink()
    save(tmp_path, 7)
    save(tmp_path, 8)
    names = [path.name for path in step_directories(tmp_path)]
    assert names == ["step-8", "step-7", "step-3"]  # and the best
    (tmp_path / "checkpoints" / "step-8" / "model.json").unlink()
    save(tmp_path, 10)
    assert [path.name for path in step_directories(tmp_path)] == ["step-10", "step-8", "step-7", "step-3"]


def test_a_delete_that_keeps_failing_does_not_stop_a_run(tmp_path, monkeypatch):
    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    save(tmp_path, 1)
    save(tmp_path, 2)
    for step in (3, 4, 6):  # 1 to 3 were the best in turn
        with pytest.warns(RuntimeWarning, match=r"step-\d could not be deleted: \[Errno 16\] busy"):
            save(tmp_path, step)
        assert newest(tmp_path) == step


def test_tensors_that_are_not_finite_are_not_saved(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="step 2 was not saved: head.weight has NaN"):
        save_checkpoint(tmp_path, 2, {"head.weight": torch.tensor([float("nan")])}, {}, {}, {}, False)
    assert newest(tmp_path) == 1


def test_a_full_disk_in_the_middle_of_training(tmp_path, monkeypatch, capsys):
    """As the user sees it: what is saved, what went wrong, and that the printed command goes on from there."""
    use_tiny(monkeypatch)
    run(settings(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        run(settings(tmp_path / "counted"))
    second = next(i for i, op in enumerate(disk.ops) if op[0] == "mkdir" and op[1].name == ".partial-step-8")
    with monkeypatch.context() as patch:
        Disk(patch, second + 4, refuse(errno.ENOSPC))
        assert exit_code(lambda: run(settings(tmp_path / "run")) and 0) == 2
    printed = capsys.readouterr()
    assert "stopped; saved up to step 4, continue with" in printed.out
    assert "error: step 8 could not be saved: [Errno 28] No space left on device" in printed.err
    assert main(["train", "--save-dir", str(tmp_path / "run"), "--resume", "auto"]) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_a_file_system_that_takes_no_more(tmp_path):
    """Not a stand-in: the kernel refuses to let a file grow."""
    save(tmp_path, 1)

    def save_large():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(CheckpointError, match=r"step 2 could not be saved: \[Errno 27\] File too large"):
            save_checkpoint(tmp_path, 2, {"x": torch.zeros(4096)}, {}, {}, {}, False)

    assert in_child(save_large) == 0
    assert newest(tmp_path) == 1 and not list(tmp_path.glob("checkpoints/.*"))


def test_what_a_killed_save_leaves_is_removed_by_the_next(tmp_path):
    """Each name a save can be killed at, planted."""
    save(tmp_path, 1)
    for name in (".partial-step-2", ".deleted-step-0"):
        (tmp_path / "checkpoints" / name).mkdir()
    for name in (".best.new", ".last.new"):
        (tmp_path / "checkpoints" / name).symlink_to("step-1")
    save(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best", "last", "step-1", "step-2"]


def test_people_stay_in_the_training_checkpoint(tmp_path, monkeypatch):
    """A row of the identity matrix tells who a training person is: no shared file has it, nor a tensor per person."""
    use_tiny(monkeypatch)
    step = run(settings(tmp_path / "run", embedding_dim=6)) / "checkpoints" / "last"
    people = load_file(step / "training.safetensors")["margin.weight"]
    assert people.shape == (8, 6)
    shared = load_file(step / "model.safetensors")
    assert not any("margin" in name or tensor.shape == people.shape for name, tensor in shared.items())
    data = b"".join((step / name).read_bytes() for name in MODEL_FILES)
    assert not any(row.numpy().tobytes() in data for row in people)
    assert all(row.numpy().tobytes() in (step / "training.safetensors").read_bytes() for row in people)


def test_a_read_only_run_directory_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vitface.training.run.folder_lock", lambda path: refuse(errno.EROFS)())
    use_tiny(monkeypatch)
    (tmp_path / "run").mkdir()
    assert exit_code(lambda: run(settings(tmp_path / "run")) and 0) == 2
    assert "Read-only file system" in capsys.readouterr().err
