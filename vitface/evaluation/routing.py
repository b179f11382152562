"""Measures of DA-LoRA's router: how sure it is, which domains it uses, and whether they stand for pose, age or light.

`synthetic_routing` and `benchmark_routing` run a model, the rest is numpy. Letters: B images, K domains, L labels.
"""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from vitface.data.degrade import parse_sensors
from vitface.data.faces.detect import FaceDetector
from vitface.data.faces.pose import crop_landmarks, yaw_degrees
from vitface.data.formats.pairs import VerificationSet
from vitface.data.synthetic.worlds import SYNTHETIC, TEST_PEOPLE, SyntheticSamples
from vitface.metrics import auc
from vitface.recogniser import Recogniser

YAW_EDGES = (0, 15, 30, 90)  # degrees: frontal, turned, turned far
POSED_IMAGES = 2000


def domain_names(training: Mapping[str, Any], count: int) -> list[str]:
    """What a run's K domains stand for, where its settings label them: the factors of drawn faces, or the sensors of
    --degrade; else "domain 0", ..."""
    names = SYNTHETIC.get(training.get("train_data", ""), ())
    if training.get("degrade"):
        names = ("as it is", *(sensor.kind for sensor in parse_sensors(training["degrade"])))
    known = len(names) == count and not training.get("domain_labels")
    return [*names] if known else [f"domain {k}" for k in range(count)]


def entropy(weights: np.ndarray) -> np.ndarray:
    """The entropy of each image's weights over log K: (B, K) -> (B,), 0 for one domain, 1 for equal weights."""
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return -(weights * logs).sum(axis=1) / np.log(weights.shape[1])


def agreement(weights: np.ndarray, labels: np.ndarray) -> tuple[float, list[int]]:
    """(share of images whose strongest domain is that of their label, the domain of each label), weights (B, K).

    Labels (B,) are in [0, L). Each gets a domain of its own, so L <= K, in the assignment with the largest share.
    """
    counts = np.zeros((weights.shape[1], labels.max() + 1))
    np.add.at(counts, (weights.argmax(axis=1), labels), 1)
    num_domains, num_labels = counts.shape
    if num_domains < num_labels:
        raise ValueError(f"{num_labels} labels cannot be assigned to {num_domains} domains")
    assignments = itertools.permutations(range(num_domains), num_labels)
    share, domains = max((sum(counts[domains, range(num_labels)]), domains) for domains in assignments)
    return float(share / len(labels)), list(domains)


def synthetic_routing(
    model: Recogniser, num_people: int = 60, images_per_person: int = 6, world: str = "synthetic"
) -> dict[str, Any]:
    """The router on procedural faces of unseen people, whose domain (such as pose, age or light) is known.

    {"usage": (K,) mean weight, "entropy": mean, "labels": names (L,), "weights": (L, K) mean weight for each label,
    "agreement": share or None with fewer domains than labels, "domain_of_label": list or None, "chance": 1 / L}.
    """
    samples = SyntheticSamples(num_people, images_per_person, first_person=TEST_PEOPLE.start, world=world)
    weights, labels = model.domain_weights(samples.render(np.arange(len(samples)))), samples.domain_names
    share, domains = agreement(weights, samples.domains) if weights.shape[1] >= len(labels) else (None, None)
    return {
        "usage": weights.mean(axis=0).tolist(),
        "entropy": float(entropy(weights).mean()) if weights.shape[1] > 1 else 0.0,
        "labels": list(labels),
        "weights": [weights[samples.domains == label].mean(axis=0).tolist() for label in range(len(labels))],
        "agreement": share,
        "domain_of_label": domains,
        "chance": 1 / len(labels),
    }


def pose_routing(weights: np.ndarray, yaw: np.ndarray) -> dict[str, Any]:
    """Domain weights (B, K) by how far a face is turned, `yaw` (B,) in degrees.

    {"degrees": bins of |yaw|, "images": number in each bin, "weights": (bins, K) means, None for an empty bin, "auc":
    (K,) how well a domain's weight separates the last bin from the first, None if one of them is empty}.
    """
    turned = np.digitize(np.abs(yaw), YAW_EDGES[1:-1])
    bins = [weights[turned == number] for number in range(len(YAW_EDGES) - 1)]
    first, last = bins[0], bins[-1]
    areas = None
    if len(first) and len(last):
        labels = np.repeat([False, True], [len(first), len(last)])
        areas = [auc(np.concatenate([first[:, k], last[:, k]]), labels) for k in range(weights.shape[1])]
    return {
        "degrees": [f"{low} to {high}" for low, high in itertools.pairwise(YAW_EDGES)],
        "images": [len(rows) for rows in bins],
        "weights": [rows.mean(axis=0).tolist() if len(rows) else None for rows in bins],
        "auc": areas,
    }


def benchmark_routing(model: Recogniser, pairs: VerificationSet, detector: FaceDetector) -> dict[str, Any]:
    """`pose_routing` of the faces that are detected in a benchmark's first POSED_IMAGES images."""
    images, _ = pairs.distinct()
    crops = [images.read(i) for i in range(min(len(images), POSED_IMAGES))]
    found = [(crop, points) for crop in crops if (points := crop_landmarks(crop, detector)) is not None]
    yaw = yaw_degrees(np.array([points for _, points in found]).reshape(-1, 5, 2))
    return pose_routing(model.domain_weights([crop for crop, _ in found]), yaw)


def pose_text(routing: dict[str, Any]) -> str:
    """A line per bin: its images and the mean weight of each domain; then each domain's AUC."""
    bins = zip(routing["degrees"], routing["images"], strict=True)
    labels = [f"{degrees + '°':<12}{images:>7}" for degrees, images in bins]
    lines = _weights_table(f"{'turned by':<12}{'images':>7}", labels, routing["weights"])
    if routing["auc"] is not None:
        lines.append(f"{'far or not':<19}" + "".join(f"{f'AUC {area:.2f}':>10}" for area in routing["auc"]))
    return "\n".join(lines)


def routing_text(routing: dict[str, Any]) -> str:
    """A line per label: the mean weight of each domain; then agreement and entropy."""
    labels = [f"{label:<12}" for label in (*routing["labels"], "all")]
    lines = _weights_table(f"{'mean weight':<12}", labels, [*routing["weights"], routing["usage"]])
    found = "" if routing["agreement"] is None else f"agreement with the known labels {routing['agreement']:.1%}, "
    return "\n".join([*lines, f"{found}entropy {routing['entropy']:.3f} of 1"])


def _weights_table(head: str, labels: list[str], weights: list[list[float] | None]) -> list[str]:
    count = max(len(row or ()) for row in weights)
    lines = [head + "".join(f"{f'domain {k}':>10}" for k in range(count))]
    rows = ("".join(f"{weight:>10.3f}" for weight in row or ()) for row in weights)
    return [*lines, *(label + row for label, row in zip(labels, rows, strict=True))]
