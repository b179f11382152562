"""Scores in a run's folder: each belongs to the pairs that it was computed from."""

import dataclasses
import io
import json
import os

import numpy as np
import pytest
from cases import case
from PIL import Image

from vitface.__main__ import main
from vitface.commands.experiments import experiments_markdown
from vitface.data.formats.pairs import write_bin
from vitface.errors import CheckpointError, ConfigError, EvaluationError
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import BENCHMARKS, Benchmark
from vitface.evaluation.compare import Side, compare, group_runs
from vitface.evaluation.protocol import verify
from vitface.evaluation.scores import SCORES, keep_scores, load_scores, save_scores
from vitface.store.faces import open_checkpoint

KIND = "evaluate writes into what it reads"


def write_pairs(folder, seed, name="lfw"):
    """NAME.bin of 40 pairs of flat colours; those of a same pair are nearly one colour."""
    rng, images, issame = np.random.default_rng(seed), [], []
    for number in range(40):
        issame.append(number % 4 in (0, 3))
        first = rng.integers(0, 256, 3)
        second = first + rng.integers(-3, 4, 3) if issame[-1] else rng.integers(0, 256, 3)
        for colour in (first, second.clip(0, 255)):
            buffer = io.BytesIO()
            Image.new("RGB", (112, 112), tuple(map(int, colour))).save(buffer, "PNG")
            images.append(buffer.getvalue())
    folder.mkdir(exist_ok=True)
    write_bin(folder / f"{name}.bin", images, issame)


@pytest.fixture
def evaluate(tiny_run, tmp_path, monkeypatch):
    """`evaluate(folder, ...)` evaluates the tiny run on the lfw.bin there, of 40 pairs."""
    monkeypatch.setitem(benchmarks.BENCHMARKS, "lfw", Benchmark(BENCHMARKS["lfw"].category, 40))
    for seed, folder in enumerate(("published", "drawn")):
        write_pairs(tmp_path / folder, seed)

    def command(folder, *more):
        flags = ["--bench", "lfw", "--data-dir", str(tmp_path / folder), "--device", "cpu", *more]
        return main(["evaluate", "--checkpoint", str(tiny_run), *flags])

    return command


@case(
    "`lfw.bin` of drawn faces, evaluated after the published one", "both scores are kept, each with its data's SHA-256"
)
def test_another_file_of_the_same_name(evaluate, tiny_run):
    assert evaluate("published") == 0
    (published,) = load_scores(tiny_run / SCORES)[0].values()
    assert evaluate("drawn") == 0
    scores, _ = load_scores(tiny_run / SCORES)
    assert set(scores) == {f"lfw {result.data[:8]}" for result in scores.values()} and len(scores) == 2
    again = scores[f"lfw {published.data[:8]}"]
    np.testing.assert_array_equal(again.distance, published.distance)
    assert evaluate("published") == 0
    assert set(load_scores(tiny_run / SCORES)[0]) == set(scores)


@case("two evaluations of one run at a time", "the scores of both are kept")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_evaluations_at_one_time(tmp_path):
    def keep(names):
        for name in names:
            keep_scores(tmp_path, {name: result(1)}, "model")

    names = [f"set{number}" for number in range(12)]
    pid = os.fork()
    if not pid:
        keep(names[::2])
        os._exit(0)
    keep(names[1::2])
    assert os.waitpid(pid, 0)[1] == 0
    assert set(load_scores(tmp_path / SCORES)[0]) == set(names)


def result(seed, data="", pairs=200):
    issame = np.arange(pairs) % 2 == 0
    distance = np.random.default_rng(seed).uniform(0, 2, pairs) + (~issame)
    return dataclasses.replace(verify(distance, issame), data=data)


def write_run(folder, seed, sets, **settings):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 0, **settings}))
    for number, data in enumerate(sets):
        keep_scores(folder, {"lfw": result(seed + number, data)}, "model")
    return str(folder)


@case(
    "`--compare` of a run on the published `lfw.bin` and one on drawn faces", "refused, with the digits of both files"
)
def test_runs_on_different_files_are_not_compared(tmp_path, capsys):
    one = write_run(tmp_path / "a", 0, ["1111aaaa9"])
    two = write_run(tmp_path / "b", 1, ["2222bbbb9"], lora_rank=8)
    assert main(["evaluate", "--compare", one, two]) == 2
    printed = capsys.readouterr().err
    assert "lfw: the runs were evaluated on different files of that name (SHA-256 1111aaaa, 2222bbbb)" in printed
    assert "vitface evaluate --checkpoint RUN --bench lfw --data-dir FOLDER" in printed


