"""A face model as a folder of its own: the files that `vitface.load` needs, and nothing else of a training run."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from vitface.errors import ConfigError, ExchangeError
from vitface.files import json_bytes, make_folder, new_folder, sha256_bytes, sync_folder, write_synced
from vitface.model.face import FaceModel
from vitface.store.backbones import contents_sha256
from vitface.store.faces import MANIFEST_FILE, trained_tensors
from vitface.store.tensors import tensor_bytes
from vitface.store.thresholds import THRESHOLDS_FILE
from vitface.version import __version__


def face_files(
    model: FaceModel, backbone: str | Path | None, calibration: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """model.safetensors, model.json, thresholds.json where there are any, and the manifest that seals them.

    `backbone` is the model's backbone file, None or "random" if there is none: the manifest keeps a hash of its
    contents, so that the same weights in another file are accepted. `calibration` is a checkpoint's.
    """
    files = {
        "model.safetensors": tensor_bytes(trained_tensors(model)),
        "model.json": json_bytes(dataclasses.asdict(model.config)),
    }
    if calibration:
        files[THRESHOLDS_FILE] = json_bytes({"model": sha256_bytes(files["model.safetensors"]), **calibration})
    manifest: dict[str, Any] = {"vitface_version": __version__, "torch_version": str(torch.__version__)}
    if backbone not in (None, "random"):
        manifest["backbone_sha256"] = contents_sha256(Path(backbone))
    manifest["files"] = {name: {"size": len(data), "sha256": sha256_bytes(data)} for name, data in files.items()}
    return {**files, MANIFEST_FILE: json_bytes(manifest)}


def write_folder(out: Path, folders: dict[str, dict[str, bytes]]) -> None:
    """Writes `out` with its files ("") and subfolders, whole or not at all; ConfigError if it is there already."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} exists; name a folder that does not")
    try:
        with new_folder(out) as partial:
            for folder, files in folders.items():
                make_folder(partial / folder)
                for name, data in files.items():
                    write_synced(partial / folder / name, data)
                sync_folder(partial / folder)
    except (OSError, MemoryError) as error:
        raise ExchangeError(f"{out} could not be written: {error or 'out of memory'}") from error
