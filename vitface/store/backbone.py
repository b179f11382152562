"""Backbone files: one safetensors file for each backbone, with every setting needed to run it.

A file has tensors with our state-dict names at the native grid; its metadata has the settings (`ViTConfig`) and the
origin, as JSON. Source checkpoints (Meta's .pth, OpenAI's archive, ...) are not read here: weights/ converts them.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitface.config import MAX_IMAGE_SIZE
from vitface.errors import ConfigError, WeightsError, command, expect, is_path, is_whole
from vitface.files import cache_home, identify_file, open_regular, replace_file, sha256_file
from vitface.model.positions import resample_pos_embed
from vitface.model.vit import ViT, init_weights
from vitface.presets import VIT_PRESETS, ViTConfig, backbone_name
from vitface.store.settings import vit_config
from vitface.store.sources import how_to_get
from vitface.store.tensors import first_fault, tensor_bytes
from vitface.version import __version__

BACKBONE_FORMAT = "vitface-backbone-1"
PROJECTION = "projection"  # CLIP's, (D, E), beside the tensors of the model: `vitface golden` alone uses it


def load_backbone(name: str, weights: str | Path | None = None, image_size: int | None = None) -> ViT:
    """A ViT in float32 and eval mode for square images of `image_size` pixels, by default `ViTConfig.usual_size`.

    `weights`: None looks for NAME.safetensors (see `find_backbone`), a path loads that file, "random" initialises the
    weights, always to the same values for one name. The ViT maps normalised float (B, 3, S, S) to final-norm tokens
    (B, N, D): CLS, registers, patches. `vit.config` holds its settings, those of the file where there is one.
    """
    expect(isinstance(name, str), "name", name, "that of a backbone, such as 'dinov2'")
    expect(weights is None or is_path(weights), "weights", weights, "a file's path, 'random' or None")
    sizes = f"a whole number of pixels up to {MAX_IMAGE_SIZE}"
    fits = image_size is None or (is_whole(image_size) and image_size <= MAX_IMAGE_SIZE)
    expect(fits, "image_size", image_size, sizes)
    name = backbone_name(name)
    if weights == "random":
        config = VIT_PRESETS[name]
        init_weights(vit := ViT(config, config.native_size))
        tensors = vit.state_dict()
    else:
        config, tensors = _stored(name, find_backbone(name) if weights is None else Path(weights))
    image_size = config.usual_size if image_size is None else image_size
    if config.pos_embed:
        tensors["pos_embed"] = resample_pos_embed(tensors["pos_embed"], config.grid(image_size), config.pos_interp)
    vit = ViT(config, image_size)
    vit.load_state_dict(tensors)
    return vit.eval()


def _stored(name: str, path: Path) -> tuple[ViTConfig, dict[str, Tensor]]:
    """The settings and tensors of a backbone's file; WeightsError if it is damaged, or that of another backbone."""
    stored_name, config, tensors, _ = read_backbone(path)
    if stored_name != name:
        raise WeightsError(f"{path} holds {stored_name}, not {name}; pass --backbone {stored_name}")
    fault = first_fault(tensors, expected_tensors(config), exact_dtype=False)
    if fault:
        raise WeightsError(f"{path}: {fault}; fetch or convert the file again")
    return config, tensors


def find_backbone(name: str) -> Path:
    """The first of `backbone_files`; if there is none, WeightsError names the places and how to get it."""
    for path in backbone_files(name):
        if path.parent == Path("weights"):
            _say(f"backbone: {path}, of the current folder")
        return path
    raise WeightsError(
        f"no weights for {name}: looked for {name}.safetensors in {cache_home()}, the package and ./weights; "
        f"{how_to_get(name)}\nor name a converted file with --weights FILE"
    )


@functools.cache
def _say(text: str) -> None:
    print(text, file=sys.stderr)


