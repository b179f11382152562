"""Benchmarks whose photos are as a sensor gives them: which photos, under which names, and as a curve."""

import json
import shutil

import numpy as np
import pytest
from conftest import PAIRS

from vitface.__main__ import main
from vitface.data.degrade import degrade_crops, parse_sensors
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import Degraded, evaluate_all
from vitface.evaluation.scores import load_scores


def thumbnails(images):
    """An embedding of 14 x 14 pixels, whole numbers: it shows which photos were embedded."""
    return images[:, 4::8, 4::8].reshape(len(images), -1).astype(np.float32) + 1


@pytest.mark.parametrize("probe", [False, True])
def test_both_photos_or_only_the_second_are_degraded(few_pairs, probe):
    images, people, _ = benchmarks._synthetic_benchmark("synthetic")
    changed = degrade_crops(images, parse_sensors("nir:30"), np.arange(2 * PAIRS))
    degraded = Degraded(parse_sensors("nir:30"), probe)
    evaluation = evaluate_all(thumbnails, ["synthetic"], "", conditions=[degraded])
    label = "synthetic nir:30" + " probe" * probe
    assert evaluation.degraded == {label: degraded} and list(evaluation.results) == [label]
    first, second = thumbnails(images if probe else changed)[::2], thumbnails(changed)[1::2]
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first.astype("f8"), second.astype("f8")))
    np.testing.assert_allclose(evaluation.results[label].distance, 2 - 2 * (first * second).sum(axis=1), atol=1e-6)
    np.testing.assert_array_equal(evaluation.results[label].issame, people[:, 0] == people[:, 1])


def test_a_kind_without_an_amount_is_a_curve_in_the_report(few_pairs, tiny_run, tmp_path, capsys):
    page, results = tmp_path / "report.html", tmp_path / "results.json"
    common = ["evaluate", "--checkpoint", str(tiny_run), "--bench", "synthetic", "--json", str(results)]
    assert main([*common, "--degrade-probe", "lowres", "--output", str(page)]) == 0
    names = [f"synthetic lowres:{side} probe" for side in (8, 12, 16, 20, 24, 32, 48, 64, 112)]
    assert list(json.loads(results.read_text())["benchmarks"]) == names
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and "average" not in shown
    text = page.read_text()
    assert "<h2>Degraded photos</h2>" in text and "lowres, side in pixels" in text
    assert "synthetic, the second photo only" in text
    assert not (tiny_run / "scores.safetensors").exists()  # that of the photos as they are
    kept, _ = load_scores(tiny_run / "scores-lowres-16-probe.safetensors")
    assert kept["synthetic"].accuracy == json.loads(results.read_text())["benchmarks"][names[2]]["accuracy"]
    assert main([*common]) == 0
    plain = json.loads(results.read_text())["benchmarks"]["synthetic"]["accuracy"]
    assert main([*common, "--degrade", "lowres:112"]) == 0
    assert json.loads(results.read_text())["benchmarks"]["synthetic lowres:112"]["accuracy"] == plain
    assert main([*common, "--degrade", "lowres:16", "--dry-run"]) == 0
    assert f"\n{2 * PAIRS} images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "answer"),
    [
        ("--degrade lowres:16 --degrade-probe lowres:16", "name one of them"),
        ("--degrade lowres:200", "at least 4 and at most 112, such as lowres:12"),
        ("--degrade lowres:16 --routing", "leave --degrade out"),
        ("--degrade-probe fog", "unknown kind 'fog'"),
    ],
)
def test_what_cannot_be_degraded_is_refused(few_pairs, tiny_run, capsys, flags, answer):
    assert main(["evaluate", "--checkpoint", str(tiny_run), "--bench", "synthetic", *flags.split()]) == 2
    assert answer in capsys.readouterr().err


def test_runs_are_compared_on_degraded_photos(few_pairs, tiny_run, capsys):
    other = tiny_run.parent / "other"
    shutil.copytree(tiny_run, other, symlinks=True)
    for seed, run in enumerate((tiny_run, other)):
        (run / "config.json").write_text(json.dumps({"seed": 0, "lora_rank": 4 + seed}))
    compare = ["evaluate", "--compare", str(tiny_run), str(other), "--degrade", "nir:30"]
    assert main(compare) == 2
    assert f"--checkpoint {tiny_run} --bench all --degrade nir:30" in capsys.readouterr().err
    for run in (tiny_run, other):
        assert main(["evaluate", "--checkpoint", str(run), "--bench", "synthetic", "--degrade", "nir:30"]) == 0
    assert main(compare) == 0
    shown = capsys.readouterr().out
    assert "photos: nir:30\n" in shown and "+0.00" in shown and "verdict: no difference shown" in shown


def test_info_shows_what_was_evaluated_on_degraded_photos(few_pairs, tiny_run, capsys):
    """In the order of the amounts, those of degraded probes last; a file of somebody's own is passed over."""
    common = ["evaluate", "--checkpoint", str(tiny_run), "--bench", "synthetic"]
    conditions = [["--degrade", "lowres:112"], ["--degrade", "lowres:8-16,nir:0.5"], ["--degrade-probe", "lowres:16"]]
    for flags in (*conditions, []):
        assert main([*common, *flags]) == 0
    (tiny_run / "scores-old.safetensors").write_bytes((tiny_run / "scores.safetensors").read_bytes())
    capsys.readouterr()
    assert main(["info", str(tiny_run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["benchmarks"]
    names = ["", " lowres:8-16,nir:0.5", " lowres:112", " lowres:16 probe"]
    assert list(found) == ["synthetic" + name for name in names]
    kept, _ = load_scores(tiny_run / "scores-lowres-16-probe.safetensors")
    assert found["synthetic lowres:16 probe"]["auc"] == kept["synthetic"].auc
    (tiny_run / "scores-lowres-112.safetensors").write_bytes(b"")
    assert main(["info", str(tiny_run)]) == 0
    out, err = capsys.readouterr()
    assert "synthetic lowres:16 probe accuracy " in out and "lowres:112" not in out
    assert "note: " in err and "scores-lowres-112.safetensors is damaged" in err
