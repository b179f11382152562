import csv
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_face
from PIL import Image
from safetensors.torch import load_file

import vitface
from vitface.__main__ import main
from vitface.config import resolve
from vitface.data.loader import epoch_order, read_batches, split_people
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.errors import CheckpointError, ConfigError, DataError, exit_code
from vitface.evaluation import benchmarks
from vitface.metrics import auc
from vitface.model.margin import MarginLoss, make_margin
from vitface.recogniser import Recogniser
from vitface.training import loop, setup
from vitface.training.loop import Trainer
from vitface.training.run import run
from vitface.training.runs import resume
from vitface.training.runs.resume import configure
from vitface.training.setup import resolve_choices
from vitface.training.step import parameter_groups, schedule, update

ROOT = Path(__file__).parents[2]
SMALL = dict(
    backbone="vit_nano",
    weights="random",
    image_size=64,
    train_data="synthetic",
    val_data=None,
    dtype="fp32",
    device="cpu",
    batch_size=8,
    epochs=2,
    holdout_people=3,
    num_workers=0,
    embedding_dim=16,
    lora_rank=2,
)


KINDS = {"dalora": {"use_dalora": True}, "adaface": {"loss": "adaface"}, "growing": {"image_size": "32:1,64"}}


@pytest.fixture(autouse=True, scope="module")
def few_faces():
    """8 synthetic people with 4 photos each, so an epoch is two steps, and 20 benchmark pairs."""
    benchmarks._synthetic_benchmark.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "SYNTHETIC_PEOPLE", 8)
        patch.setattr(setup, "SYNTHETIC_IMAGES", 4)
        patch.setitem(benchmarks.BENCHMARKS, "synthetic", benchmarks.Benchmark("synthetic", 20))
        yield
    benchmarks._synthetic_benchmark.cache_clear()


@pytest.fixture(scope="module")
def unbroken(few_faces, tmp_path_factory):
    """Run directories by kind, of runs that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    return {kind: run(resolve({**SMALL, **flags, "save_dir": str(folder / kind)})) for kind, flags in KINDS.items()}


def fingerprint(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every file of the last checkpoint."""
    last = run_dir / "checkpoints" / "last"
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.iterdir()}


