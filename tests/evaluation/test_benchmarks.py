import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from vitface.__main__ import main
from vitface.data.formats.pairs import write_bin
from vitface.errors import DataError
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import BENCHMARKS, Benchmark, evaluate_all, evaluate_benchmark
from vitface.evaluation.report import FIVE, results_json, results_table, summary_json


@pytest.fixture
def small(monkeypatch):
    """Benchmarks of 60 pairs."""
    for name, real in BENCHMARKS.items():
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, Benchmark(real.category, 60))


def colour_of(images):
    """A perfect embedding for flat images: their mean colour."""
    return images.reshape(len(images), -1, 3).mean(axis=1) / 255.0 - 0.5


def write_pairs(path, issame, order=None, seed=0):
    """60 pairs of flat colours; a same pair has nearly one colour. `order` shuffles the labels against the pairs."""
    rng = np.random.default_rng(seed)
    images = []
    for same in issame:
        first = rng.integers(0, 256, 3)
        second = np.clip(first + rng.integers(-4, 5, 3), 0, 255) if same else rng.integers(0, 256, 3)
        for colour in (first, second):
            buffer = io.BytesIO()
            Image.new("RGB", (112, 112), tuple(int(c) for c in colour)).save(buffer, "PNG")
            images.append(buffer.getvalue())
    write_bin(path, images, issame if order is None else issame[order])


ISSAME = np.random.default_rng(5).permutation(np.arange(60) % 2 == 0)


def test_a_perfect_embedding_scores_high_and_the_json_has_the_numbers(tmp_path, small):
    write_pairs(tmp_path / "lfw.bin", ISSAME)
    result, alarms = evaluate_benchmark(colour_of, "lfw", tmp_path)
    assert alarms == []
    assert result.auc > 0.97
    assert result.accuracy > 0.9
    entry = json.loads(json.dumps(results_json({"lfw": result})))["lfw"]
    assert entry["accuracy"] == result.accuracy
    assert entry["pairs"] == 60
    assert f"{100 * result.accuracy:.2f} ± {100 * result.std:.2f}" in results_table({"lfw": result})


def test_averages_by_category(tmp_path, small):
    for seed, name in enumerate(["lfw", "cfp_fp", "cplfw"]):
        write_pairs(tmp_path / f"{name}.bin", ISSAME, seed=seed)
    results = evaluate_all(colour_of, ["lfw", "cfp_fp", "cplfw"], tmp_path).results
    table = results_table(results)
    pose = 50 * (results["cfp_fp"].accuracy + results["cplfw"].accuracy)
    assert f"pose average       {pose:.2f}" in table
    assert "no average of five: agedb_30, calfw are missing" in table and "average of 3" not in table
    summary = summary_json(results)
    assert summary == {"average_of_five": None, "rfw": None}
    every = {name: dataclasses.replace(results["lfw"], accuracy=0.9 + i / 100) for i, name in enumerate(FIVE)}
    assert f"average of five    {92:.2f}" in results_table(every)
    assert summary_json({**every, "vgg2_fp": results["lfw"]})["average_of_five"] == pytest.approx(0.92)


def test_each_image_is_embedded_once(tmp_path, small):
    write_pairs(tmp_path / "lfw.bin", ISSAME)
    pairs = benchmarks.read_bin(tmp_path / "lfw.bin")
    repeated = benchmarks.VerificationSet("lfw", pairs.images[:4] * 30, pairs.issame)
    seen = []

    def counting(images):
        seen.append(len(images))
        return colour_of(images)

    first, second = benchmarks.embed_pairs(counting, repeated)
    assert sum(seen) == len(set(pairs.images[:4]))
    np.testing.assert_array_equal(first[:2], first[2:4])
    assert len(second) == 60


def test_labels_that_are_not_half_and_half_are_refused(tmp_path, small):
    issame = ISSAME.copy()
    issame[np.flatnonzero(issame)[:3]] = False
    write_pairs(tmp_path / "calfw.bin", issame)
    with pytest.raises(DataError, match="27 same and 33 different"):
        evaluate_benchmark(colour_of, "calfw", tmp_path)


def test_a_wrong_pair_count_is_refused(tmp_path):
    write_pairs(tmp_path / "lfw.bin", ISSAME)
    with pytest.raises(DataError, match="60 pairs, the published set has 6000"):
        evaluate_benchmark(colour_of, "lfw", tmp_path)


