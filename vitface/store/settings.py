"""Settings on disk: those of a run, with its epochs, and those of a model file, as `ViTConfig` and `FaceConfig`.

Files may come from strangers: a value that no model can have is refused before anything is built from it.
"""

import csv
import typing
from pathlib import Path
from typing import Any, Literal

from vitface.config import MAX_IMAGE_SIZE, MAX_SIZE, FaceConfig, ViTConfig, backbone_name
from vitface.errors import CheckpointError
from vitface.files import read_json

MAX_NUMBER, LEAST_TEMPERATURE = 1e6, 1e-6  # beyond them float32 overflows
MAX_DEPTH, MAX_GRID = 64, 128  # blocks, patches a side: a small file could ask for hours of work else


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of a run; empty where there is no run, CheckpointError if they are damaged."""
    path = run_dir / "config.json"
    if not path.is_file():
        return {}
    try:
        settings = read_json(path)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is damaged; start afresh in another --save-dir")
    return settings


def read_epochs(run_dir: Path) -> list[dict[str, str]]:
    """The rows of a run's log.csv, one for each epoch; none where there is no log."""
    path = run_dir / "log.csv"
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def vit_config(settings: dict[str, Any]) -> ViTConfig:
    """A `ViTConfig` from its JSON form; TypeError, KeyError or ValueError if it cannot be one."""
    colours = {key: tuple(settings[key]) for key in ("mean", "std")}  # JSON has lists
    config = _checked(ViTConfig(**{**settings, **colours}))
    whole = config.num_heads and config.embed_dim % config.num_heads == 0
    known = 4 <= config.patch_size <= 64 and 1 <= config.depth <= MAX_DEPTH
    if not whole or not known or config.native_size > MAX_GRID * config.patch_size:
        raise ValueError("sizes that fit no model")
    return config


def face_config(settings: dict[str, Any]) -> FaceConfig:
    """A `FaceConfig` from its JSON form; TypeError, KeyError or ValueError if it cannot be one."""
    config = _checked(FaceConfig(**{**settings, "vit": vit_config(settings["vit"])}))
    backbone_name(config.backbone)
    grid, depth = config.vit.grid(config.image_size), config.vit.depth
    too_deep = config.num_domains > 1 and config.router_depth >= depth
    too_deep |= config.head_levels > (depth if config.head == "patches" else 1)
    too_large = config.image_size > MAX_IMAGE_SIZE or grid > MAX_GRID
    sizes = (config.num_domains, config.embedding_dim, config.head_levels)
    if too_deep or too_large or not all(sizes) or config.gate_temperature < LEAST_TEMPERATURE:
        raise ValueError("sizes that fit no model")
    return config


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_NUMBER  # NaN is not


def _checked(config: Any) -> Any:
    """Returns `config`; ValueError unless each value has its field's type and a size that a model can have."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if hint is int:
            good = type(value) is int and 0 <= value <= MAX_SIZE
        elif hint is float:
            good = _is_number(value)
        elif typing.get_origin(hint) is Literal:
            good = value in typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            good = len(value) == 3 and all(map(_is_number, value))
        else:
            good = isinstance(value, hint)
        if not good:
            raise ValueError(f"{name} cannot be {str(value)[:40]}")
    return config