def read_log(run_dir: Path) -> list[dict]:
    with open(run_dir / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def losses(run_dir: Path) -> list:
    return [(row["step"], row["loss"]) for row in map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())]


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    config = resolve({**SMALL, "use_dalora": True, "save_dir": str(tmp_path / "run")})
    assert run(config) == tmp_path / "run"
    printed = capsys.readouterr().out
    for part in ("config: ", "device: cpu, fp32", "adapters", "identities", "estimated time", "frozen backbone"):
        assert part in printed
    settings = printed[printed.index("config: ") : printed.index("\ndata: ")]
    assert settings.startswith("config: defaults with backbone vit_nano, ") and "lora_rank 2" in settings
    assert "weight_decay" not in settings and "dtype" not in settings
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["use_dalora"] is True and saved["weight_decay"] == 0.05
    rows = read_log(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(np.isfinite(float(row["loss"])) and 0 <= float(row["holdout_auc"]) <= 1 for row in rows)
    assert "adapted, best epoch" in (tmp_path / "run" / "results.md").read_text()
    best = tmp_path / "run" / "checkpoints" / "best"
    assert not Path(best.readlink()).is_absolute()
    scores = [float(row["holdout_auc"]) for row in rows]
    assert best.resolve().name == f"step-{rows[max(range(2), key=lambda i: (scores[i], i))]['step']}"
    model = vitface.load(tmp_path / "run")
    assert model.domain_weights(np.zeros((1, 112, 112, 3), np.uint8)).shape == (1, 3)
    assert all(p.abs().max() > 0 for name, p in model.model.named_parameters() if name.endswith("lora_b"))


def test_synthetic_domains_are_learned_unless_told_not_to():
    for labels, known in ((None, True), ("none", False)):
        trainer = Trainer(resolve_choices(resolve({**SMALL, "use_dalora": True, "domain_labels": labels})), None)
        _, losses = trainer._step(trainer._batches())
        assert (trainer.data.domains is not None) == known == ("domain_loss" in losses)


@pytest.mark.parametrize(
    ("kind", "stop_at", "number"),
    [
        ("adaface", 1, signal.SIGINT),
        ("dalora", 2, signal.SIGINT),
        ("adaface", 3, signal.SIGTERM),
        ("dalora", 4, signal.SIGTERM),
        ("growing", 1, signal.SIGTERM),
        ("growing", 2, signal.SIGINT),
        ("growing", 3, signal.SIGTERM),
    ],
)
def test_resume_is_bit_exact_from_any_step(tmp_path, monkeypatch, unbroken, kind, stop_at, number):
    """A signal in the middle of a step: the step is finished, the run saved, and its resumption ends as if unbroken."""
    steps = []

    def signalled(*arguments):
        steps.append(len(steps) + 1)
        if len(steps) == stop_at:
            os.kill(os.getpid(), number)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", signalled)
        with pytest.raises(KeyboardInterrupt):
            run(resolve({**SMALL, **KINDS[kind], "save_dir": str(tmp_path / "broken")}))
    assert len(steps) == stop_at
    assert (tmp_path / "broken" / "checkpoints" / "last").resolve().name == f"step-{stop_at}"
    run(configure({"save_dir": str(tmp_path / "broken"), "resume": "auto", "num_workers": 1}))
    both = (unbroken[kind], tmp_path / "broken")
    assert fingerprint(both[0]) == fingerprint(both[1])
    assert (tmp_path / "broken" / "results.md").is_file()
    logs = [[{**row, "img_per_s": 0} for row in read_log(folder)] for folder in both]
    assert logs[0] == logs[1]
    best = [(folder / "checkpoints" / "best").resolve().name for folder in both]
    assert best[0] == best[1]


def test_ctrl_c_is_answered_once(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    monkeypatch.setattr(loop, "update", interrupted)
    assert exit_code(lambda: run(resolve({**SMALL, "save_dir": str(tmp_path / "run")})) and 0) == 130
    out, err = capsys.readouterr()
    again = f"vitface train --save-dir {tmp_path / 'run'} --resume auto"
    assert err.endswith(f"stopped; saved up to step 1, continue with\n  {again}\n")
    assert (out + err).count("stopped") == 1


def test_two_runs_are_bitwise_equal_and_seeds_differ(tmp_path, unbroken):
    again, other = (
        run(resolve({**SMALL, "use_dalora": True, "save_dir": str(tmp_path / str(seed)), "seed": seed}))
        for seed in (0, 1)
    )
    assert fingerprint(again) == fingerprint(unbroken["dalora"])
    assert losses(again) == losses(unbroken["dalora"]) != losses(other)


def test_resume_of_a_finished_run_says_so(tmp_path, capsys):
    config = resolve({**SMALL, "save_dir": str(tmp_path / "run"), "epochs": 1, "resume": "auto"})
    run(config)  # nothing there yet: starts afresh
    before = fingerprint(tmp_path / "run")
    capsys.readouterr()
    run(config)
    assert "is finished" in capsys.readouterr().out
    assert fingerprint(tmp_path / "run") == before


def test_a_run_directory_is_never_overwritten_nor_continued_with_other_settings(tmp_path):
    flags = {**SMALL, "save_dir": str(tmp_path / "run"), "epochs": 1}
    run(resolve(flags))
    with pytest.raises(CheckpointError, match=r"already holds a run \(config\.json\); add --resume auto"):
        run(resolve(flags))
    with pytest.raises(
        CheckpointError, match=r"add --allow-changed:\n  --margin: 0\.35 -> 0\.2\n  --lr: 0\.0005 -> 0\.1"
    ):
        run(resolve({**flags, "resume": "auto", "lr": 0.1, "margin": 0.2}))
    assert configure({"save_dir": flags["save_dir"], "resume": "auto"}).batch_size == 8
    step = tmp_path / "run" / "checkpoints" / "last"
    assert configure({"resume": str(step)}).save_dir == str(tmp_path / "run")
    assert main(["train", "--resume", str(step), "--lr", "0.1"]) == 2
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(resolve({**flags, "resume": str(tmp_path)}))
    with pytest.raises(ConfigError, match="leave --save-dir"):
        configure({"resume": str(tmp_path / "run"), "save_dir": str(tmp_path / "other")})


def test_resume_refuses_another_backbone_other_data_and_damaged_settings(tmp_path, monkeypatch, capsys):
    run(resolve({**SMALL, "save_dir": str(tmp_path / "run")}))
    step = tmp_path / "run" / "checkpoints" / "step-2"
    assert main(["train", "--resume", str(step), "--weights", str(ROOT / "weights" / "vit_nano.safetensors")]) == 2
    assert "another backbone file" in capsys.readouterr().err
    monkeypatch.setattr(setup, "SYNTHETIC_IMAGES", 5)
    assert main(["train", "--resume", str(step)]) == 2
    assert "is not the data" in capsys.readouterr().err
    config = tmp_path / "run" / "config.json"
    good = json.loads(config.read_text())
    for bad in ("{", "[]", json.dumps({**good, "colour": 1})):
        config.write_text(bad)
        assert main(["train", "--save-dir", str(tmp_path / "run"), "--resume", "auto"]) == 2
        assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("refused", ["a full disk", "a read-only folder"])
def test_what_the_system_refuses_is_said_without_a_traceback(tmp_path, monkeypatch, capsys, refused):
    command = ["--backbone", "vit_nano", "--weights", "random", "--image-size", "112", "--train-data", "synthetic"]
    command += ["--batch-size", "8", "--epochs", "1", "--holdout-people", "3", "--num-workers", "0", "--device", "cpu"]

    def refuse(*arguments, **options):
        raise OSError(28 if refused == "a full disk" else 30, refused)

    monkeypatch.setattr("vitface.training.runs.checkpoint.write_synced", refuse)
    assert main(["train", *command, "--save-dir", str(tmp_path / "run")]) == 2
    assert refused in capsys.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    flags = {**SMALL, "save_dir": str(tmp_path / "run")}
    run(resolve(flags))
    expected = fingerprint(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-4" / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:-64] + bytes(64))  # the zeroed tail a power loss leaves
    run(resolve({**flags, "resume": "auto"}))
    assert fingerprint(tmp_path / "run") == expected
    for step in ("step-2", "step-4"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
        (tmp_path / "run" / "checkpoints" / step).mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole"):
        run(resolve({**flags, "resume": "auto"}))


def test_overfits_a_few_people():
    """The whole path learns: adapters and head bring the loss of a handful of people down to almost nothing."""
    config = resolve_choices(
        resolve({**SMALL, "image_size": 112, "augment": "none", "scale": 16.0, "epochs": 30, "holdout_people": 0})
    )
    trainer = Trainer(config, None)
    trainer.fit(None)
    trainer.model.eval()
    images = np.stack([trainer.data.samples.read(i) for i in range(32)])
    embeddings, labels = Recogniser(trainer.model).embed(images), trainer.data.samples.labels
    first, second = np.triu_indices(32, 1)
    assert auc((embeddings @ embeddings.T)[first, second], labels[first] == labels[second]) > 0.99


def test_held_out_people_never_train():
    samples = setup.open_inputs(resolve(SMALL))
    split = split_people(samples, holdout_people=3, max_samples=None, seed=0)
    held, trained = set(samples.labels[split.held_out]), set(samples.labels[split.indices])
    assert len(held) == 3
    assert not held & trained
    assert sorted(set(split.labels)) == list(range(5)) and split.num_people == 5
    for label in range(5):
        assert len(set(samples.labels[split.indices[split.labels == label]])) == 1
    assert set(samples.labels[split_people(samples, 3, None, seed=1).held_out]) != held
    assert len(split_people(samples, 3, 10, seed=0).indices) == 10
    with pytest.raises(ConfigError, match="lower --holdout-people"):
        split_people(samples, 7, None, seed=0)


def test_order_is_a_permutation_of_seed_and_epoch():
    first = epoch_order(100, 0, 0)
    np.testing.assert_array_equal(np.sort(first), np.arange(100))
    np.testing.assert_array_equal(first, epoch_order(100, 0, 0))
    assert (first != epoch_order(100, 0, 1)).any()
    assert (first != epoch_order(100, 1, 0)).any()


def test_packed_decoded_and_any_number_of_workers_train_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    faces = SyntheticSamples(6, 4)
    for i in range(len(faces)):
        folder = tmp_path / "people" / faces.names[faces.labels[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(faces.read(i)).save(folder / f"{i:02d}.jpg", quality=95)
    flags = {**SMALL, "train_data": str(tmp_path / "people"), "epochs": 1, "holdout_people": 2, "batch_size": 4}
    ways = {"packed": {}, "again": {}, "decoded": {"pack": False}, "workers": {"pack": False, "num_workers": 2}}
    for name, changes in ways.items():
        run(resolve({**flags, **changes, "save_dir": str(tmp_path / name)}))
    printed = capsys.readouterr().out
    assert printed.count(f"packing {tmp_path / 'people'} into") == 1
    known = set()
    for name in ways:  # of packed images their SHA-256 is known, of others the names and sizes of files
        last = tmp_path / name / "checkpoints" / "last"
        state = json.loads((last / "training.json").read_text())
        known.add((state["data"].pop("pixels"), state["data"].pop("files")))
        ways[name] = [state, *((last / file).read_bytes() for file in ("model.safetensors", "training.safetensors"))]
    assert ways["packed"] == ways["again"] == ways["decoded"] == ways["workers"] and len(known) == 2
    assert sorted(map(str, map(bool, next(zip(*known, strict=True))))) == ["False", "True"]
    (packed,) = (path for path in (tmp_path / "home" / "packed").iterdir() if path.is_dir())
    run(resolve({**flags, "train_data": str(packed), "save_dir": str(tmp_path / "direct")}))
    direct, as_packed = fingerprint(tmp_path / "direct"), fingerprint(tmp_path / "packed")
    for name in ("model.safetensors", "training.safetensors"):  # the settings name another folder
        assert direct[name] == as_packed[name]
    with open(packed / "images.uint8", "r+b") as file:
        file.write(b"x" * 9)
    run(resolve({**flags, "save_dir": str(tmp_path / "mended")}))
    assert "is damaged in shard 0; pack the set again (which is done now)" in capsys.readouterr().out
    assert fingerprint(tmp_path / "mended") == fingerprint(tmp_path / "packed")


class Marked:
    """Sample i is an image of value i, but sample 7 is damaged."""

    def read(self, index):
        if index == 7:
            raise DataError("image 7 is damaged")
        return np.full((112, 112, 3), index, np.uint8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_arrive_in_order_and_name_a_bad_image(num_workers):
    indices = np.array([5, 3, 9, 1, 7])
    positions = [np.array([2, 0]), np.array([1, 3])]
    state = torch.get_rng_state()
    got = list(read_batches(Marked(), indices, positions, num_workers))
    assert [batch[:, 0, 0, 0].tolist() for _, batch in got] == [[9, 5], [3, 1]]
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DataError, match="^image 7 is damaged$"):
        list(read_batches(Marked(), indices, [np.array([4])], num_workers))


def test_schedule():
    factors = [schedule(step, 100, 25) for step in range(100)]  # a tenth of the run is the shorter warm-up
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.0, abs=4e-4)
    assert [schedule(step, 100, 4) for step in (0, 3, 4)] == [0.25, 1.0, 1.0]  # an epoch is
    assert schedule(0, 4, 2) == 1.0  # a run of four steps has none
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_weight_decay_spares_biases_and_norms():
    model, margin = tiny_face(num_domains=3), MarginLoss(make_margin("cosface", 0.35), 5, 8, 64.0)
    config = resolve({"lr": 1e-3, "identity_lr": 1e-2, "weight_decay": 0.1})
    groups = parameter_groups(model, margin, config)
    names = {id(p): name for name, p in [*model.named_parameters(), ("identities", margin.weight)]}
    decay = {names[id(p)]: (g["weight_decay"], g["peak_lr"]) for g in groups for p in g["params"]}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(decay) == trained | {"identities"}
    assert decay["identities"] == (0.1, 1e-2)
    for name in trained:
        assert decay[name] == (0.0 if name.endswith("bias") or "norm" in name else 0.1, 1e-3)


def test_train_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    command = ["--backbone", "clip", "--use-dalora", "--num-domains", "3", "--batch-size", "64", "--epochs", "40"]
    assert main(["train", *command, "--val-data", "benchmarks"]) == 2
    printed = capsys.readouterr().err
    assert "data/casia-webface does not exist" in printed and "--val-data benchmarks is no folder" in printed
    assert "vitface fetch clip_vitb16" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("backbone", "side", "trained"),
    [("vit_nano", 112, "247,299"), pytest.param("dinov2", 56, "1,623,555", marks=pytest.mark.slow)],
)
def test_dry_run_needs_nothing_and_writes_nothing(tmp_path, backbone, side, trained):
    """As a user would: a fresh process in an empty folder, the recorded DA-LoRA experiment on random weights."""
    command = [sys.executable, str(ROOT / "train.py"), "--exp", "exp_003", "--dry-run", "--wandb", "--patience", "3"]
    command += ["--backbone", backbone, "--image-size", str(side)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert trained in done.stdout
    assert not list(tmp_path.iterdir())


def test_checkpoints_keep_the_newest_two_and_the_best(tmp_path):
    from vitface.training.runs.checkpoint import save_checkpoint

    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"x": torch.tensor([1.0 * step])}, {}, {}, {}, is_best=step == 1)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-1", "step-3", "step-4"]
    assert load_file(tmp_path / "checkpoints" / "best" / "model.safetensors")["x"].item() == 1
    assert load_file(tmp_path / "checkpoints" / "last" / "model.safetensors")["x"].item() == 4


def test_a_setting_that_is_newer_than_the_checkpoint_changes_no_model(tmp_path, monkeypatch):
    """As for the settings of training: it had its default before there was one."""
    model = tiny_face(num_domains=3).config
    written = dataclasses.asdict(model)
    del written["gate_temperature"]
    (tmp_path / "model.json").write_text(json.dumps(written))
    config, data = resolve({}), {"images": 3, "pixels": None}
    state = {"settings": resume.settings_of(config), "data": data, "progress": {"step": 4, "first_step": 4}}
    monkeypatch.setattr(resume, "load_state", lambda checkpoint: state)
    assert resume.state_to_resume(tmp_path, config, model, data) == (state, False)
    with pytest.raises(CheckpointError, match="(?s)is of another model.*gate_temperature: 1.0 -> 0.5"):
        resume.state_to_resume(tmp_path, config, dataclasses.replace(model, gate_temperature=0.5), data)
