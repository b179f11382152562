"""Backbones on disk: one safetensors file whose metadata carries every setting needed to run it.

The file holds our state-dict names at the native grid; the settings (`ViTConfig`) and where it came from are JSON in the
safetensors metadata. Source checkpoints (Meta's .pth, OpenAI's archive, ...) are not read here: weights/ converts them.
"""

import dataclasses
import hashlib
import json
import os
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import vitface
from vitface.config import VIT_PRESETS, ViTConfig, backbone_name
from vitface.errors import WeightsError
from vitface.model.vit import ViT, init_weights, resample_pos_embed

BACKBONE_FORMAT = "vitface-backbone-1"


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save_backbone(path: Path, name: str, config: ViTConfig, tensors: dict[str, Tensor], source: dict[str, str]) -> None:
    """Writes a backbone file, under a temporary name first so that a broken write leaves no half file.

    `tensors` are named and shaped as `ViT(config, config.native_size)` has them. `source` says where they came from:
    file, sha256, licence and anything else worth keeping.
    """
    metadata = {
        "format": BACKBONE_FORMAT,
        "name": name,
        "config": json.dumps(dataclasses.asdict(config)),
        "source": json.dumps(source),
        "vitface_version": vitface.__version__,
    }
    partial = path.with_name(path.name + ".part")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata)
    os.replace(partial, path)


def read_backbone(path: Path) -> tuple[str, ViTConfig, dict[str, Tensor], dict[str, str]]:
    """(name, config, tensors, source) of a converted file; WeightsError says what to do about any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == BACKBONE_FORMAT:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        if path.suffix == ".safetensors":
            raise WeightsError(f"{path}: damaged ({error}); fetch or convert it again") from None
        metadata = {}
    if metadata.get("format") != BACKBONE_FORMAT:
        raise WeightsError(
            f"{path} is not a converted file; convert it first:\n"
            f"  python -m vitface.weights.convert NAME --src {path} --out weights/NAME.safetensors\n"
            f"with NAME one of {', '.join(VIT_PRESETS)}"
        )
    settings = json.loads(metadata["config"])
    config = ViTConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})
    return metadata["name"], config, tensors, json.loads(metadata["source"])


def find_backbone(name: str) -> Path:
    """Where NAME.safetensors lies: ./weights, $VITFACE_HOME (default ~/.cache/vitface), then the package.

    WeightsError names the places and the fetch command.
    """
    file = f"{name}.safetensors"
    home = Path(os.environ.get("VITFACE_HOME", "~/.cache/vitface")).expanduser()
    packaged = resources.files("vitface.weights") / file
    for path in (Path("weights") / file, home / file, Path(str(packaged))):
        if path.is_file():
            return path
    raise WeightsError(
        f"no weights for {name}: looked for {file} in ./weights, {home} and the package. Get them with\n"
        f"  python -m vitface.weights.fetch {name}\n"
        f"or name a converted file with --weights FILE"
    )


def load_backbone(name: str, weights: str | Path | None = None, image_size: int = 224) -> ViT:
    """A frozen-ready ViT in float32 and eval mode for square images of `image_size` pixels.

    `weights`: None looks for NAME.safetensors (see `find_backbone`), a path loads that file, "random" initialises as a
    pure function of the name. Called on normalised float (B, 3, S, S) it gives final-norm tokens (B, N, D), CLS first.
    `vit.config` holds the settings, which come from the file where there is one.
    """
    name = backbone_name(name)
    if weights == "random":
        vit = ViT(VIT_PRESETS[name], image_size)
        init_weights(vit)
        return vit.eval()
    path = find_backbone(name) if weights is None else Path(weights)
    stored_name, config, tensors, _ = read_backbone(path)
    if stored_name != name:
        raise WeightsError(f"{path} holds {stored_name}, not {name}; pass --backbone {stored_name}")
    check_tensors(path, tensors, vit_shapes(config))
    tensors["pos_embed"] = resample_pos_embed(tensors["pos_embed"], config.grid(image_size), config.pos_interp)
    vit = ViT(config, image_size)
    vit.load_state_dict(tensors)
    return vit.eval()


def vit_shapes(config: ViTConfig) -> dict[str, torch.Size]:
    """The tensors a backbone file of this config holds, without allocating them."""
    with torch.device("meta"):
        return {key: tensor.shape for key, tensor in ViT(config, config.native_size).state_dict().items()}


def check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict[str, torch.Size]) -> None:
    """WeightsError unless `tensors` has exactly these names and shapes, in a float dtype, all finite."""
    for key in sorted(shapes.keys() ^ tensors.keys()):
        raise WeightsError(f"{path}: {'missing' if key in shapes else 'unknown'} tensor {key}")
    for key, tensor in tensors.items():
        if tensor.shape != shapes[key] or not tensor.is_floating_point():
            raise WeightsError(f"{path}: {key} is {tensor.dtype} {tuple(tensor.shape)}, expected {tuple(shapes[key])}")
        if not tensor.isfinite().all():
            raise WeightsError(f"{path}: {key} has NaN or infinite values; fetch or convert the file again")
