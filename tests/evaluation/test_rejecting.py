"""Errors by how many pairs of low quality are rejected: the numbers, and their way into the report and files."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import PAIRS

from vitface.__main__ import main
from vitface.data.degrade import degrade_crops, parse_sensors
from vitface.data.quality import crop_quality
from vitface.errors import CheckpointError
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import Degraded, evaluate_all
from vitface.evaluation.page import reject_charts
from vitface.evaluation.protocol import verify
from vitface.evaluation.report import REJECTED, error_by_reject, reject_lines, results_json
from vitface.evaluation.scores import load_scores, save_scores


def result(quality=None):
    """200 pairs of which 40 are decided wrongly: the same 4 of each 20, in every fold."""
    issame = np.arange(200) % 2 == 0
    wrong = np.arange(200) % 20 < 4
    return dataclasses.replace(verify(np.where(issame ^ wrong, 0.5, 1.5), issame), quality=quality)


def test_the_wrong_pairs_are_rejected_first_where_quality_tells_them():
    wrong = ~result().correct
    assert wrong.sum() == 40
    told = error_by_reject(result(np.where(wrong, 0.2, 0.9)))
    assert told == pytest.approx({"0": 0.2, "0.05": 30 / 190, "0.1": 20 / 180, "0.2": 0, "0.3": 0})
    misled = error_by_reject(result(np.where(wrong, 0.9, 0.2)))
    assert misled == pytest.approx({"0": 0.2, "0.05": 40 / 190, "0.1": 40 / 180, "0.2": 0.25, "0.3": 40 / 140})
    assert error_by_reject(result()) is None and results_json({"lfw": result()})["lfw"]["error_by_reject"] is None


def test_text_and_chart_show_the_same_numbers():
    found = {"lfw": result(np.where(result().correct, 0.9, 0.2)), "calfw": result()}
    (line,) = reject_lines(found)
    assert line.startswith("lfw: errors 20.00, 15.79, 11.11, 0.00, 0.00 % with the 0, 5, 10, 20, 30 % of pairs of the")
    (chart,) = reject_charts(found)
    assert list(chart["lines"]) == ["lfw"] and len(chart["lines"]["lfw"].split()) == len(REJECTED)
    assert reject_charts({"calfw": result()}) == []


def test_scores_keep_the_quality_and_refuse_a_wrong_one(tmp_path):
    quality = np.linspace(0, 1, 200)
    save_scores(tmp_path / "scores", {"lfw": result(quality)}, "model")
    np.testing.assert_array_equal(load_scores(tmp_path / "scores")[0]["lfw"].quality, quality)
    for wrong in (quality + 0.1, np.full(200, np.nan), quality[:100]):
        save_scores(tmp_path / "scores", {"lfw": result(wrong)}, "model")
        with pytest.raises(CheckpointError, match="quality"):
            load_scores(tmp_path / "scores")


@pytest.mark.parametrize("probe", [False, True])
def test_a_pair_has_the_lower_quality_of_its_photos_as_they_are_shown(few_pairs, probe):
    """The degraded ones, and of the two the poorer."""
    images, _, _ = benchmarks._synthetic_benchmark("synthetic")
    changed = degrade_crops(images, parse_sensors("lowres:8-112"), np.arange(2 * PAIRS))
    first, second = crop_quality(images if probe else changed)[::2], crop_quality(changed)[1::2]
    rows = evaluate_all(
        lambda crops: crops[:, ::16, ::16].reshape(len(crops), -1).astype(np.float32) + 1,
        ["synthetic"],
        "",
        conditions=[Degraded(parse_sensors("lowres:8-112"), probe)],
        quality=lambda crops: crop_quality(crops).numpy(),
    )
    (found,) = rows.results.values()
    assert found.quality is not None and np.ptp(found.quality) > 0.3
    np.testing.assert_allclose(found.quality, torch.minimum(first, second).numpy(), atol=1e-6)


def test_evaluate_prints_writes_and_draws_it(few_pairs, tiny_run, tmp_path, capsys):
    page, results = tmp_path / "report.html", tmp_path / "results.json"
    files = ["--json", str(results), "--output", str(page)]
    assert main(["evaluate", "--checkpoint", str(tiny_run), "--bench", "synthetic", *files]) == 0
    entry = json.loads(results.read_text())["benchmarks"]["synthetic"]
    assert entry["error_by_reject"]["0"] == pytest.approx(1 - entry["accuracy"])
    assert "5, 10, 20, 30 % of pairs of the lowest quality rejected" in capsys.readouterr().out
    assert "Errors by how many pairs are rejected" in page.read_text()
    assert load_scores(tiny_run / "scores.safetensors")[0]["synthetic"].quality is not None
