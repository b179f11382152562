"""What `--resume` means: which checkpoint, and with which settings."""

import dataclasses
from pathlib import Path
from typing import Any

from vitface.config import TrainConfig, read_config, resolve, to_flag
from vitface.errors import CheckpointError, ConfigError
from vitface.model.store import verify_checkpoint
from vitface.training.checkpoint import ALL_FILES, newest_checkpoint

MAY_CHANGE = {"resume", "save_dir", "device", "num_workers", "wandb", "tensorboard", "val_data", "weights"}
MAY_CHANGE |= {"pack", "cache"}  # another way to the same images
OF_THIS_MACHINE = {"device", "resume"}  # not taken over from the run that is resumed
RUN_FILES = ("config.json", "log.jsonl", "log.csv", "checkpoints")


def configure(given: dict[str, Any]) -> TrainConfig:
    """The configuration of the explicitly `given` flags; a resumed run fills the others with its own settings."""
    resume, save_dir = given.get("resume"), given.get("save_dir")
    if resume is None or (resume == "auto" and save_dir is None):
        return resolve(given)
    run_dir = Path(save_dir or "") if resume == "auto" else run_directory(Path(resume))
    if save_dir is not None and Path(save_dir).resolve() != run_dir.resolve():
        raise ConfigError(f"--resume {resume} continues in {run_dir}; leave --save-dir {save_dir} out")
    saved = {name: value for name, value in read_config(run_dir).items() if name not in OF_THIS_MACHINE}
    if not saved:
        return resolve({**given, "save_dir": str(run_dir)})
    try:
        return TrainConfig(**{**saved, **given, "save_dir": str(run_dir)})
    except TypeError as error:
        raise CheckpointError(f"{run_dir}/config.json is of another version of vitface ({error})") from None


def run_directory(path: Path) -> Path:
    """The run that `path`, a run or one of its step directories, belongs to."""
    return path.resolve().parent.parent if (path / "manifest.json").is_file() else path


def checkpoint_to_resume(config: TrainConfig, run_dir: Path) -> Path | None:
    """The newest verified checkpoint of the run (or the one named), None to start afresh.

    CheckpointError if `run_dir` holds a run that is not to be resumed, or one that was started with other settings.
    """
    if config.resume is None:
        for name in RUN_FILES:
            if (run_dir / name).exists():
                raise CheckpointError(
                    f"{run_dir} already holds a run ({name}); add --resume auto, or choose another --save-dir"
                )
        return None
    path = run_dir if config.resume == "auto" else Path(config.resume)
    found = newest_checkpoint(path)
    if (path / "manifest.json").is_file():
        verify_checkpoint(path, ALL_FILES)
        found = path
    if found is None and config.resume != "auto":
        raise CheckpointError(f"{path} holds no checkpoint; --resume auto starts afresh where there is none")
    if found is not None:
        check_same_settings(config, run_dir)
    return found


def check_same_settings(config: TrainConfig, run_dir: Path) -> None:
    """CheckpointError with a diff, unless the run in `run_dir` was started with the same settings."""
    before, now = read_config(run_dir), dataclasses.asdict(config)
    changed = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
    if changed:
        lines = "\n".join(f"  {to_flag(name)}: {before.get(name)} -> {now[name]}" for name in changed)
        raise CheckpointError(f"{run_dir} was started with other settings; resume it with the same ones:\n{lines}")
