"""A run that was stopped, in whatever way, ends as if it had not been; and what would break that is noticed."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from disk import Disk
from matrix import ROWS, sizes
from PIL import Image
from safetensors.torch import load_file, save
from tiny import EPOCHS, STEPS_PER_EPOCH, Faces, fingerprint, in_child, settings, start, use_tiny

from vitface.config import BOOKKEEPING
from vitface.data.formats.samples import FolderSamples
from vitface.errors import CheckpointError, exit_code
from vitface.lock import folder_lock
from vitface.training import loop, setup
from vitface.training.loop import Trainer
from vitface.training.run import run
from vitface.training.runs import state as run_state
from vitface.training.runs.checkpoint import save_checkpoint
from vitface.training.runs.log import RunLog
from vitface.training.runs.resume import configure

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
STEPS = EPOCHS * STEPS_PER_EPOCH


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    use_tiny(monkeypatch)


def killed_run(monkeypatch, run_dir, step, operation=None):
    """Starts a run that is killed at `step` before its update; or at an operation of the save after that step."""

    def train():
        if operation is None:
            taken = iter(range(1, STEPS + 1))
            update = loop.update

            def deadly(*arguments):
                if next(taken) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return update(*arguments)

            monkeypatch.setattr(loop, "update", deadly)
        else:
            save_step = run_state.save_checkpoint

            def deadly_save(*arguments):
                if arguments[1] == step:
                    Disk(monkeypatch, operation, lambda: os.kill(os.getpid(), signal.SIGKILL))
                save_step(*arguments)

            monkeypatch.setattr(run_state, "save_checkpoint", deadly_save)
        run(settings(run_dir))

    assert in_child(train) == -signal.SIGKILL


@sizes("kill training")
def test_a_killed_run_ends_as_if_unbroken(tmp_path, monkeypatch, ran, cases):
    run(settings(tmp_path / "whole"))
    expected = fingerprint(tmp_path / "whole")
    at_steps = [(step, None) for step in range(1, STEPS + 1)]
    in_saves = [(step, operation) for step in (4, 8, 12) for operation in (1, 6, 17, 20)]
    points = (at_steps + in_saves)[:: (len(at_steps) + len(in_saves)) // cases]
    assert len(points) == cases
    for step, operation in points:
        run_dir = tmp_path / f"{step}-{operation}"
        killed_run(monkeypatch, run_dir, step, operation)
        run(configure({"save_dir": str(run_dir), "resume": "auto", "num_workers": 0}))
        assert fingerprint(run_dir) == expected, (step, operation)
        shutil.rmtree(run_dir)
    ran(ROWS["kill training"].fault, cases)


def changed_tensor(name):
    def change(model, training, state):
        tensors = model if name in model else training
        tensors[name] = tensors[name] + 1 if not tensors[name].is_floating_point() else tensors[name] * 1.001 + 1e-4

    return change


def changed_counter(name, value):
    def change(model, training, state):
        assert state["progress"][name] != value
        state["progress"][name] = value

    return change


CONTROLS = {
    "adapter A": changed_tensor("vit.blocks.0.attn.qkv.lora_a"),
    "adapter B": changed_tensor("vit.blocks.1.attn.proj.lora_b"),
    "router": changed_tensor("router.fc2.bias"),
    "embedding head": changed_tensor("head.proj.weight"),
    "running mean": changed_tensor("head.norm.running_mean"),
    "batches seen": changed_tensor("head.norm.num_batches_tracked"),
    "identity matrix": changed_tensor("margin.weight"),
    "AdaFace statistics": changed_tensor("margin.margin.norm_mean"),
    "first moment": changed_tensor("optimizer.0.exp_avg"),
    "step of the optimiser": changed_tensor("optimizer.3.step"),
    "loss of the epoch": changed_counter("epoch_loss", 1.0),
    "best epoch": changed_counter("best_auc", 2.0),
}


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that was stopped after step 6, in the middle of an epoch, and one that was not."""
    run(settings(tmp_path / "whole"))
    stop_at(6, tmp_path / "stopped", monkeypatch)
    return tmp_path / "stopped", fingerprint(tmp_path / "whole")


def stop_at(step, run_dir, monkeypatch):
    with monkeypatch.context() as patch:
        taken, update = iter(range(1, STEPS + 1)), loop.update

        def interrupted(*arguments):
            if next(taken) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*arguments)

        patch.setattr(loop, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings(run_dir))


