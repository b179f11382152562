"""TinyFace's search: the shares of probes that find a photo of their person among the best; as text and JSON.

Scores are cosines in float64, rounded to 12 decimals, as IJB's; ties count against the model. Letter: E embedding.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from vitface.data.formats.tinyface_folder import TinyFace
from vitface.errors import EvaluationError
from vitface.evaluation.ijb.scoring import products
from vitface.evaluation.statistics import wilson

RANKS = (1, 5, 10, 20)


def search_ranks(faces: TinyFace, parts: Iterable[np.ndarray]) -> dict[int, float]:
    """The shares of probes that have a photo of their person among the k best, from embeddings float32 (n, E) of the
    faces in their order. A stranger that ties with the best photo of the person counts as better.

    EvaluationError if no probe's person is in the gallery; probes without one do not count, with an alarm.
    """
    rows = np.concatenate([part / np.linalg.norm(part.astype("f8"), axis=1, keepdims=True) for part in parts])
    gallery, people = rows[~faces.probe], faces.person[~faces.probe]
    better, mated = [], 0
    wanted = faces.person[faces.probe]
    for block, cosines in products(rows[faces.probe], gallery):
        cosines, own = cosines.round(12), people == wanted[block, None]
        has = own.any(axis=1)
        best = np.where(own, cosines, -np.inf)[has].max(axis=1, initial=-np.inf)
        better.append(((cosines[has] >= best[:, None]) & ~own[has]).sum(axis=1))
        mated += int(has.sum())
    if not mated:
        raise EvaluationError("no probe is of a person in Gallery_Match: the folders are of different sets")
    if mated < len(wanted):
        faces.alarms.append(f"tinyface: {len(wanted) - mated:,} probes have nobody in Gallery_Match and do not count")
    return {k: float((np.concatenate(better) < k).mean()) for k in RANKS}


def search_result(faces: TinyFace, parts: Iterable[np.ndarray]) -> dict[str, Any]:
    """{"probes", "gallery", "distractors", "rank": {"1": `search_ranks`, "5", "10", "20"}, "interval": of rank-1}."""
    ranks, probes, strangers = search_ranks(faces, parts), int(faces.probe.sum()), int((faces.person < 0).sum())
    counts = dict(probes=probes, gallery=len(faces.crops) - probes - strangers, distractors=strangers)
    return {**counts, "rank": {str(k): share for k, share in ranks.items()}, "interval": wilson(ranks[1], probes)}


def search_text(entry: Mapping[str, Any]) -> str:
    """Two lines: what was searched, and the shares in %."""
    counts = f"{entry['probes']:,} probes, {entry['gallery']:,} photos of their people, {entry['distractors']:,} others"
    low, high = (100 * bound for bound in entry["interval"])
    ranks = "  ".join(f"rank-{k} {100 * share:.2f}" for k, share in entry["rank"].items())
    return f"tinyface: {counts}\n{ranks}  (rank-1: 95 % interval {low:.2f} to {high:.2f})"
