"""What a run says of itself: its figures, its plan, and what was chosen on whom."""

import re
from pathlib import Path

import numpy as np
import pytest
from cases import case
from PIL import Image

from vitface import device
from vitface.__main__ import load_command, main
from vitface.config import resolve
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import Benchmark
from vitface.evaluation.scores import SCORES, load_scores
from vitface.recogniser import Recogniser
from vitface.training import setup
from vitface.training.loop import Trainer

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


@case("`--dry-run --batch-size 24 --grad-accum 2`", "plans and takes two steps with that very batch")
def test_a_dry_run_has_the_batch_of_the_run(tmp_path, capsys):
    flags = ("--batch-size", "24", "--grad-accum", "2", "--holdout-people", "0")
    trainers = [
        Trainer(setup.resolve_choices(resolve(vars(load_command("train")[1].parse_args([*NANO, *flags, *more])))), None)
        for more in ([], ["--dry-run"])
    ]
    real, dry = (trainer.memory for trainer in trainers)
    assert dry.batch_size == real.batch_size == 12
    assert dry.per_image == pytest.approx(real.per_image, abs=12 * 16)  # the logits of at most 16 people
    capsys.readouterr()
    assert main(["train", *NANO, *flags, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"memory at {trainers[0].config.side} px: {dry}\n" in printed
        and "data: 48 images" in printed
        and "for 2 steps" in printed
    )
    assert "memory at its peak: " in printed and "each person of your data adds 0.3 kB" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no-benchmarks"]


@case("`--dry-run` with a batch of more images than the drawn people have", "more people are drawn")
def test_a_dry_run_of_a_large_batch(capsys):
    assert main(["train", *NANO, "--batch-size", "40", "--dry-run"]) == 0
    assert "data: 80 images" in capsys.readouterr().out


@case("an estimate of the time of a run with benchmarks", "counts their images, and those of held-out people")
def test_the_estimate_has_the_evaluation(capsys):
    assert train() == 0
    printed = capsys.readouterr().out
    # 80 images of the benchmark, twice each, by two models; 12 of held-out people for an epoch, twice for thresholds
    assert re.search(r"and \d+ s for evaluating \(356 images\)", printed)


@case("a cut `lfw.bin` in `--val-data`", "named before the first step, not after the last")
def test_a_benchmark_that_cannot_be_read_is_named_first(tmp_path, capsys):
    (tmp_path / "no-benchmarks" / "lfw.bin").write_bytes(b"cut")
    assert train() == 0
    before = capsys.readouterr().out.partition("epoch 1/1")[0]
    assert "ALARM " in before and "lfw.bin" in before


def results():
    return Path("run/results.md").read_text()


@case("`--holdout-people 0`", "results.md says that nobody was held out and the last epoch was taken")
def test_nobody_was_to_be_held_out(capsys):
    assert train("--holdout-people", "0") == 0
    assert "Nobody was held out: the last epoch was taken." in results() and "held-out training" not in results()
    assert "adapted, last epoch" in results() and "ALARM --holdout" not in capsys.readouterr().out


def test_people_were_held_out():
    assert train() == 0
    assert "The best epoch was chosen on 3 held-out training people, never on a benchmark." in results()


@pytest.mark.parametrize(
    ("images", "said", "held_out"),
    [
        pytest.param(
            [1] * 8, "--holdout-people 3: fewer than two people have two images, so nobody is held out", 0,
            marks=case("three people to hold out, but one image of each", "an alarm; results.md: nobody was held out"),
        ),
        pytest.param(
            [1] * 8 + [2], "--holdout-people 3: fewer than two people have two images, so nobody is held out", 0,
            marks=case("three people to hold out, only one with two images", "an alarm, and nobody is held out"),
        ),
        pytest.param(
            [1] * 8 + [2, 3], "--holdout-people 3: only 2 people have two images or more, so 2 were held out", 2,
            marks=case("three people to hold out, only two with two images", "an alarm, and two are held out"),
        ),
    ],
)  # fmt: skip
def test_fewer_people_can_be_held_out_than_were_asked_for(images, said, held_out, tmp_path, capsys):
    for person, count in enumerate(images):
        folder = tmp_path / "people" / f"{person}"
        folder.mkdir(parents=True)
        for image in range(count):
            pixels = np.random.default_rng([person, image]).integers(0, 256, (112, 112, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")
    assert train("--train-data", "people") == 0
    assert f"ALARM {said}" in capsys.readouterr().out
    chosen = f"chosen on {held_out} held-out" if held_out else "Nobody was held out: the last epoch was taken."
    assert chosen in results()
