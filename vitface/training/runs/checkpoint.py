"""Run directories: checkpoints that are whole or absent.

A checkpoint is a directory `checkpoints/step-N`. Its files are written to a folder with a temporary name and fsynced;
a manifest of sizes and SHA-256 seals them, and the folder is renamed. Resume takes the newest step whose manifest
verifies, and the best is the newest step whose manifest has "is_best". The relative links `best` and `last` are for
people: nothing reads them, and a disk or a copy may have none.

step-N/
  model.safetensors     what was trained of the face model: adapters, router, head
  model.json            FaceConfig: everything needed to rebuild it around the frozen backbone
  training.safetensors  identity matrix and optimiser moments; never shared: the identity matrix is biometric data
  training.json         counters, the settings and the data it was trained with
  identities-*          with --partial-fc: the identity matrix by ranges of classes (see `identity_files`)
  manifest.json         step, whether it was the best, sizes and SHA-256 of the files, versions, and its own SHA-256
"""

import dataclasses
import shutil
import typing
import warnings
from collections.abc import Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitface.errors import CheckpointError
from vitface.files import (
    json_bytes,
    new_folder,
    read_json,
    remove_folder,
    replace_link,
    sha256_bytes,
    sync_folder,
    write_synced,
)
from vitface.store.faces import MANIFEST_FILE, MODEL_FILES, read_manifest, step_directories
from vitface.store.tensors import tensor_bytes
from vitface.version import __version__

KEEP_LAST = 2  # at least 2: the newest one may be found damaged
ALL_FILES = (*MODEL_FILES, "training.safetensors", "training.json")


@dataclasses.dataclass
class Progress:
    """The counters of a run. `epoch` epochs are done and judged; `step` may be in the middle of the next one."""

    step: int = 0
    epoch: int = 0
    first_step: int = 0  # of the current epoch
    epoch_loss: float = 0.0  # summed over the steps of the current epoch
    best_epoch: int = 0
    best_auc: float = -1.0
    skipped: int = 0  # steps of fp16 whose gradients overflowed
    skipped_in_a_row: int = 0
    finished: bool = False

    @property
    def steps_into_epoch(self) -> int:
        return self.step - self.first_step

    def restart_epoch(self) -> None:
        """The current epoch starts again with the next step."""
        self.first_step, self.epoch_loss = self.step, 0.0


def save_checkpoint(
    run_dir: Path,
    step: int,
    model_tensors: dict[str, Tensor],
    model_settings: dict[str, Any],
    training_tensors: dict[str, Tensor],
    training_state: dict[str, Any],
    is_best: bool,
    more_files: Iterable[tuple[str, bytes]] = (),
) -> Path:
    """Writes `checkpoints/step-N`, points `last` (and `best`) at it and deletes all but the newest two and the best.

    `more_files` are read one at a time. A checkpoint of that step is replaced. CheckpointError, with the earlier
    checkpoints unchanged, if a tensor is not finite or the operating system refuses.
    """
    for name, tensor in (*model_tensors.items(), *training_tensors.items()):
        if not tensor.isfinite().all():
            raise CheckpointError(f"step {step} was not saved: {name} has NaN or infinite values")
    parent = run_dir / "checkpoints"
    final = parent / f"step-{step}"
    try:
        _remove_leftovers(parent)
        files = {
            "model.safetensors": tensor_bytes(model_tensors),
            "training.safetensors": tensor_bytes(training_tensors),
            "model.json": json_bytes(model_settings),
            "training.json": json_bytes(training_state),
        }
        _write_step(final, step, is_best, chain(files.items(), more_files))
        link_checkpoint(final)
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"step {step} could not be saved: {error or 'out of memory'}") from error
    _prune(parent)
    return final