def resume(run_dir, **changes):
    return run(configure({"save_dir": str(run_dir), "resume": "auto", **changes}))


@sizes("mutated controls")
def test_controls(tmp_path, stopped, ran, cases):
    """Every item of the state is needed: with one changed, the run ends elsewhere."""
    run_dir, expected = stopped
    chosen = list(CONTROLS)[:: len(CONTROLS) // cases]
    for name in chosen:
        changed = tmp_path / name
        shutil.copytree(run_dir, changed, symlinks=True)
        step = changed / "checkpoints" / "step-6"
        model, training = (load_file(step / f"{part}.safetensors") for part in ("model", "training"))
        model, training = ({k: v.clone() for k, v in part.items()} for part in (model, training))
        config, state = (json.loads((step / f"{part}.json").read_text()) for part in ("model", "training"))
        CONTROLS[name](model, training, state)
        shutil.rmtree(step)
        save_checkpoint(changed, 6, model, config, training, state, is_best=False)
        resume(changed)
        assert fingerprint(changed) != expected, name
    resume(run_dir)
    assert fingerprint(run_dir) == expected
    assert len(chosen) == cases
    ran(ROWS["mutated controls"].fault, cases)


def disturb(monkeypatch):
    """The run and every step of it begin with other global random states; the run has none that matter."""
    seeds, update = random.Random(0), loop.update

    def disturbed(*arguments):
        seed = seeds.randrange(1 << 30)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return update(*arguments) if arguments else None

    disturbed()

    monkeypatch.setattr(loop, "update", disturbed)


def without_judging(monkeypatch):
    monkeypatch.setattr(loop.Trainer, "judge_held_out", lambda self: (None, {}))


def judging_twice(monkeypatch):
    judge = loop.Trainer.judge_held_out
    monkeypatch.setattr(loop.Trainer, "judge_held_out", lambda self: judge(self) and judge(self))


def saving_every_step(monkeypatch):
    update_log, save_now = RunLog.step, loop.Trainer.save
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    trainers = []
    fit = loop.Trainer.fit
    monkeypatch.setattr(loop.Trainer, "fit", lambda self, log: (trainers.append(self), fit(self, log))[1])
    monkeypatch.setattr(RunLog, "step", lambda self, **v: (update_log(self, **v), save_now(trainers[-1], False))[0])


def logging_every(steps):
    return lambda monkeypatch: monkeypatch.setattr(loop, "LOG_EVERY", steps)


def tracking(monkeypatch):
    rows = []
    monkeypatch.setattr("vitface.training.runs.log._wandb", lambda run_dir, config: rows.append)


# what is switched -> (settings, change of the code, whether anything is written); every second one by default
SWITCHES = {
    "no worker": ({"num_workers": 0}, None, True),
    "1 worker": ({"num_workers": 1}, None, True),
    "2 workers, random states disturbed": ({"num_workers": 2}, disturb, True),
    "2 workers": ({"num_workers": 2}, None, True),
    "evaluation off": ({}, without_judging, True),
    "evaluation twice": ({}, judging_twice, True),
    "saving off": ({}, None, False),
    "saving and evaluation off": ({}, without_judging, False),
    "saving every step": ({}, saving_every_step, True),
    "logging off": ({}, logging_every(1000), True),
    "logging every step": ({}, logging_every(1), True),
    "logging to a tracker": ({"wandb": True}, tracking, True),
    "random states disturbed": ({}, disturb, True),
}


def trained(run_dir, monkeypatch, changes, switch, writes):
    """SHA-256 of every trained tensor, moment and buffer at the end of a run."""
    with monkeypatch.context() as patch:
        if switch is not None:
            switch(patch)
        config = setup.resolve_choices(settings(run_dir, **changes))
        if writes:
            run_dir.mkdir()
        trainer = Trainer(config, run_dir if writes else None)
        trainer.fit(RunLog(run_dir, config) if writes else None)
    assert trainer.state.progress.step == STEPS
    tensors = {**trainer.model.state_dict(), **trainer.state.tensors()}
    return hashlib.sha256(save({name: tensor.contiguous() for name, tensor in tensors.items()})).hexdigest()


@sizes("on and off")
def test_what_must_not_matter_does_not(tmp_path, monkeypatch, ran, cases):
    expected = trained(tmp_path / "plain", monkeypatch, {}, None, True)
    chosen = list(SWITCHES)[:: -(-len(SWITCHES) // cases)]
    for name in chosen:
        changes, switch, writes = SWITCHES[name]
        assert trained(tmp_path / name, monkeypatch, changes, switch, writes) == expected, name
    assert trained(tmp_path / "control", monkeypatch, {"seed": 1}, None, True) != expected
    assert len(chosen) == cases
    ran(ROWS["on and off"].fault, cases)


def test_training_consumes_no_global_random_numbers(tmp_path):
    trainer = Trainer(setup.resolve_choices(settings(tmp_path, augment="strong")), None)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trainer.fit(None)
    assert states[0] == random.getstate() and states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


def test_a_checkpoint_is_never_newer_than_its_log_on_the_disk(tmp_path, monkeypatch):
    run_dir, events = tmp_path / "run", []
    save_step, fsync = run_state.save_checkpoint, os.fsync

    def synced(descriptor):
        if os.path.samestat(os.fstat(descriptor), os.stat(run_dir / "log.jsonl")):
            events.append(("log", (run_dir / "log.jsonl").read_text().count("\n")))
        fsync(descriptor)

    def saved(*arguments):
        events.append(("saved", (run_dir / "log.jsonl").read_text().count("\n")))
        save_step(*arguments)

    monkeypatch.setattr("vitface.training.runs.log.os", SimpleNamespace(fsync=synced))
    monkeypatch.setattr(run_state, "save_checkpoint", saved)
    run(settings(run_dir))
    rows = (1, 2, 4)  # one at the end of each epoch, and one at step 10
    assert events == [(name, count) for count in rows for name in ("log", "saved")]


def test_a_second_process_on_one_run_directory_is_refused(tmp_path):
    with folder_lock(tmp_path):
        reader, writer = os.pipe()

        def second():
            os.write(writer, str(exit_code(lambda: run(settings(tmp_path)) and 0)).encode())
            with pytest.raises(CheckpointError, match=rf"in use by another process \(process {os.getppid()}\)"):
                run(settings(tmp_path))

        assert in_child(second) == 0
        assert os.read(reader, 10) == b"2"
    run(settings(tmp_path))


def test_the_lock_of_a_dead_process_never_blocks(tmp_path):
    reader, writer = os.pipe()

    def hold():
        with folder_lock(tmp_path):
            if os.fork() == 0:  # a data loading worker that outlives its run
                time.sleep(3)
                os._exit(0)
            os.write(writer, b"held")
            time.sleep(60)

    pid = start(hold)
    assert os.read(reader, 4) == b"held"
    with pytest.raises(CheckpointError, match=f"process {pid}"), folder_lock(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (tmp_path / ".lock").read_text() == f"process {pid}"
    with folder_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()}"


def test_changed_settings_are_refused_with_a_diff_or_taken_on_request(stopped):
    run_dir, expected = stopped
    with pytest.raises(CheckpointError, match=r"step-6 was trained with other settings.*\n  --lr: 0\.0005 -> 0\.001$"):
        resume(run_dir, lr=1e-3)
    settings_file = run_dir / "config.json"
    saved = json.loads(settings_file.read_text())
    settings_file.write_text(json.dumps({**saved, "lr": 1e-3}))  # the checkpoint knows better
    with pytest.raises(CheckpointError, match=r"--lr: 0\.0005 -> 0\.001$"):
        resume(run_dir)
    settings_file.write_text(json.dumps(saved))
    resume(run_dir, lr=1e-3, allow_changed=True)
    steps = [
        row["step"] for row in map(json.loads, (run_dir / "log.jsonl").read_text().splitlines()) if "alarms" in row
    ]
    assert steps == [4, 10, 14]  # the second epoch started again at step 6
    assert (run_dir / "checkpoints" / "last").resolve().name == "step-14"
    assert fingerprint(run_dir)["model.safetensors"] != expected["model.safetensors"]
    assert json.loads(settings_file.read_text())["lr"] == 1e-3


def test_flags_that_do_not_shape_the_training_may_change(stopped):
    """A run that goes on with others ends as if unbroken; within this budget both blocks are recomputed."""
    run_dir, expected = stopped
    others = {"num_workers": 1, "pack": False, "save_every": 5, "memory_budget": 4.5e-4, "val_data": str(run_dir)}
    elsewhere = {"weights", "save_dir", "resume", "allow_changed", "wandb", "tensorboard"}  # tested on their own
    assert others.keys() | elsewhere | {"device"} == BOOKKEEPING
    resume(run_dir, **others)
    assert fingerprint(run_dir) == expected


def test_more_epochs_for_a_finished_run(tmp_path, capsys):
    run(settings(tmp_path / "run"))
    assert exit_code(lambda: resume(tmp_path / "run", epochs=4) and 0) == 2
    assert "--epochs: 3 -> 4" in capsys.readouterr().err
    resume(tmp_path / "run", epochs=4, allow_changed=True)
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == f"step-{4 * STEPS_PER_EPOCH}"


def test_other_settings_continue_from_the_newest_step_only(tmp_path):
    run(settings(tmp_path / "run"))
    older = tmp_path / "run" / "checkpoints" / "step-8"
    with pytest.raises(CheckpointError, match="move step-12 out of the way"):
        run(configure({"resume": str(older), "lr": 1e-3, "allow_changed": True}))


class OtherFaces(Faces):
    def __init__(self, people=10):
        self.labels = np.repeat(np.arange(people), 5)
        self.names = [str(i) for i in range(people)]


def test_changed_data_is_refused_or_taken_on_request(stopped, monkeypatch):
    run_dir, _ = stopped
    monkeypatch.setattr(setup, "open_inputs", lambda config: OtherFaces())
    with pytest.raises(CheckpointError, match=r"is not the data .*\n  data, images: 32 -> 40\n  data, sha256: "):
        resume(run_dir)
    resume(run_dir, allow_changed=True)
    assert (run_dir / "checkpoints" / "last").resolve().name == "step-16"  # 6, and twice 5 of the larger set
    monkeypatch.setattr(setup, "open_inputs", lambda config: OtherFaces(11))
    with pytest.raises(CheckpointError, match=r"margin.weight is torch.float32 \(8, 8\), expected .* \(9, 8\)"):
        resume(run_dir, allow_changed=True, epochs=4)


def test_best_is_right_after_a_kill_between_a_checkpoint_and_its_links(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Trainer, "judge_held_out", lambda self: (self.state.progress.step / 100, {}))
    run(settings(tmp_path / "run"))
    before = fingerprint(tmp_path / "run")
    parent = tmp_path / "run" / "checkpoints"
    for link in ("best", "last"):
        (parent / link).unlink()
        (parent / link).symlink_to("step-8")
    resume(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == before
    assert before["best"] == "step-12"


def test_settings_of_a_run_hold_what_shapes_it(tmp_path):
    config = settings(tmp_path)
    kept = loop.settings_of(config)
    assert {"lr", "seed", "train_data", "batch_size", "epochs"} <= set(kept)
    assert not {"save_dir", "num_workers", "resume", "allow_changed"} & set(kept)
    assert set(kept) < set(dataclasses.asdict(config))


class ChangedFaces(Faces):
    def __init__(self, **changes):
        super().__init__()
        vars(self).update(changes)

    files = None  # which `changes` may name


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"names": list("9876543210")}, "names"),
        ({"pixels": "other"}, "pixels"),
        ({"files": "other"}, "files"),
        ({"domains": 1 - np.arange(40) % 2}, "domain labels"),
        ({}, None),
        ({"pixels": None, "files": None}, None),
    ],
)
def test_exchanged_people_pixels_and_domain_labels_are_other_data(tmp_path, monkeypatch, changes, what):
    """The numbers and labels of the images are the same in all cases; the last two are the controls."""
    own = {"pixels": "packed", "files": "sizes", "domains": np.arange(40) % 2}
    monkeypatch.setattr(setup, "open_inputs", lambda config: ChangedFaces(**own))
    stop_at(3, tmp_path / "run", monkeypatch)
    monkeypatch.setattr(setup, "open_inputs", lambda config: ChangedFaces(**{**own, **changes}))
    if what is None:
        resume(tmp_path / "run")
        return
    with pytest.raises(CheckpointError, match=rf"is not the data (.|\n)*data, {what}: "):
        resume(tmp_path / "run")


def test_exchanged_photos_are_other_files(tmp_path):
    """Of a folder that is not packed names and sizes are known; a copy of it is the same set."""
    for i in range(4):
        path = tmp_path / "faces" / f"person {i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32 + i, 32)).save(path)
    shutil.copytree(tmp_path / "faces", tmp_path / "copy", copy_function=shutil.copyfile)
    before = FolderSamples(tmp_path / "faces").files
    assert before == FolderSamples(tmp_path / "copy").files != FolderSamples(tmp_path / "copy").identity()
    Image.new("RGB", (80, 80), "red").save(tmp_path / "copy" / "person 0" / "0.jpg")
    assert FolderSamples(tmp_path / "copy").files != before
