"""Settings on disk: those of a run, with its epochs, and those of a model file, as `ViTConfig` and `FaceConfig`.

Files may come from strangers: a value that no model can have is refused before anything is built from it.
"""

import csv
import json
import math
import typing
from pathlib import Path
from typing import Any, Literal

from vitface.config import MAX_IMAGE_SIZE, MAX_SIZE, FaceConfig, ViTConfig, backbone_name
from vitface.errors import CheckpointError


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of a run; empty where there is no run, CheckpointError if they are damaged."""
    path = run_dir / "config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
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
    if not (config.patch_size and config.depth and config.num_heads) or config.embed_dim % config.num_heads:
        raise ValueError("sizes that fit no model")
    return config


def face_config(settings: dict[str, Any]) -> FaceConfig:
    """A `FaceConfig` from its JSON form; TypeError, KeyError or ValueError if it cannot be one."""
    config = _checked(FaceConfig(**{**settings, "vit": vit_config(settings["vit"])}))
    backbone_name(config.backbone)
    config.vit.grid(config.image_size)
    depth = config.vit.depth
    too_deep = config.num_domains > 1 and config.router_depth >= depth
    too_deep |= config.head_levels > (depth if config.head == "patches" else 1)
    sizes = (config.num_domains, config.embedding_dim, config.head_levels)
    if too_deep or config.image_size > MAX_IMAGE_SIZE or not all(sizes) or config.gate_temperature <= 0:
        raise ValueError("sizes that fit no model")
    return config


def _checked(config: Any) -> Any:
    """Returns `config`; ValueError unless each value has its field's type and a size that a model can have."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if hint is int:
            good = type(value) is int and 0 <= value <= MAX_SIZE
        elif hint is float:
            good = type(value) in (int, float) and math.isfinite(value)
        elif typing.get_origin(hint) is Literal:
            good = value in typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            good = len(value) == 3 and all(type(x) in (int, float) and math.isfinite(x) for x in value)
        else:
            good = isinstance(value, hint)
        if not good:
            raise ValueError(f"{name} cannot be {str(value)[:40]}")
    return config
