"""The models that are evaluated. Training, `vitface evaluate` and studies take them from here, so that a model has one
result, whoever asks: the precision is a matter of the model and the machine, and not measured.

The frozen backbone's results depend on nothing that is trained. They are kept in $VITFACE_HOME/frozen, by the settings
of the backbone, its file and the pairs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from vitface.config import FaceConfig
from vitface.device import evaluation_dtype
from vitface.errors import VitfaceError
from vitface.evaluation.benchmarks import Evaluation, InTurns, evaluate_all, in_order, pairs_sha256
from vitface.evaluation.protocol import Verification
from vitface.evaluation.scores import load_scores, save_scores
from vitface.files import cache_home, make_folder
from vitface.model.face import FaceModel
from vitface.recogniser import Recogniser
from vitface.store.faces import Checkpoint, frozen_face
from vitface.version import __version__


def judged(
    checkpoint: Checkpoint, device: torch.device, change: Callable[[FaceModel], None] | None = None
) -> Recogniser:
    """The model of a checkpoint, prepared; `change` is a study's control, which changes it before that."""
    dtype = evaluation_dtype(checkpoint.config.dtype, device)
    model = Recogniser.from_checkpoint(checkpoint, device, dtype)
    if change is not None:
        change(model.model)
    return model.prepare()


def judged_frozen(name: str, weights: str | Path | None, image_size: int | None, device: torch.device) -> Recogniser:
    """The frozen backbone, prepared, in float32: a baseline has one precision on every machine."""
    return Recogniser(frozen_face(name, weights, image_size)).to(device).prepare()


def evaluate_frozen(
    model: Recogniser,
    names: list[str],
    data_dir: str | Path,
    in_turns: InTurns = in_order,
    agree: Callable[[list[str]], list[str]] = list,
    keep: bool = True,
) -> Evaluation:
    """`evaluate_all` of a model of `judged_frozen`, but of what was evaluated before the results are taken from disk.

    `agree` gives every rank the benchmarks that the first one has, which alone should `keep` results. What caused an
    alarm is evaluated anew.
    """
    files = {name: _kept_file(model, name, data_dir) for name in names}
    kept = {name: result for name, file in files.items() if (result := _read(file)) is not None}
    whole = Evaluation({}, [], [], agree(list(kept)))
    for name in names:
        if name in whole.kept:
            whole.results.update({name: kept[name]} if name in kept else {})
            continue
        found = evaluate_all(model.embed, [name], data_dir, in_turns, quality=model.quality)
        whole.results.update(found.results)
        whole.alarms.extend(found.alarms)
        whole.failures.extend(found.failures)
        file = files[name]
        if keep and file is not None and found.results and not found.alarms and not found.failures:
            with suppress(OSError):  # a cache that cannot be written is none
                make_folder(file.parent)
                save_scores(file, found.results, "frozen")
    return whole


def _kept_file(model: Recogniser, name: str, data_dir: str | Path) -> Path | None:
    """Where the backbone's results on a benchmark are kept; None if its pairs cannot be read."""
    try:
        data = pairs_sha256(name, data_dir)
    except VitfaceError:
        return None
    return _file(model.config, model.model.vit.device, name, data)


def _file(config: FaceConfig, device: torch.device, name: str, data: str) -> Path:
    about = [__version__, torch.__version__, device.type, name, data, dataclasses.asdict(config)]
    return cache_home() / "frozen" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.safetensors"


def is_kept(config: FaceConfig, device: torch.device, name: str, data: str) -> bool:
    """Whether `evaluate_frozen` of a backbone with this `frozen_config` will take a benchmark's results from disk."""
    return _file(config, device, name, data).is_file()


def _read(file: Path | None) -> Verification | None:
    with suppress(VitfaceError, OSError, ValueError, KeyError):
        return next(iter(load_scores(file)[0].values())) if file is not None and file.is_file() else None
    return None