@case(
    "`--compare` where one run was evaluated on a second file as well",
    "compared on the file that both were evaluated on",
)
def test_runs_are_compared_on_what_they_share(tmp_path, capsys):
    one = write_run(tmp_path / "a", 0, ["1111aaaa9"])
    two = write_run(tmp_path / "b", 1, ["2222bbbb9", "1111aaaa9"], lora_rank=8)
    assert main(["evaluate", "--compare", one, two, "--json", str(tmp_path / "out.json")]) == 0
    ((row,),) = [entry["rows"] for entry in json.loads((tmp_path / "out.json").read_text())["comparisons"]]
    assert row["accuracy_a"] == result(0).accuracy and row["accuracy_b"] == result(2).accuracy


def test_two_files_that_both_runs_know_are_two_benchmarks():
    runs = [
        {"lfw 1111aaaa": result(seed, "1111aaaa9"), "lfw 2222bbbb": result(9 + seed, "2222bbbb9")} for seed in (0, 1)
    ]
    rows = compare(Side("a", [0], runs[:1]), Side("b", [0], runs[1:])).rows
    assert [row.benchmark for row in rows] == ["lfw 1111aaaa", "lfw 2222bbbb", "average of 2"]
    with pytest.raises(EvaluationError, match="no benchmark in common"):
        compare(Side("a", [0], runs[:1]), Side("b", [0], [{"cfp_fp": result(1)}]))


@case("`--compare` with a run that was never evaluated", "an error with the command that evaluates it")
def test_a_run_without_scores(tiny_run, tmp_path, capsys):
    other = write_run(tmp_path / "other", 0, ["1111aaaa9"])
    assert main(["evaluate", "--compare", str(tiny_run), other]) == 2
    printed = capsys.readouterr().err
    assert f"{tiny_run} has no scores" in printed and f"vitface evaluate --checkpoint {tiny_run} --bench all" in printed


@case("`--compare` with a folder that is no run", "an error says so")
def test_a_folder_that_is_no_run(tmp_path, capsys):
    other = write_run(tmp_path / "other", 0, ["1111aaaa9"])
    assert main(["evaluate", "--compare", str(tmp_path), other]) == 2
    assert f"{tmp_path} has no scores (scores.safetensors is missing): it is no run" in capsys.readouterr().err


@case("scores of a checkpoint that is not the best any more", "an error with the command that evaluates it again")
def test_scores_of_an_older_checkpoint(tiny_run, tmp_path, capsys):
    save_scores(tiny_run / SCORES, {"lfw": result(0)}, "an older checkpoint")
    assert main(["evaluate", "--compare", str(tiny_run), write_run(tmp_path / "b", 1, ["x"])]) == 2
    assert "is not of the run's best checkpoint; evaluate it again with\n  vitface evaluate" in capsys.readouterr().err


@case("`vitface experiments` of a run with two files under one name", "both accuracies are in the cell")
def test_the_table_of_experiments_shows_both(tiny_run):
    (tiny_run / "config.json").write_text(json.dumps({"exp": "exp_001"}))
    for seed, data in enumerate(("1111aaaa9", "2222bbbb9")):
        keep_scores(tiny_run, {"lfw": result(seed, data)}, open_checkpoint(tiny_run).sha256)
    text = experiments_markdown(tiny_run.parent)
    cells = "; ".join(f"{100 * result(seed).accuracy:.2f} ± {100 * result(seed).std:.2f}" for seed in (0, 1))
    assert f"| {cells} | not evaluated |" in text


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"xx", marks=case("a damaged `scores.safetensors`", "one sentence, that names the file once")),
        pytest.param(b"", id="nothing"),
    ],
)
def test_damaged_scores(tmp_path, data):
    (tmp_path / SCORES).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_scores(tmp_path / SCORES)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / SCORES} is damaged (Error") and text.endswith("; delete it and evaluate again")
    assert text.count(SCORES) == 1 == text.count("damaged (")


@case("`evaluate --compare` of a run and its copy", "that they are copies; not that they differ in the seed")
def test_copies_are_no_experiments(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"seed": seed, "epochs": 2}))
    a, b, c = (tmp_path / name for name in "abc")
    with pytest.raises(ConfigError, match="these runs are one run and copies of it, or repeat it; --compare needs"):
        group_runs([a, b], [{}, {}])
    with pytest.raises(ConfigError, match="these runs differ only in the seed"):
        group_runs([a, c], [{}, {}])