def test_published_pair_lists_stand_in_for_the_bin(tmp_path, small):
    """LFW's own list beside images gives what the .bin of the same pairs gives, with the list's blocks as folds."""
    rng = np.random.default_rng(0)
    (tmp_path / "lfw").mkdir()
    lines, images, issame = ["10\t3"], [], []
    for number in range(60):
        same, name = number % 6 < 3, f"P{number}"
        first = rng.integers(0, 256, 3)
        second = first if same else rng.integers(0, 256, 3)
        for who, index, colour in ((name, 1, first), (name if same else name + "x", 2, second)):
            (tmp_path / "lfw" / who).mkdir(exist_ok=True)
            path = tmp_path / "lfw" / who / f"{who}_{index:04d}.png"
            Image.new("RGB", (112, 112), tuple(int(c) for c in colour)).save(path)
            images.append(path.read_bytes())
        lines.append(f"{name}\t1\t2" if same else f"{name}\t1\t{name}x\t2")
        issame.append(same)
    (tmp_path / "lfw" / "pairs.txt").write_text("\n".join(lines) + "\n")
    assert benchmarks.available(tmp_path) == ["lfw"]
    listed, _ = evaluate_benchmark(colour_of, "lfw", tmp_path)
    np.testing.assert_array_equal(listed.folds, np.repeat(np.arange(10), 6))
    write_bin(tmp_path / "lfw.bin", images, np.array(issame))
    packed, _ = evaluate_benchmark(colour_of, "lfw", tmp_path)
    assert (packed.accuracy, packed.auc) == (listed.accuracy, listed.auc)


def test_evaluate_says_what_is_missing_and_writes_json_before_it_fails(tmp_path, small, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_pairs(tmp_path / "data" / "lfw.bin", ISSAME)
    frozen = ["--backbone", "vit_nano", "--weights", "random", "--image-size", "112"]
    assert main(["evaluate", *frozen, "--bench", "all", "--json", "out.json"]) == 0
    printed = capsys.readouterr()
    assert "missing in data: cfp_ff.bin, cfp_fp.bin, " in printed.out
    assert 0 < json.loads((tmp_path / "out.json").read_text())["benchmarks"]["lfw"]["accuracy"] <= 1
    write_pairs(tmp_path / "data" / "cplfw.bin", ~ISSAME)
    pairs = benchmarks.read_bin(tmp_path / "data" / "cplfw.bin")
    write_bin(tmp_path / "data" / "cplfw.bin", pairs.images, ISSAME)
    assert main(["evaluate", *frozen, "--bench", "cplfw", "--json", "bad.json"]) == 2
    assert "below chance" in capsys.readouterr().err
    written = json.loads((tmp_path / "bad.json").read_text())
    assert "cplfw" in written["benchmarks"] and written["alarms"] == [] and "below chance" in written["failures"][0]


def test_evaluate_without_anything_to_evaluate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--bench", "lfw"]) == 2
    assert "vitface train --exp demo" in capsys.readouterr().err
    assert (
        main(["evaluate", "--bench", "lfw", "--backbone", "vit_nano", "--weights", "random", "--image-size", "112"])
        == 2
    )
    assert "data/lfw.bin is missing" in capsys.readouterr().err
    assert main(["evaluate", "--bench", "lfw", "--backbone", "vit_nano", "--checkpoint", "x"]) == 2
    assert "either --checkpoint or --backbone" in capsys.readouterr().err
    assert main(["evaluate", "--bench", "imagenet"]) == 2
    assert "--bench imagenet: neither a benchmark nor a file; benchmarks are lfw, " in capsys.readouterr().err
    assert main(["evaluate", "--bench", "cfpfp"]) == 2
    assert "neither a benchmark nor a file; did you mean cfp_fp?; benchmarks" in capsys.readouterr().err
    assert main(["evaluate", "--bench", "data"]) == 2
    assert "neither" in capsys.readouterr().err
    (tmp_path / "data").mkdir()
    assert main(["evaluate", "--bench", "data"]) == 2
    assert "--bench data is a folder; name the .bin or the pair list in it" in capsys.readouterr().err
