import json
from functools import partial

import numpy as np
import pytest

import vitface
from vitface.__main__ import main
from vitface.data.faces.alignment import TEMPLATE
from vitface.data.faces.detect import Face
from vitface.data.faces.pose import MARGIN
from vitface.data.formats.pairs import VerificationSet
from vitface.data.images import encode_image
from vitface.evaluation import benchmarks, routing
from vitface.evaluation.routing import (
    agreement,
    benchmark_routing,
    entropy,
    pose_routing,
    pose_text,
    synthetic_routing,
)


def test_entropy_at_its_extremes():
    rows = np.array([[1, 0, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]])
    np.testing.assert_allclose(entropy(rows), [0, 1, 0.5], atol=1e-12)


def test_agreement_does_not_mind_how_domains_are_numbered():
    labels = np.array([0, 0, 1, 1, 2, 2])
    weights = np.eye(3)[[2, 2, 0, 0, 1, 0]]  # label 0 -> domain 2, 1 -> 0, 2 -> 1, with one mistake
    assert agreement(weights, labels) == (5 / 6, [2, 0, 1])
    with pytest.raises(ValueError, match="3 labels cannot be assigned to 2 domains"):
        agreement(np.eye(2)[[0, 1, 0, 1, 0, 1]], labels)


def test_weights_by_pose():
    yaw = np.array([0, -14, 16, -29, 31, -80])
    weights = np.array([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.3, 0.7], [0.2, 0.8], [0.4, 0.6]])
    found = pose_routing(weights, yaw)
    assert found["images"] == [2, 2, 2] and found["degrees"] == ["0 to 15", "15 to 30", "30 to 90"]
    np.testing.assert_allclose(found["weights"], [[0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    assert found["auc"] == [0.0, 1.0]
    text = pose_text(found).splitlines()
    assert text[1] == "0 to 15°          2     0.800     0.200" and text[-1].endswith("AUC 0.00  AUC 1.00")
    nobody_turned = pose_routing(weights[:4], yaw[:4])
    assert nobody_turned["weights"][2] is None and nobody_turned["auc"] is None
    assert pose_text(nobody_turned).splitlines()[-1] == "30 to 90°         0"


class Detector:
    """Sees the template's landmarks with the nose moved by what the first pixel says; nothing in a black crop."""

    def detect(self, image):
        if image.max() == 0:
            return []
        landmarks = TEMPLATE + MARGIN
        landmarks[2, 0] += image[MARGIN, MARGIN, 0] / 10
        return [Face(np.array([60, 60, 90, 90]), landmarks, 0.9)]


def test_benchmark_images_are_routed_by_their_pose(tiny_run):
    crops = [np.full((112, 112, 3), value, np.uint8) for value in (0, 10, 250, 250, 12)]
    crops[3][50:] = 0
    images = [encode_image(crop, "PNG") for crop in crops]
    pairs = VerificationSet("drawn", [images[i] for i in (0, 1, 2, 3, 4, 1)], np.array([True, False, True]))
    model = vitface.load(tiny_run)
    found, weights = benchmark_routing(model, pairs, Detector()), model.domain_weights(np.stack(crops))
    assert found["images"] == [2, 0, 2]
    np.testing.assert_allclose(found["weights"][0], weights[[1, 4]].mean(0), atol=1e-6)
    np.testing.assert_allclose(found["weights"][2], weights[[2, 3]].mean(0), atol=1e-6)


def test_evaluate_says_what_the_router_does(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "synthetic", benchmarks.Benchmark("synthetic", 40))
    monkeypatch.setattr(routing, "synthetic_routing", partial(synthetic_routing, num_people=4, images_per_person=3))
    benchmarks._synthetic_benchmark.cache_clear()
    command = ["--checkpoint", str(tiny_run), "--bench", "synthetic", "--routing"]
    main(["evaluate", *command, "--json", str(tmp_path / "a.json")])
    assert "routing on procedural faces, by their domain\nmean weight" in capsys.readouterr().out
    written = json.loads((tmp_path / "a.json").read_text())["routing"]["synthetic"]
    np.testing.assert_allclose(np.sum(written["weights"], axis=1), 1, atol=1e-5)
    benchmarks._synthetic_benchmark.cache_clear()
    assert main(["evaluate", "--backbone", "vit_nano", "--image-size", "112", "--bench", "synthetic", "--routing"]) == 2
    assert "--routing is for DA-LoRA" in capsys.readouterr().err


@pytest.mark.slow
def test_with_labels_the_router_finds_pose_age_and_light(tmp_path, monkeypatch, capsys):
    """On faces of people it has never seen; without labels it has no reason to, and does not."""
    command = ["--exp", "demo", "--epochs", "1", "--max-samples", "1920", "--lora-rank", "2"]
    command += ["--save-dir", str(tmp_path / "run")]
    monkeypatch.setattr("vitface.training.step.DOMAIN_LOSS_WEIGHT", 1.0)
    assert main(["train", *command]) == 0
    routing = synthetic_routing(vitface.load(tmp_path / "run"))
    print(routing)
    assert routing["agreement"] >= 0.9
    np.testing.assert_allclose(np.sum(routing["weights"], axis=1), 1, atol=1e-5)