def backbone_files(name: str) -> list[Path]:
    """Every existing NAME.safetensors in $VITFACE_HOME (default ~/.cache/vitface), the package and, as the current
    folder may be somebody else's, last in ./weights."""
    packaged = importlib.import_module("vitface.weights").__path__  # of a clone also weights/ at its top
    folders = [*packaged, Path("weights")]
    with suppress(ConfigError):
        folders.insert(0, cache_home())
    return [path for path in (Path(folder) / f"{name}.safetensors" for folder in folders) if path.is_file()]


def read_backbone(path: Path, tensors: bool = True) -> tuple[str, ViTConfig, dict[str, Tensor], dict[str, str]]:
    """(name, config, tensors, source) of a converted file, without `tensors` none of them; WeightsError, with advice,
    for any other file."""
    try:
        open_regular(path).close()
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == BACKBONE_FORMAT:
                names = [name for name in file.keys() if tensors and name != PROJECTION]  # noqa: SIM118, not a dict
                found = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        made = command("convert", "NAME", "--src", "FILE", "--out", path)
        raise WeightsError(
            f"{path}: no such file; correct the path, make the file with\n  {made}\n"
            "or get one with vitface fetch NAME, which is found without a path"
        ) from None
    except (SafetensorError, OSError) as error:
        if path.suffix == ".safetensors":
            raise WeightsError(f"{path}: damaged ({error}); fetch or convert it again") from None
        metadata = {}
    if metadata.get("format") != BACKBONE_FORMAT:
        if (other := identify_file(path)) and not other[0].startswith(("a zip", "a file of torch")):
            what, do = other
            hint = "name a converted file, NAME.safetensors; vitface fetch NAME gets one. Data: vitface data check PATH"
            raise WeightsError(f"{path} holds no weights but is {what}; {do or hint}")
        raise WeightsError(
            f"{path} is not a converted file; convert it first:\n"
            f"  {command('convert', 'NAME', '--src', path, '--out', 'weights/NAME.safetensors')}\n"
            f"with NAME one of {', '.join(VIT_PRESETS)}"
        )
    try:
        return metadata["name"], vit_config(json.loads(metadata["config"])), found, json.loads(metadata["source"])
    except (KeyError, TypeError, ValueError, RecursionError):
        raise WeightsError(f"{path} has settings that this version does not know; convert the source again") from None


def read_projection(path: Path) -> Tensor | None:
    """The PROJECTION of a file that `read_backbone` reads; None where its source had none."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(PROJECTION) if PROJECTION in file.keys() else None  # noqa: SIM118, not a dict


def expected_tensors(config: ViTConfig) -> dict[str, Tensor]:
    """The tensors a backbone file of this config holds, on the meta device."""
    with torch.device("meta"):
        return ViT(config, config.native_size).state_dict()


def save_backbone(path: Path, name: str, config: ViTConfig, tensors: dict[str, Tensor], source: dict[str, str]) -> None:
    """Writes a backbone file (see `backbone_bytes`), whole or not at all."""
    replace_file(path, backbone_bytes(name, config, tensors, source))


def backbone_bytes(name: str, config: ViTConfig, tensors: dict[str, Tensor], source: dict[str, str]) -> bytes:
    """A backbone file's contents.

    `tensors` have the names and shapes of `ViT(config, config.native_size)`, and perhaps PROJECTION. `source` records
    where they came from: file, sha256, licence and more.
    """
    metadata = {
        "format": BACKBONE_FORMAT,
        "name": name,
        "config": json.dumps(dataclasses.asdict(config)),
        "source": json.dumps(source),
        "vitface_version": __version__,
    }
    return tensor_bytes(tensors, metadata)


def contents_sha256(path: Path) -> str:
    """The SHA-256 of a backbone file's settings and, in the order of their names, its tensors.

    Two files of the same weights may differ in other bytes: another version of vitface, or another source.
    """
    _, config, tensors, _ = read_backbone(path)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def weights_sha256(name: str, weights: str | Path | None) -> str:
    """The SHA-256 of the backbone file that `load_backbone` would load, or "random"."""
    return "random" if weights == "random" else sha256_file(find_backbone(name) if weights is None else Path(weights))
