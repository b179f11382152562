"""The people a run never trained on: they choose its best epoch, and its thresholds.

Thresholds are for the cosine of two embeddings as `FaceModel.embed` gives them: the same person if it is >= the
threshold. They lie in the run's thresholds.json, {"model": SHA-256 of the checkpoint, "pairs": {"same", "different"},
"thresholds": {FAR: {"threshold", "tar"} or {"refused": why}}}, and on the model that `vitface.load` returns.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from vitface.config import TrainConfig
from vitface.data.loader import read_batches, split_people
from vitface.data.records import Samples
from vitface.errors import EvaluationError
from vitface.evaluation.verify import far_threshold
from vitface.model.face import FaceModel
from vitface.model.store import FARS, THRESHOLDS_FILE, model_sha256
from vitface.training.setup import open_inputs

HOLDOUT_IMAGES = 2000


def holdout_scores(
    model: FaceModel, samples: Samples, held_out: np.ndarray, flip: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, issame) of all pairs of (at most HOLDOUT_IMAGES of) these samples; the model is in eval mode."""
    held_out = held_out[:: -(-len(held_out) // HOLDOUT_IMAGES)]
    positions = np.array_split(np.arange(len(held_out)), -(-len(held_out) // 128))
    rows = [model.embed(images, flip=flip) for _, images in read_batches(samples, held_out, positions)]
    embeddings, labels = np.concatenate(rows), samples.labels[held_out]
    first, second = np.triu_indices(len(labels), 1)
    return (embeddings @ embeddings.T)[first, second], labels[first] == labels[second]


def calibrate(config: TrainConfig, run_dir: Path, model: FaceModel) -> dict[str, Any] | None:
    """Writes the thresholds of the run's best checkpoint, and returns what it wrote; None if nobody was held out."""
    samples = open_inputs(config)
    held_out = split_people(samples, config.holdout_people, config.max_samples, config.seed).held_out
    if not len(held_out):
        return None
    score, issame = holdout_scores(model, samples, held_out, flip=True)
    thresholds: dict[str, dict[str, float | str]] = {}
    for far in FARS:
        try:
            threshold, tar = far_threshold(score, issame, far)
            thresholds[f"{far:g}"] = {"threshold": threshold, "tar": tar}
        except EvaluationError as error:
            thresholds[f"{far:g}"] = {"refused": str(error)}
    written = {
        "model": model_sha256(run_dir),
        "pairs": {"same": int(issame.sum()), "different": int((~issame).sum())},
        "thresholds": thresholds,
    }
    partial = run_dir / (THRESHOLDS_FILE + ".part")
    partial.write_text(json.dumps(written, indent=1), encoding="utf-8")
    os.replace(partial, run_dir / THRESHOLDS_FILE)
    return written


def thresholds_text(written: dict[str, Any]) -> str:
    """The thresholds in words, a line per FAR."""
    pairs = written["pairs"]
    lines = [
        f"thresholds on the cosine, from {pairs['same']:,} same and {pairs['different']:,} different pairs held out"
    ]
    for far, entry in written["thresholds"].items():
        lines.append(
            f"  FAR {far}: not enough pairs ({entry['refused']})"
            if "refused" in entry
            else f"  FAR {far}: {entry['threshold']:.4f}, accepts {100 * entry['tar']:.2f} % of same pairs"
        )
    return "\n".join(lines)
