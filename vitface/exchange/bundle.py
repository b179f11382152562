"""A face model as a folder of its own: the files that `vitface.load` needs, and nothing else of a training run."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from vitface.data.formats.published import PAIRS
from vitface.errors import ConfigError, ExchangeError
from vitface.files import json_bytes, make_folder, new_folder, sha256_bytes, sync_folder, write_synced
from vitface.model.face import FaceModel
from vitface.model.lora import merge_lora
from vitface.store.backbone import backbone_bytes, contents_sha256, read_backbone
from vitface.store.faces import MANIFEST_FILE, Checkpoint, trained_tensors
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
        if calibration.get("source", "lfw") not in PAIRS:  # a file's name may be somebody's
            calibration = {**calibration, "source": "own pairs"}
        files[THRESHOLDS_FILE] = json_bytes({"model": sha256_bytes(files["model.safetensors"]), **calibration})
    manifest: dict[str, Any] = {"vitface_version": __version__, "torch_version": str(torch.__version__)}
    if backbone not in (None, "random"):
        manifest["backbone_sha256"] = contents_sha256(Path(backbone))
    manifest["files"] = {name: {"size": len(data), "sha256": sha256_bytes(data)} for name, data in files.items()}
    return {**files, MANIFEST_FILE: json_bytes(manifest)}


def merged_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """A face model's folder with the backbone file that LoRA was folded into: W' = W + scaling · B A.

    The sum is formed in float64 from the backbone file's float32, whatever precision the model runs in. The backbone's
    NAME.safetensors is a converted file like any other, for `--weights` and `load_backbone`. ExchangeError for DA-LoRA,
    whose weights differ from image to image, and for a model without adapters or without a backbone file.
    """
    path, config, file = checkpoint.path, checkpoint.config, checkpoint.backbone
    if config.num_domains > 1 or not config.lora_rank:
        kind = "DA-LoRA, whose weights depend on the image" if config.lora_rank else "without adapters"
        raise ExchangeError(f"{path} is {kind}: there is nothing to merge; --format onnx keeps the router inside")
    if file == "random":
        raise ExchangeError(f"{path} was trained around random weights: there is no backbone file to merge into")
    model, (_, _, frozen, source) = checkpoint.load("fp32"), read_backbone(Path(file))
    merge_lora(model.vit)
    tensors = model.vit.state_dict()
    if "pos_embed" in frozen:
        tensors["pos_embed"] = frozen["pos_embed"].float()  # at the native size
    source = {**source, "merged": f"LoRA, model.safetensors with sha256 {checkpoint.sha256}"}
    backbone = backbone_bytes(config.backbone, config.vit, tensors, source)
    plain = dataclasses.replace(
        config, weights_sha256=sha256_bytes(backbone), lora_rank=0, train_patch_embed=False, train_head=False
    )
    face = FaceModel(model.vit, plain)
    face.head = model.head
    return {f"{config.backbone}.safetensors": backbone, **face_files(face, None, checkpoint.calibration)}


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
