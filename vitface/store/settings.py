"""Settings on disk: those of a run, with its epochs, and those of a model file, as `ViTConfig` and `FaceConfig`.

Files may come from strangers: a value that no model can have is refused before anything is built from it.
"""

import csv
import io
import json
import sys
import types
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from vitface.config import LEAST_TEMPERATURE, MAX_IMAGE_SIZE, MAX_NUMBER, MAX_SIZE, FaceConfig, TrainConfig
from vitface.errors import CheckpointError
from vitface.files import open_regular, read_json
from vitface.presets import ViTConfig, backbone_name

MAX_COUNT, MAX_LOG_BYTES = 2**63 - 1, 16 << 20
EPOCH_COLUMNS = ("epoch", "loss", "holdout_auc", "img_per_s")  # of log.csv; a value may be empty
MAX_DEPTH, MAX_GRID = 64, 128  # blocks, patches a side: a small file could ask for hours of work else


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of a run, each of its field's type; empty where there is no run, CheckpointError if damaged."""
    path = run_dir / "config.json"
    if not path.is_file():
        return {}
    cure = "put a copy of it back; without it, resuming needs all flags of the run again"
    try:
        settings = read_json(path)
        for name, hint in typing.get_type_hints(TrainConfig).items():
            if name in settings and not _fits(settings[name], hint, MAX_COUNT):
                raise ValueError(f"{name} cannot be {str(settings[name])[:40]}")
        return {**settings}
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); {cure}") from None


def log_faults(run_dir: Path) -> list[str]:
    """What is wrong with log.jsonl of a run, which its checkpoints do not need."""
    with suppress(OSError), open_regular(run_dir / "log.jsonl") as file:
        lines = file.read(MAX_LOG_BYTES).splitlines()[:-1]  # a kill may have cut the last one off
        if damaged := sum(not _is_json(line) for line in lines):
            return [f"{run_dir / 'log.jsonl'} is damaged: {damaged:,} of its {len(lines):,} lines are left out"]
    return []


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_epochs(run_dir: Path) -> list[dict[str, str]]:
    """The rows of a run's log.csv, one for each epoch, of numbers but for "alarms"; none where there is no log.

    Rows that are damaged are left out, with a note.
    """
    path = run_dir / "log.csv"
    try:
        with open_regular(path) as file:
            text = file.read(MAX_LOG_BYTES).decode("utf-8-sig", errors="replace")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        if not rows and not text.isspace():  # before the first epoch, it is an empty line
            rows = [{}]
    except FileNotFoundError:
        return []
    except (OSError, csv.Error):
        rows = [{}]
    whole = [row for row in rows if _is_epoch(row)]
    if len(whole) < len(rows):
        print(
            f"note: {path} is damaged: {len(rows) - len(whole)} of its {len(rows)} rows are left out", file=sys.stderr
        )
    return whole


def _is_epoch(row: dict[str, str]) -> bool:
    try:
        numbers = [float(value or 0) for name, value in row.items() if name != "alarms"]
    except (ValueError, TypeError):
        return False
    cut = None in row.values() or not row.keys() >= {*EPOCH_COLUMNS}
    return not cut and all(abs(number) <= MAX_COUNT for number in numbers)


def vit_config(settings: dict[str, Any]) -> ViTConfig:
    """A `ViTConfig` from its JSON form; TypeError, KeyError or ValueError if it cannot be one."""
    colours = {key: tuple(settings[key]) for key in ("mean", "std")}  # JSON has lists
    config = _checked(ViTConfig(**{**settings, **colours}))
    dim, patch = config.embed_dim, config.patch_size
    part = config.num_heads * (1 if config.rope == "none" else 4)  # sine and cosine, of the row and of the column
    pooled = {"cls": config.class_token, "attention": _divides(config.pool_heads, dim), "tokens": True}
    whole = _divides(part, dim) and pooled[config.pool] and (config.class_token or config.registers == 0)
    whole &= (config.pool == "tokens") == (config.pool_dim > 0)
    known = 4 <= patch <= 64 and patch <= config.native_size <= MAX_GRID * patch and 1 <= config.depth <= MAX_DEPTH
    positive = config.mlp_ratio * dim >= 1 and config.norm_eps > 0 and min(config.std) > 0
    if not (whole and known and positive):
        raise ValueError("sizes that fit no model")
    return config


def _divides(part: int, whole: int) -> bool:
    return 0 < part <= whole and whole % part == 0


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


def _checked(config: Any) -> Any:
    """Returns `config`; ValueError unless each value has its field's type and a size that a model can have."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if not _fits(getattr(config, name), hint, MAX_SIZE):
            raise ValueError(f"{name} cannot be {str(getattr(config, name))[:40]}")
    return config


def _fits(value: Any, hint: Any, most: int) -> bool:
    """Whether a value from a file has the type of a field, and as a whole number is from 0 to `most`."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, kind, most) for kind in typing.get_args(hint))
    if hint is int:
        return type(value) is int and 0 <= value <= most
    if hint is float:
        return type(value) in (int, float) and abs(value) <= MAX_NUMBER  # NaN is not
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return len(value) == 3 and all(_fits(item, float, most) for item in value)
    return isinstance(value, hint)
