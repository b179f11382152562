"""The held-out people, on whom a run is not trained: they decide its best epoch and its thresholds.

A threshold is for the cosine of two embeddings of `Recogniser.embed`: the same person if it is >= the threshold. The
file is the run's thresholds.json (see `vitface.store.thresholds`).
"""

from typing import Any

import numpy as np

from vitface.data.formats.stored import Samples
from vitface.data.loader import read_batches
from vitface.errors import EvaluationError
from vitface.files import json_bytes, replace_file
from vitface.metrics import far_threshold
from vitface.model.face import FaceModel
from vitface.model.inference import embed_batches, split
from vitface.store.faces import Checkpoint
from vitface.store.thresholds import FARS, THRESHOLDS_FILE
from vitface.training.batches import TrainingData
from vitface.training.ranks.parallel import in_turns
from vitface.training.ranks.process_group import rank

HOLDOUT_IMAGES = 2000


def embed_held_out(
    model: FaceModel, samples: Samples, held_out: np.ndarray, flip: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings (n, E), domain weights (n, K) and people (n,) of at most HOLDOUT_IMAGES of these samples."""
    held_out = held_out[:: -(-len(held_out) // HOLDOUT_IMAGES)]
    positions = np.array_split(np.arange(len(held_out)), -(-len(held_out) // 128))

    def embed_batch(turn: int) -> np.ndarray:
        [(_, crops)] = read_batches(samples, held_out, [positions[turn]])
        return np.hstack(embed_batches(model, split(model, crops, flip), flip))

    rows = in_turns(embed_batch, len(positions))
    embeddings, gates = np.split(rows, [model.config.embedding_dim], axis=1)
    return embeddings, gates, samples.labels[held_out]


def all_pairs(embeddings: np.ndarray, people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, issame) of each of the n (n - 1) / 2 pairs of unit-norm embeddings (n, E)."""
    first, second = np.triu_indices(len(people), 1)
    return (embeddings @ embeddings.T)[first, second], people[first] == people[second]


def calibrate(data: TrainingData, checkpoint: Checkpoint, model: FaceModel) -> str:
    """Writes the thresholds of a run's checkpoint, whose model is `model`; returns them in words."""
    assert checkpoint.run is not None
    if not len(data.split.held_out):
        return "thresholds: none, nobody was held out"
    embeddings, _, people = embed_held_out(model, data.samples, data.split.held_out, flip=True)
    score, issame = all_pairs(embeddings, people)
    thresholds: dict[str, dict[str, float | str]] = {}
    for far in FARS:
        try:
            threshold, tar = far_threshold(score, issame, far)
            thresholds[f"{far:g}"] = {"threshold": threshold, "tar": tar}
        except EvaluationError as error:
            thresholds[f"{far:g}"] = {"refused": str(error)}
    written = {
        "model": checkpoint.sha256,
        "pairs": {"same": int(issame.sum()), "different": int((~issame).sum())},
        "thresholds": thresholds,
    }
    if rank() == 0:
        replace_file(checkpoint.run / THRESHOLDS_FILE, json_bytes(written))
    return thresholds_text(written)


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
