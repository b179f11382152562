"""What `--resume` means: which checkpoint, and with which settings."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitface.config import BOOKKEEPING, FaceConfig, TrainConfig, resolve, to_flag
from vitface.errors import CheckpointError, ConfigError
from vitface.store.faces import is_checkpoint, read_face_config
from vitface.store.settings import read_config
from vitface.training.runs.checkpoint import load_state, newest_checkpoint, step_directories, verify_step

NOT_INHERITED = {"device", "resume", "allow_changed"}  # not taken over from the run that is resumed
RUN_FILES = ("config.json", "log.jsonl", "log.csv", "checkpoints")


def configure(given: dict[str, Any]) -> TrainConfig:
    """The configuration of the explicitly `given` flags; a resumed run fills the others with its own settings."""
    resume, save_dir = given.get("resume"), given.get("save_dir")
    if resume is None or (resume == "auto" and save_dir is None):
        return resolve(given)
    run_dir = Path(save_dir or "") if resume == "auto" else run_directory(Path(resume))
    if save_dir is not None and Path(save_dir).resolve() != run_dir.resolve():
        raise ConfigError(f"--resume {resume} continues in {run_dir}; leave --save-dir {save_dir} out")
    saved = {name: value for name, value in read_config(run_dir).items() if name not in NOT_INHERITED}
    if not saved:
        return resolve({**given, "save_dir": str(run_dir)})
    try:
        return TrainConfig(**{**saved, **given, "save_dir": str(run_dir)})
    except TypeError as error:
        raise CheckpointError(f"{run_dir}/config.json is of another version of vitface ({error})") from None


def run_directory(path: Path) -> Path:
    """The run that `path`, a run or one of its step directories, belongs to."""
    return path.resolve().parent.parent if is_checkpoint(path) else path


def checkpoint_to_resume(config: TrainConfig, run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The newest verified checkpoint of the run (or the one named), None to start afresh.

    CheckpointError if `run_dir` holds a run that is not to be resumed, or one that was trained with other settings.
    """
    if config.resume is None:
        for name in RUN_FILES:
            if (run_dir / name).exists():
                raise CheckpointError(
                    f"{run_dir} already holds a run ({name}); add --resume auto, or choose another --save-dir"
                )
        return None
    path = run_dir if config.resume == "auto" else Path(config.resume)
    if is_checkpoint(path):
        verify_step(path)
        found = path
    else:
        found = newest_checkpoint(path, say)
    if found is None and config.resume != "auto":
        raise CheckpointError(f"{path} holds no checkpoint; --resume auto starts afresh where there is none")
    if found is not None:
        check_same_settings(config, run_dir, found)
    return found


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that shape the training, which a checkpoint keeps."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in BOOKKEEPING}


def check_same_settings(config: TrainConfig, run_dir: Path, checkpoint: Path) -> None:
    """CheckpointError with a diff unless `checkpoint` was trained with the same settings, or --allow-changed was given.

    Other settings go on from the newest step only: later steps of the old ones would be taken for theirs.
    """
    changes = changed_settings(load_state(checkpoint), config)
    if changes and not config.allow_changed:
        raise CheckpointError(
            f"{checkpoint} was trained with other settings; resume with the same ones, or add --allow-changed:\n"
            f"{changes}"
        )
    newest = step_directories(run_dir)[0].name
    if changes and newest != checkpoint.resolve().name:
        raise CheckpointError(f"other settings can go on from the newest step only; move {newest} out of the way first")


def state_to_resume(checkpoint: Path, model: FaceConfig) -> dict[str, Any]:
    """`load_state`; CheckpointError if the checkpoint is of another model than `model`."""
    before, now = dataclasses.asdict(read_face_config(checkpoint)), dataclasses.asdict(model)
    if before != now:
        raise CheckpointError(
            f"{checkpoint} is of another model or was trained on another backbone file:\n{difference(before, now, str)}"
        )
    return load_state(checkpoint)


def check_same_data(checkpoint: Path, state: dict[str, Any], data: dict[str, Any], config: TrainConfig) -> str:
    """What is other than in the data it was trained with, a line each; CheckpointError unless --allow-changed."""
    changes = difference(state["data"], data, "data, {}".format)
    if changes and not config.allow_changed:
        raise CheckpointError(
            f"{config.train_data} is not the data {checkpoint} was trained on; --allow-changed takes it:\n{changes}"
        )
    return changes


def changed_settings(state: dict[str, Any], config: TrainConfig) -> str:
    """What `config` changes in the settings of a checkpoint with this `state`; empty if nothing.

    A flag that is newer than the checkpoint had its default, which leaves everything as it was before there was one.
    """
    now = settings_of(config)
    defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig) if item.name in now}
    return difference({**defaults, **state["settings"]}, now)


def is_finished(config: TrainConfig, state: dict[str, Any]) -> bool:
    """Whether nothing is left to train after a checkpoint with this `state`; changed settings may ask for more."""
    if changed_settings(state, config):
        return state["progress"]["epoch"] >= config.epochs
    return state["progress"]["finished"]


def difference(before: dict[str, Any], now: dict[str, Any], label: Callable[[str], str] = to_flag) -> str:
    """What changed, a line for each setting; empty if nothing did."""
    names = [*now, *(name for name in before if name not in now)]
    changed = [name for name in names if before.get(name) != now.get(name)]
    return "\n".join(f"  {label(name)}: {before.get(name)} -> {now.get(name)}" for name in changed)
