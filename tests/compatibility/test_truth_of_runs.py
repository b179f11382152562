"""What a run says of itself: its figures, its plan, and what was chosen on whom."""

import pytest
from cases import case

from vitface import device
from vitface.__main__ import main
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import Benchmark
from vitface.evaluation.scores import SCORES, load_scores
from vitface.recogniser import Recogniser
from vitface.training import setup

KIND = "Truth of texts and numbers: runs"
NANO = [
    "--backbone",
    "vit_nano",
    "--image-size",
    "112",
    "--train-data",
    "synthetic",
    "--device",
    "cpu",
    "--dtype",
    "fp32",
]
NANO += ["--val-data", "no-benchmarks", "--head", "bn", "--embedding-dim", "8", "--lora-rank", "2", "--batch-size", "8"]
NANO += ["--epochs", "1", "--num-workers", "0", "--holdout-people", "3"]


@pytest.fixture(autouse=True)
def few(tmp_path, monkeypatch):
    """8 synthetic people of 4 photos, a benchmark of 40 pairs, and an empty cache."""
    benchmarks._synthetic_benchmark.cache_clear()
    monkeypatch.setattr(setup, "SYNTHETIC_PEOPLE", 8)
    monkeypatch.setattr(setup, "SYNTHETIC_IMAGES", 4)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "synthetic", Benchmark("synthetic", 40))
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    (tmp_path / "no-benchmarks").mkdir()
    monkeypatch.chdir(tmp_path)
    yield
    benchmarks._synthetic_benchmark.cache_clear()


def train(*more):
    return main(["train", *NANO, "--save-dir", "run", *more])


def evaluate(*more):
    return main(["evaluate", "--bench", "synthetic", "--device", "cpu", *more])


def table_row(printed, title):
    """The line of the benchmark in a printed table after `title`."""
    lines = printed[printed.index(title) :].splitlines()
    return next(line for line in lines if line.startswith("synthetic"))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("fp32", marks=case("the table after training, and `evaluate` of the same checkpoint", "equal")),
        pytest.param(
            "bf16", marks=case("the same in bf16, where fp32 is measured to be faster now", "equal to the bit")
        ),
    ],
)
def test_one_model_has_one_number(dtype, tmp_path, monkeypatch, capsys):
    assert train("--dtype", dtype) == 0
    after_training, scores = capsys.readouterr().out, tmp_path / "run" / SCORES
    distance = load_scores(scores)[0]["synthetic"].distance.tobytes()
    scores.unlink()
    monkeypatch.setattr(device, "lead_of_fp32", lambda name, width: 9.0)
    assert evaluate("--checkpoint", "run") == 0
    assert table_row(capsys.readouterr().out, "benchmark") == table_row(after_training, "adapted, best epoch")
    assert load_scores(scores)[0]["synthetic"].distance.tobytes() == distance


@case("the frozen backbone in a run's table, and `evaluate --backbone`", "equal, whatever `--dtype` the run has")
def test_the_frozen_backbone_has_one_number(tmp_path, monkeypatch, capsys):
    assert train("--dtype", "bf16") == 0
    row = table_row(capsys.readouterr().out, "frozen backbone, raw CLS")
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "another"))
    assert evaluate("--backbone", "vit_nano", "--image-size", "112") == 0
    printed = capsys.readouterr().out
    assert table_row(printed, "benchmark") == row and "kept" not in printed


@case("a second run on the same frozen backbone", "its frozen figures are kept ones, and said to be")
def test_the_frozen_backbone_is_evaluated_once(tmp_path, monkeypatch, capsys):
    assert evaluate("--backbone", "vit_nano", "--image-size", "112") == 0
    row = table_row(capsys.readouterr().out, "benchmark")
    seen = []
    embed = Recogniser.embed
    monkeypatch.setattr(Recogniser, "embed", lambda model, images: seen.append(model) or embed(model, images))
    assert train() == 0
    printed = capsys.readouterr().out
    assert table_row(printed, "frozen backbone, raw CLS") == row
    assert "kept from an earlier evaluation: synthetic" in printed
    assert len(seen) == 1  # 80 images of the adapted model
    assert evaluate("--backbone", "vit_nano", "--image-size", "64") == 0  # other settings
    monkeypatch.setitem(benchmarks.BENCHMARKS, "synthetic", Benchmark("synthetic", 38))
    benchmarks._synthetic_benchmark.cache_clear()
    assert evaluate("--backbone", "vit_nano", "--image-size", "112") == 0  # other data
    assert len(seen) == 3
    for file in (tmp_path / "home" / "frozen").iterdir():
        file.write_bytes(b"torn")
    assert evaluate("--backbone", "vit_nano", "--image-size", "112") == 0
    assert len(seen) == 4
