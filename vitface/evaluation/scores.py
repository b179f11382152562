"""Verification scores on disk: tables, comparisons and reports are computed from them, without the model.

A scores file is safetensors. For each set of pairs it has `NAME/DATA.distance` float64 (M,), `.issame` uint8 (M,),
`.folds` int64 (M,) and, where names are known, `.people` int64 (M, 2). NAME is the benchmark's; DATA is the SHA-256 of
the pairs, because other pairs may come under the same name. The metadata names the model.

Read back, a benchmark is called NAME; where there are several sets of that name, each is NAME and eight digits of its
DATA.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vitface.errors import CheckpointError
from vitface.evaluation.protocol import Verification, verify
from vitface.files import open_regular, replace_file
from vitface.lock import waiting_lock

SCORES = "scores.safetensors"


def save_scores(path: Path, results: Mapping[str, Verification], model: str) -> None:
    """Writes `results` by benchmark, atomically. `model` is the SHA-256 of the checkpoint, or a name."""
    tensors = {}
    for label, result in results.items():
        stem = f"{benchmark_of(label)}/{result.data}"
        tensors[f"{stem}.distance"], tensors[f"{stem}.folds"] = result.distance, result.folds.astype(np.int64)
        tensors[f"{stem}.issame"] = result.issame.astype(np.uint8)
        if result.people is not None:
            tensors[f"{stem}.people"] = result.people
    replace_file(path, save(tensors, {"model": model}), private=True)


def keep_scores(run: Path, results: Mapping[str, Verification], model: str) -> None:
    """Adds `results` to the scores of a run directory; those of another checkpoint than `model` are dropped."""
    with waiting_lock(run / ".scores.lock"):
        kept, kept_model = load_scores(run / SCORES) if (run / SCORES).is_file() else ({}, model)
        every = [*(kept if kept_model == model else {}).items(), *results.items()]
        save_scores(run / SCORES, labelled((benchmark_of(label), result) for label, result in every), model)


def load_scores(path: Path) -> tuple[dict[str, Verification], str]:
    """(results by benchmark, computed from the scores; the model that gave the scores).

    CheckpointError for a missing or damaged file.
    """
    try:
        open_regular(path).close()
        with safe_open(path, "np") as file:
            model = (file.metadata() or {}).get("model", "")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and evaluate again") from None
    results = []
    for stem in (key.removesuffix(".distance") for key in tensors if key.endswith(".distance")):
        distance, issame, folds = (tensors[f"{stem}.{part}"] for part in ("distance", "issame", "folds"))
        result = verify(distance, issame.astype(bool), folds, tensors.get(f"{stem}.people"))
        name, _, data = stem.partition("/")
        results.append((name, dataclasses.replace(result, data=data)))
    return labelled(results), model


def benchmark_of(label: str) -> str:
    """The benchmark's name in a label of `labelled`."""
    return label.partition(" ")[0]


def labelled(results: Iterable[tuple[str, Verification]]) -> dict[str, Verification]:
    """Results by name, or by "NAME DATA" where several sets have the name; of one set the last result counts."""
    found = {(name, result.data): result for name, result in results}
    several = Counter(name for name, _ in found)
    return {f"{name} {data[:8]}" if several[name] > 1 else name: result for (name, data), result in found.items()}
