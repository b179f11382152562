"""Verification scores on disk: tables, comparisons and reports are computed from them, without the model.

A scores file is safetensors. For each set of pairs it has `NAME/DATA.distance` float64 (M,), `.issame` uint8 (M,),
`.folds` int64 (M,) and, where they are known, the two people as `.people` int64 (M, 2) and the lower quality of the two
photos as `.quality` float64 (M,). NAME is the benchmark's; DATA is the SHA-256 of the pairs, because other pairs may
come under the same name. Without folds it has `.threshold` float64 (1,), on the distance, -1 where there was none. The
metadata names the model.

Read back, a benchmark is called NAME; where there are several sets of that name, each is NAME and eight digits of its
DATA.
"""

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from vitface.data.formats.pairs import MAX_FOLDS
from vitface.errors import CheckpointError, VitfaceError
from vitface.evaluation.protocol import Verification, verify, verify_fixed
from vitface.files import replace_file
from vitface.lock import waiting_lock

if TYPE_CHECKING:
    from torch import Tensor

SCORES = "scores.safetensors"
MAX_PAIRS = 1 << 14  # more than any benchmark has; comparisons take memory for each of them


def save_scores(path: Path, results: Mapping[str, Verification], model: str) -> None:
    """Writes `results` by benchmark, atomically. `model` is the SHA-256 of the checkpoint, or a name."""
    tensors = {}
    for label, result in results.items():
        stem = f"{benchmark_of(label)}/{result.data}"
        tensors[f"{stem}.distance"], tensors[f"{stem}.folds"] = result.distance, result.folds.astype(np.int64)
        tensors[f"{stem}.issame"] = result.issame.astype(np.uint8)
        if result.quality is not None:
            tensors[f"{stem}.quality"] = result.quality.astype(np.float64)
        if result.people is not None:
            tensors[f"{stem}.people"] = result.people.astype(np.int64)
        if not result.in_folds:
            tensors[f"{stem}.threshold"] = np.nan_to_num(result.thresholds, nan=-1)
    replace_file(path, save(tensors, {"model": model}), private=True)


def keep_scores(run: Path, results: Mapping[str, Verification], model: str, file: str = SCORES) -> None:
    """Adds `results` to a file of scores of a run directory; those of another checkpoint than `model` are dropped, and
    those of a damaged file, with a note. Sets of more than MAX_PAIRS are not kept, also with a note."""
    for name, result in results.items():
        if len(result.issame) > MAX_PAIRS:
            print(f"note: {name} has more than {MAX_PAIRS:,} pairs: its scores are not kept", file=sys.stderr)
    results = {name: result for name, result in results.items() if len(result.issame) <= MAX_PAIRS}
    with waiting_lock(run / ".scores.lock"):
        try:
            kept, kept_model = load_scores(run / file)
        except CheckpointError as error:
            kept, kept_model = {}, model
            if (run / file).exists():
                print(f"note: {error}: only the scores of this evaluation are kept", file=sys.stderr)
        every = [*(kept if kept_model == model else {}).items(), *results.items()]
        save_scores(run / file, labelled((benchmark_of(label), result) for label, result in every), model)


def load_scores(path: Path) -> tuple[dict[str, Verification], str]:
    """(results by benchmark, computed from the scores; the model that gave the scores).

    CheckpointError for a missing file, and for one that holds anything but the scores of benchmarks.
    """
    from vitface.store.tensors import load_tensors  # here, so that help does not wait for torch

    if not path.exists():
        raise CheckpointError(f"{path} is missing")
    try:
        sets: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_tensors(path).items():
            stem, _, part = key.rpartition(".")
            sets.setdefault(stem, {})[part] = tensor
        with safe_open(path, "np") as file:
            model = (file.metadata() or {}).get("model", "")
        results = [_result(stem, parts) for stem, parts in sets.items()]
    except VitfaceError as error:
        why = re.sub(r"^damaged \((.*)\)$", r"\1", str(error).removeprefix(f"{path}: "))
        raise CheckpointError(f"{path} is damaged ({why}); delete it and evaluate again") from None
    return labelled(results), model


def _result(stem: str, tensors: "dict[str, Tensor]") -> tuple[str, Verification]:
    """(NAME, result) of a set of pairs; VitfaceError unless its tensors are what `save_scores` writes of a set."""
    import torch

    from vitface.store.tensors import first_fault

    count = len(tensors["distance"].flatten()) if "distance" in tensors else 0
    kinds = {"distance": torch.float64, "issame": torch.uint8, "folds": torch.int64}
    expected = {part: torch.empty(count, dtype=kind) for part, kind in kinds.items()}
    if "quality" in tensors:
        expected["quality"] = torch.empty(count, dtype=torch.float64)
    if "people" in tensors:
        expected["people"] = torch.empty((count, 2), dtype=torch.int64)
    if "threshold" in tensors:
        expected["threshold"] = torch.empty(1, dtype=torch.float64)
    fault = first_fault(tensors, expected, exact_dtype=True)
    if fault or not count <= MAX_PAIRS or not re.fullmatch(r"[\w.-]{1,40}/\w{0,64}", stem):
        raise CheckpointError(f"{stem[:100]}: {fault or f'{count:,} pairs'}")
    distance, issame, folds = (tensors[part].numpy() for part in kinds)
    quality = tensors["quality"].numpy() if "quality" in tensors else None
    ranges = {"distance": 4.001, "issame": 1, "folds": MAX_FOLDS - 1, **({} if quality is None else {"quality": 1})}
    for part, most in ranges.items():
        array = tensors[part].numpy()
        if not (array.min(initial=0) >= 0 and array.max(initial=0) <= most):
            raise CheckpointError(f"{stem}.{part} has values that are not from 0 to {most:g}")
    people = tensors["people"].numpy() if "people" in tensors else None
    name, _, data = stem.partition("/")
    if "threshold" in tensors:
        threshold = float(tensors["threshold"])
        result = verify_fixed(distance, issame.astype(bool), threshold if threshold >= 0 else np.nan, people)
    else:
        result = verify(distance, issame.astype(bool), folds, people)
    return name, dataclasses.replace(result, data=data, quality=quality)


def benchmark_of(label: str) -> str:
    """The benchmark's name in a label of `labelled`."""
    return label.partition(" ")[0]


def labelled(results: Iterable[tuple[str, Verification]]) -> dict[str, Verification]:
    """Results by name, or by "NAME DATA" where several sets have the name; of one set the last result counts."""
    found = {(name, result.data): result for name, result in results}
    several = Counter(name for name, _ in found)
    return {f"{name} {data[:8]}" if several[name] > 1 else name: result for (name, data), result in found.items()}
