"""Run directories: checkpoints that are whole or not there.

A checkpoint is a directory `checkpoints/step-N`. Its files are written under a temporary name and fsynced, sealed by a
manifest of sizes and SHA-256, and renamed into place; `best` and `last` are relative links, replaced atomically. Resume
does not trust the links: it takes the newest step whose manifest verifies. safetensors and JSON only.

step-N/
  model.safetensors     what was trained of the face model: adapters, router, head
  model.json            FaceConfig: everything needed to rebuild it around the frozen backbone
  training.safetensors  identity matrix and optimiser moments; never shared: the identity matrix is biometric data
  training.json         counters
  manifest.json         sizes, SHA-256, step, version
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vitface.errors import CheckpointError
from vitface.model.store import MODEL_FILES, sha256_file, verify_checkpoint, write_tensors
from vitface.version import __version__

KEEP_LAST = 2
ALL_FILES = (*MODEL_FILES, "training.safetensors", "training.json")


def save_checkpoint(
    run_dir: Path,
    step: int,
    model_tensors: dict[str, Tensor],
    model_settings: dict[str, Any],
    training_tensors: dict[str, Tensor],
    training_state: dict[str, Any],
    is_best: bool,
) -> Path:
    """Writes `checkpoints/step-N`, points `last` (and `best`) at it and drops all but the newest two and the best."""
    parent = run_dir / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    final, partial = parent / f"step-{step}", parent / f".partial-step-{step}"
    if is_whole(final):  # a step is a function of the run's settings: what is there is what would be written
        return final
    for leftover in (final, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    write_tensors(partial / "model.safetensors", model_tensors)
    write_tensors(partial / "training.safetensors", training_tensors)
    _write_json(partial / "model.json", model_settings)
    _write_json(partial / "training.json", training_state)
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in partial.iterdir()}
    manifest = {"step": step, "vitface_version": __version__, "files": files}
    _write_json(partial / "manifest.json", manifest)
    for path in (*partial.iterdir(), partial):
        _fsync(path)
    os.rename(partial, final)
    _fsync(parent)
    _link(parent / "last", final.name)
    if is_best or not (parent / "best").exists():
        _link(parent / "best", final.name)
    _prune(parent)
    return final


def is_whole(path: Path) -> bool:
    """Whether every file of a step directory is there as its manifest sealed it."""
    try:
        verify_checkpoint(path, ALL_FILES)
    except CheckpointError:
        return False
    return True


def step_directories(run_dir: Path) -> list[Path]:
    """The run's step-N directories, newest first, verified or not."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest step directory that verifies, None if the run has none at all; CheckpointError if none is whole."""
    directories = step_directories(run_dir)
    for path in directories:
        if is_whole(path):
            return path
    if directories:
        raise CheckpointError(f"no checkpoint in {run_dir} is whole; start afresh in another --save-dir")
    return None


def load_training(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training tensors and counters of a verified step directory."""
    return load_file(path / "training.safetensors"), json.loads((path / "training.json").read_text())


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(link: Path, target: str) -> None:
    fresh = link.with_name(f".{link.name}.new")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    os.replace(fresh, link)


def _prune(parent: Path) -> None:
    best = (parent / "best").resolve()
    for old in step_directories(parent.parent)[KEEP_LAST:]:
        if old.resolve() != best:
            shutil.rmtree(old)
