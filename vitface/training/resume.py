"""What `--resume` means: which checkpoint, and with which settings."""

import dataclasses
from pathlib import Path
from typing import Any

from vitface.config import TrainConfig, read_config, resolve, to_flag
from vitface.errors import CheckpointError
from vitface.model.store import verify_checkpoint
from vitface.training.checkpoint import newest_checkpoint

MAY_CHANGE = {"resume", "save_dir", "device", "num_workers", "wandb", "tensorboard", "val_data", "weights", "exp"}


def configure(given: dict[str, Any]) -> TrainConfig:
    """The configuration of the explicitly `given` flags; a resumed run fills the others with its own settings."""
    config = resolve(given)
    if config.resume is None or (config.resume == "auto" and config.save_dir is None):
        return config
    run_dir = _run_directory(config)
    return resolve({**read_config(run_dir), "save_dir": str(run_dir), **given})


def checkpoint_to_resume(config: TrainConfig, run_dir: Path) -> Path | None:
    """The newest verified checkpoint of the run (or the one named), None to start afresh.

    CheckpointError if `run_dir` holds a run that is not to be resumed, or one that was started with other settings.
    """
    if config.resume is None:
        if (run_dir / "checkpoints").is_dir():
            raise CheckpointError(f"{run_dir} already holds a run; add --resume auto, or choose another --save-dir")
        return None
    path = run_dir if config.resume == "auto" else Path(config.resume)
    if (path / "manifest.json").is_file():
        verify_checkpoint(path)
        found: Path | None = path
    else:
        found = newest_checkpoint(path)
    if found is None and config.resume != "auto":
        raise CheckpointError(f"{path} holds no checkpoint; --resume auto starts afresh where there is none")
    if found is not None:
        check_same_settings(config, _run_directory(config))
    return found


def _run_directory(config: TrainConfig) -> Path:
    if config.resume == "auto":
        assert config.save_dir is not None
        return Path(config.save_dir)
    path = Path(config.resume or "")
    return path.resolve().parent.parent if (path / "manifest.json").is_file() else path


def check_same_settings(config: TrainConfig, run_dir: Path) -> None:
    """CheckpointError with a diff, unless the run in `run_dir` was started with the same settings."""
    before, now = read_config(run_dir), dataclasses.asdict(config)
    changed = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
    if changed:
        lines = "\n".join(f"  {to_flag(name)}: {before.get(name)} -> {now[name]}" for name in changed)
        raise CheckpointError(f"{run_dir} was started with other settings; resume it with the same ones:\n{lines}")
