"""Run directories that were copied, moved, or lie on disks that lack something."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from cases import case
from conftest import tiny_config, tiny_vit

import vitface.lock
from vitface import files
from vitface.__main__ import load_command, main
from vitface.commands.inputs import newest_run
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import Benchmark
from vitface.presets import VIT_PRESETS
from vitface.store.backbone import save_backbone
from vitface.store.faces import best_checkpoint, open_checkpoint, step_directories
from vitface.training import setup

KIND = "Runs on other disks"
TINY = ["--image-size", "32", "--train-data", "synthetic", "--device", "cpu", "--head", "bn", "--embedding-dim", "8"]
TINY += ["--lora-rank", "2", "--batch-size", "8", "--num-workers", "0", "--dtype", "fp32", "--holdout-people", "3"]


@pytest.fixture(autouse=True)
def few(tmp_path, monkeypatch):
    """A backbone file of two small blocks, 8 synthetic people of 4 photos, no benchmark, in an empty folder."""
    monkeypatch.setitem(VIT_PRESETS, "tiny", tiny_config())
    monkeypatch.setattr(setup, "SYNTHETIC_PEOPLE", 8)
    monkeypatch.setattr(setup, "SYNTHETIC_IMAGES", 4)
    monkeypatch.setattr("vitface.training.setup.final_benchmarks", lambda config: [])
    monkeypatch.setattr("vitface.training.finish.final_benchmarks", lambda config: [])
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    vit = tiny_vit(seed=3)
    save_backbone(tmp_path / "mine.safetensors", "tiny", vit.config, vit.state_dict(), {"file": "x", "licence": "none"})


def train(*more, save_dir="run"):
    return main(
        ["train", "--backbone", "tiny", "--weights", "mine.safetensors", *TINY, "--save-dir", str(save_dir), *more]
    )


def resume(run, *more):
    return main(["train", "--save-dir", str(run), "--resume", "auto", *more])


def lack(monkeypatch, name, number):
    """`os.NAME` fails as on a disk that lacks it."""

    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), name: refuse}))


@case("a run copied with `cp -rL`, by a cloud drive or a zip: folders where links were", "`--resume auto` trains on")
def test_a_copy_without_links(tmp_path):
    assert train("--epochs", "1") == 0
    shutil.copytree("run", "copy")  # which follows links
    assert not (tmp_path / "copy" / "checkpoints" / "best").is_symlink()
    assert resume("copy", "--epochs", "2", "--allow-changed") == 0
    (newest, *_) = step_directories(Path("copy"))
    assert newest.name == "step-4" and open_checkpoint("copy/checkpoints/last").folder == newest.resolve()
    assert open_checkpoint("copy").is_best and not open_checkpoint("run/checkpoints/step-2").folder.is_symlink()


@case("the copy's folder `checkpoints/best`, named by hand", "is known as the best checkpoint")
def test_the_copied_best_is_the_best():
    assert train("--epochs", "1") == 0
    shutil.copytree("run", "copy")
    assert open_checkpoint("copy/checkpoints/best").is_best


@case("a copy of which only the folder `best` is left", "it is not deleted when training starts again")
def test_a_copy_that_is_all_that_is_left():
    assert train("--epochs", "1") == 0
    shutil.copytree("run", "copy")
    shutil.rmtree("copy/checkpoints/step-2")
    shutil.rmtree("copy/checkpoints/last")
    assert train("--epochs", "1", "--resume", "auto", "--save-every", "1", save_dir="copy") == 0
    assert Path("copy/checkpoints/best/manifest.json").is_file()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(errno.EPERM, marks=case("a disk without symlinks (exFAT, SMB)", "trains, saves, resumes")),
        pytest.param(errno.ENOTSUP, marks=case("the same, where the system says `not supported`", "the same")),
    ],
)  # fmt: skip
def test_a_disk_without_links(number, monkeypatch):
    with monkeypatch.context() as patch:
        lack(patch, "symlink", number)
        assert train("--epochs", "2") == 0
        assert sorted(path.name for path in Path("run/checkpoints").iterdir()) == ["step-2", "step-4"]
        assert resume("run", "--epochs", "3", "--allow-changed") == 0
    assert open_checkpoint("run").folder == best_checkpoint(Path("run")).resolve()
    assert train("--epochs", "3", save_dir="linked") == 0
    assert (Path("linked/checkpoints/best")).resolve().name == best_checkpoint(Path("linked")).name


@case("a disk that cannot fsync a folder (SMB, some FUSE)", "trains and saves")
def test_a_disk_without_fsync_of_folders(monkeypatch):
    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(files, "os", SimpleNamespace(**{**vars(os), "fsync": fsync}))
    assert train("--epochs", "1") == 0


@case("a disk without locks (some NFS and FUSE)", "says that nothing keeps a second process out, and trains")
def test_a_disk_without_locks(monkeypatch, capsys):
    def no_lock(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(vitface.lock, "_lock", no_lock)
    assert train("--epochs", "1") == 0
    assert "run/.lock: this disk has no locks" in capsys.readouterr().err


@case("a read-only run", "`evaluate` prints the table, warns, writes `--json`; exit code 0")
def test_a_read_only_run(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "synthetic", Benchmark("synthetic", 40))
    benchmarks._synthetic_benchmark.cache_clear()
    monkeypatch.setattr("vitface.evaluation.benchmarks.judge", lambda name, result: [])

    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("vitface.evaluation.scores.waiting_lock", read_only)
    flags = ["--bench", "synthetic", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", "--checkpoint", str(tiny_run), *flags]) == 0
    printed = capsys.readouterr()
    assert "synthetic" in printed.out and (tmp_path / "out.json").is_file()
    assert (
        f"warning: {tiny_run} cannot be written to (Read-only file system), so the scores were not kept" in printed.err
    )
    benchmarks._synthetic_benchmark.cache_clear()


@case("a backbone file that was moved, then `evaluate`", "where it was, where it was looked for, and `--weights`")
def test_a_backbone_that_was_moved(tmp_path, capsys):
    assert train("--epochs", "1") == 0
    os.rename("mine.safetensors", "moved.safetensors")
    assert main(["evaluate", "--checkpoint", "run", "--bench", "synthetic", "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'mine.safetensors'}: not there" in printed and "with --weights FILE" in printed
    assert "fetch" not in printed
    assert main(["info", "run"]) == 0


@case("a backbone file that was moved, then `--resume auto`", "the same; with `--weights` it goes on")
def test_a_backbone_that_was_moved_before_resuming(tmp_path, capsys):
    assert train("--epochs", "1") == 0
    os.rename("mine.safetensors", "moved.safetensors")
    assert resume("run", "--epochs", "2", "--allow-changed") == 2
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'mine.safetensors'} is not there; if the backbone's file was moved" in printed
    assert resume("run", "--epochs", "2", "--allow-changed", "--weights", "moved.safetensors") == 0


@pytest.mark.parametrize(
    ("command", "words", "name"),
    [
        pytest.param("train", ["--save-dir=~/x"], "save_dir", marks=case("`--save-dir=~/x`", "the home folder")),
        pytest.param("train", ["--weights", "~/x"], "weights", marks=case("`--weights '~/x'`", "the home folder")),
        pytest.param("evaluate", ["--json=~/x"], "json", marks=case("`--json=~/x` of evaluate", "the home folder")),
    ],
)  # fmt: skip
def test_home_is_expanded_in_flags(command, words, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(vars(load_command(command)[1].parse_args(words))[name]) == str(tmp_path / "x")


def test_the_newest_run_is_found_without_links(tmp_path):
    for name in ("first", "second"):
        assert train("--epochs", "1", save_dir=f"runs/{name}") == 0
        for link in ("best", "last"):
            Path(f"runs/{name}/checkpoints/{link}").unlink()
    assert newest_run() == Path("runs/second")
