"""Hints are commands that work where they are given."""

from pathlib import Path

import numpy as np
import pytest
from cases import case
from conftest import tiny_recogniser

import vitface
from vitface.__main__ import main
from vitface.commands.photos.search import best_of_people, person_of
from vitface.evaluation.benchmarks import Evaluation, next_command
from vitface.evaluation.page import report_page
from vitface.evaluation.plots import heat
from vitface.evaluation.protocol import verify
from vitface.evaluation.report import results_table
from vitface.evaluation.routing import domain_names
from vitface.evaluation.statistics import tar_interval
from vitface.metrics import far_threshold

KIND = "Truth of texts and numbers"
RUN = Path("runs/a")


@pytest.mark.parametrize(
    ("folder", "train_data", "hint"),
    [
        pytest.param(
            None,
            "faces",
            "vitface info runs/a",
            marks=case("a run where no benchmark is", "the hint is `vitface info`"),
        ),
        pytest.param("empty", "synthetic", "vitface evaluate --checkpoint runs/a --bench synthetic"),
        pytest.param(
            "bench",
            "faces",
            "vitface evaluate --checkpoint runs/a --bench all --data-dir bench",
            marks=case("benchmarks in another folder than `data`", "the hint names the folder"),
        ),
        pytest.param("data", "faces", "vitface evaluate --checkpoint runs/a --bench all"),
    ],
)
def test_the_hint_after_a_run(folder, train_data, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bench", "data"):
        Path(name).mkdir()
        Path(name, "lfw.bin").touch()
    assert next_command(RUN, folder, train_data) == hint


@case("`vitface data draw faces --people 2 --images 3`", "its hint has the batch size that six images fill")
def test_the_hint_of_data_draw(tmp_path, capsys):
    main(["data", "draw", str(tmp_path / "faces"), "--people", "2", "--images", "3"])
    assert capsys.readouterr().out.endswith("--image-size 112 --holdout-people 0 --batch-size 6\n")


@case("`search` where people have several photos", "a line a person, by the folder, with the most similar photo")
def test_search_counts_people_by_their_best_photo():
    """Also where one person has more photos near the query than are looked at first."""
    rng, query = np.random.default_rng(0), np.ones((1, 8))
    rows = query + rng.normal(size=(200, 8)) * np.r_[np.full(150, 0.01), np.full(50, 2)][:, None]
    others = (f"{'ben' if number % 2 else 'b/c'}/{number}.jpg" for number in range(49))
    names = [*(f"anna/{number}.jpg" for number in range(150)), *others, "x.jpg"]
    gallery = vitface.Gallery(8)
    gallery.add(names, rows)
    cosines = gallery.embeddings @ (query[0] / np.linalg.norm(query))
    for top in (1, 3, 9):
        (found,) = best_of_people(gallery, query, top)
        people = [name.rpartition("/")[0] or name for name in names]
        best = {person: max(cosines[[p == person for p in people]]) for person in people}
        assert [person_of(match.name) for match in found] == sorted(best, key=best.get, reverse=True)[:top]
        assert [match.score for match in found] == pytest.approx(sorted(best.values(), reverse=True)[:top], abs=1e-6)


def some_result(pairs, seed=0):
    issame = np.arange(pairs) % 2 == 0
    noise = np.random.default_rng(seed).normal(size=pairs)
    return verify(np.clip(1.2 + 0.3 * (noise - 3 * (issame - 0.5)), 0, 4), issame)


@pytest.mark.parametrize(
    ("names", "beside"),
    [
        pytest.param(["synthetic"], False, marks=case("a report on drawn faces", "no published figures beside them")),
        pytest.param(["lfw"], True, marks=case("a report on LFW", "the published figures on LFW, and no others")),
    ],
)
def test_published_figures_stand_beside_their_benchmark(names, beside, tmp_path):
    results = {name: some_result(400) for name in names}
    (tmp_path / "log.csv").write_text("step,epoch,loss,holdout_auc,img_per_s\n2,1,9.5,0.7,80\n")
    (tmp_path / "config.json").write_text('{"epochs": 1, "lr": 0.002, "val_data": null}')
    model, nothing = tiny_recogniser(), {}
    page = report_page("a", model, Evaluation(results, [], []), tmp_path, tmp_path, False, nothing)
    assert ("99.30" in page) == ("Beside what others report" in page) == beside
    assert "93.93" not in page and "average of five</td>" not in page
    assert "Learning curve" not in page  # a curve needs two epochs
    assert "<td>lr</td><td>0.002</td>" in page and "<td>val_data</td>" not in page
    assert "<td>vit patch_size</td>" in page and "ViTConfig(" not in page


def test_tar_at_far_in_the_terminal():
    enough, few = some_result(6000), some_result(400)
    tar = far_threshold(-enough.distance, enough.issame, 0.01)[1]
    head, first, second = results_table({"lfw": enough, "synthetic": few}).splitlines()[:3]
    assert head.endswith("TAR@FAR=1e-2") and first.endswith(f" {100 * tar:.2f}") and second.endswith(" -")
    low, high = tar_interval(enough, np.array([0.01]))
    assert low < tar < high and 0.01 < high - low < 0.2
    again = [far_threshold(-r.distance, r.issame, 0.01)[1] for r in (some_result(6000, seed) for seed in range(1, 40))]
    assert (high - low) / 4 == pytest.approx(np.std(again), rel=0.4)  # the spread over other samples


def test_domains_have_the_names_of_their_labels():
    assert domain_names({"train_data": "synthetic"}, 3) == ["pose", "age", "light"]
    assert domain_names({"train_data": "faces", "degrade": "lowres:16,nir"}, 3) == ["as it is", "lowres", "nir"]
    for unknown in ({}, {"train_data": "faces"}, {"train_data": "synthetic", "domain_labels": "a.csv"}):
        assert domain_names(unknown, 2) == ["domain 0", "domain 1"]
    assert domain_names({"train_data": "synthetic"}, 4)[3] == "domain 3"


@case(
    "`evaluate --output` of a run whose config.json is damaged", "the report, without the training's settings; a note"
)
def test_a_report_of_a_run_with_damaged_settings(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"lr": null}')
    results = {"lfw": some_result(400)}
    page = report_page("a", tiny_recogniser(), Evaluation(results, [], []), tmp_path, tmp_path, False, {})
    assert "of the training" not in page and "config.json is damaged (lr cannot be None)" in capsys.readouterr().err


@case("`explain` and reports: where CLS looks", "a heat map over the face in grey, which stays visible")
def test_the_heat_map_shows_the_face():
    face, weights = np.full((40, 40, 3), 200, np.uint8), np.array([[0.0, 0.0], [0.0, 1.0]])
    shown = heat(face, weights).astype(int)
    assert np.ptp(shown[:10, :10], axis=2).max() < 12 and shown[:10, :10].min() > 120  # grey, not black
    red, green, blue = shown[-1, -1]
    assert red > 200 and green > 180 and blue < 160  # yellow
    dark = heat(np.zeros((40, 40, 3), np.uint8), np.zeros((2, 2))).astype(int)
    assert dark.min() == dark.max() == 40
