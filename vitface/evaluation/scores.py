"""Verification scores on disk: tables, comparisons and reports are computed from them, without the model.

A scores file is safetensors. For each benchmark it has `NAME.distance` float64 (M,), `NAME.issame` uint8 (M,),
`NAME.folds` int64 (M,) and, where names are known, `NAME.people` int64 (M, 2); the metadata names the model.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vitface.errors import CheckpointError
from vitface.evaluation.protocol import Verification, verify
from vitface.files import replace_file

SCORES = "scores.safetensors"


def save_scores(path: Path, results: Mapping[str, Verification], model: str) -> None:
    """Writes `results` by benchmark, atomically. `model` is the SHA-256 of the checkpoint, or a name."""
    tensors = {}
    for name, result in results.items():
        tensors[f"{name}.distance"], tensors[f"{name}.folds"] = result.distance, result.folds.astype(np.int64)
        tensors[f"{name}.issame"] = result.issame.astype(np.uint8)
        if result.people is not None:
            tensors[f"{name}.people"] = result.people
    replace_file(path, save(tensors, {"model": model}))


def keep_scores(run: Path, results: Mapping[str, Verification], model: str) -> None:
    """Adds `results` to the scores of a run directory; those of another checkpoint than `model` are dropped."""
    kept, kept_model = load_scores(run / SCORES) if (run / SCORES).is_file() else ({}, model)
    save_scores(run / SCORES, {**(kept if kept_model == model else {}), **results}, model)


def load_scores(path: Path) -> tuple[dict[str, Verification], str]:
    """(results by benchmark, computed from the scores; the model that gave the scores).

    CheckpointError for a missing or damaged file.
    """
    try:
        with safe_open(path, "np") as file:
            model = (file.metadata() or {}).get("model", "")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and evaluate again") from None
    results = {}
    for name in (key.removesuffix(".distance") for key in tensors if key.endswith(".distance")):
        distance, issame, folds = (tensors[f"{name}.{part}"] for part in ("distance", "issame", "folds"))
        results[name] = verify(distance, issame.astype(bool), folds, tensors.get(f"{name}.people"))
    return results, model
