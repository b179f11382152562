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

from safetensors.torch import load_file, save_file
from torch import Tensor

from vitface.errors import CheckpointError
from vitface.model.store import sha256_file, verify_checkpoint
from vitface.version import __version__

KEEP_LAST = 2


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
    for leftover in (final, partial):  # a step is saved again only after a rewind, and then this one is the valid one
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    for name, tensors in (("model", model_tensors), ("training", training_tensors)):
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, partial / f"{name}.safetensors")
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


def step_directories(run_dir: Path) -> list[Path]:
    """The run's step-N directories, newest first, verified or not."""
    found = [path for path in (run_dir / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: -int(path.name[5:]))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest step directory that verifies, None if the run has none at all; CheckpointError if none is whole."""
    directories = step_directories(run_dir)
    for path in directories:
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError:
            continue
    if directories:
        raise CheckpointError(f"no checkpoint in {run_dir} is whole; start afresh in another --save-dir")
    return None


def load_training(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training tensors and counters of a verified step directory."""
    return load_file(path / "training.safetensors"), json.loads((path / "training.json").read_text())


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1))


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