def _write_step(final: Path, step: int, is_best: bool, files: Iterable[tuple[str, bytes]]) -> None:
    """Writes the files, and their manifest after them."""
    sealed = {}
    with new_folder(final) as folder:
        for name, data in files:
            write_synced(folder / name, data, private=True)
            sealed[name] = {"size": len(data), "sha256": sha256_bytes(data)}
        versions = {"vitface_version": __version__, "torch_version": str(torch.__version__)}
        manifest = {"step": step, "is_best": is_best, **versions, "files": sealed}
        write_synced(folder / MANIFEST_FILE, json_bytes({**manifest, "seal": sha256_bytes(json_bytes(manifest))}))


def link_checkpoint(step: Path) -> None:
    """Points `last` at a step directory and `best` at the best one, if the disk has links, and waits for the disk."""
    parent = step.parent
    for name, target in (("last", step), ("best", _newest_best(parent.parent) or step)):
        link = parent / name
        if link.is_dir() and not link.is_symlink():  # what a copy that follows links makes of one
            copied = read_manifest(link, ()).get("step")
            if not (parent / f"step-{copied}").is_dir():
                continue  # it is all that is left of that checkpoint
            shutil.rmtree(link)
        replace_link(link, target.name)
    sync_folder(parent)  # before anything is deleted: `best` must not point at it


def verify_step(path: Path) -> dict[str, Any]:
    """The manifest of a whole step directory; CheckpointError names what is damaged or missing."""
    manifest = read_manifest(path, ALL_FILES)
    seal = manifest.pop("seal", None)
    if seal != sha256_bytes(json_bytes(manifest)):
        raise CheckpointError(f"{path}/manifest.json is damaged: it does not match its own seal")
    if f"step-{manifest.get('step')}" != path.resolve().name:
        raise CheckpointError(f"{path} holds step {manifest.get('step')}: it was renamed or swapped with another")
    read_manifest(path, tuple(Path(name).name for name in manifest["files"] if name not in ALL_FILES))
    return manifest


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Returns the newest step directory that verifies, and prints which ones it passed over.

    None if the run has no step directory at all; CheckpointError if it has some, but none is whole.
    """
    directories = step_directories(run_dir)
    for path in directories:
        fault = _fault(path)
        if fault is None:
            return path
        print(f"passed over: {fault}")
    if directories:
        raise CheckpointError(f"no checkpoint in {run_dir} is whole; start afresh in another --save-dir")
    return None


def load_state(path: Path) -> dict[str, Any]:
    """The counters, settings and data of a verified step directory; CheckpointError if they are of other types."""
    try:
        state, kinds = read_json(path / "training.json"), typing.get_type_hints(Progress)
        counters = state["progress"]
        whole = counters.keys() == kinds.keys() and all(type(counters[key]) is kind for key, kind in kinds.items())
        if whole and min(counters.values()) >= -1 and isinstance(state["settings"], dict):
            return {**state, "data": dict(state["data"])}
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise CheckpointError(f"{path}/training.json is damaged; resume an earlier step with --resume {path.parent}/step-N")


def _fault(path: Path) -> str | None:
    try:
        verify_step(path)
    except (CheckpointError, OSError) as error:
        return str(error)
    return None


def _newest_best(run_dir: Path) -> Path | None:
    """`best_checkpoint` among those with a readable manifest; None if none of them was the best."""
    for path in step_directories(run_dir):
        with suppress(CheckpointError, OSError):
            if read_manifest(path, ()).get("is_best"):
                return path
    return None


def _remove_leftovers(parent: Path) -> None:
    """Removes what a killed process left of a checkpoint or a link that it was writing or deleting."""
    for leftover in parent.glob(".*"):
        with suppress(OSError):  # a failure must not prevent saving
            leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover)


def _prune(parent: Path) -> None:
    """Deletes what is older than the newest KEEP_LAST that verify, except the best; warns where that fails."""
    best, whole = _newest_best(parent.parent), 0
    for path in step_directories(parent.parent):
        if whole >= KEEP_LAST and path != best:
            try:
                remove_folder(path)
            except (OSError, MemoryError) as error:
                warnings.warn(f"{path} could not be deleted: {error}", RuntimeWarning, stacklevel=3)
        elif whole < KEEP_LAST:
            whole += _fault(path) is None
