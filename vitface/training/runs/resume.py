"""`--resume`: which checkpoint a run continues from, and whether its settings, model and data still fit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitface.config import BOOKKEEPING, FaceConfig, TrainConfig, resolve, to_flag
from vitface.errors import CheckpointError, ConfigError
from vitface.store.faces import is_checkpoint, read_face_config, step_directories
from vitface.store.settings import read_config
from vitface.training.runs.checkpoint import load_state, newest_checkpoint, verify_step

NOT_INHERITED = {"device", "resume", "allow_changed"}  # not taken over from the run that is resumed
RUN_FILES = ("config.json", "log.jsonl", "log.csv", "checkpoints")


def configure(given: dict[str, Any]) -> TrainConfig:
    """The configuration of the explicitly `given` flags; a resumed run fills the others with its own settings."""
    resume, save_dir = given.get("resume"), given.get("save_dir")
    if resume is None or (resume == "auto" and save_dir is None):
        return resolve(given)
    run_dir = Path((save_dir or "") if resume == "auto" else resume)
    if resume != "auto" and is_checkpoint(run_dir):
        run_dir = run_dir.resolve().parent.parent
    if save_dir is not None and Path(save_dir).resolve() != run_dir.resolve():
        raise ConfigError(f"--resume {resume} continues in {run_dir}; leave --save-dir {save_dir} out")
    saved = {name: value for name, value in read_config(run_dir).items() if name not in NOT_INHERITED}
    if not saved:
        return resolve({**given, "save_dir": str(run_dir)})
    given = {name: value for name, value in given.items() if (name, value) != ("dtype", "auto")}  # measured already
    try:
        return TrainConfig(**{**saved, **given, "save_dir": str(run_dir)})
    except TypeError as error:
        raise CheckpointError(f"{run_dir}/config.json is of another version of vitface ({error})") from None


def checkpoint_to_resume(config: TrainConfig, run_dir: Path) -> Path | None:
    """The newest whole checkpoint of the run, or the one that --resume names; None to start afresh.

    CheckpointError if `run_dir` holds a run that is not to be resumed, or one that was trained with other settings:
    with --allow-changed they continue from the newest step, because later steps, of the old settings, would be mistaken
    for theirs.
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
    found = path if is_checkpoint(path) else newest_checkpoint(path)
    if found is None:
        if config.resume != "auto":
            raise CheckpointError(f"{path} holds no checkpoint; --resume auto starts afresh where there is none")
        return None
    changes = changed_settings(config, load_state(found))
    if changes and not config.allow_changed:
        raise CheckpointError(
            f"{found} was trained with other settings; resume with the same ones, or add --allow-changed:\n{changes}"
        )
    newest = step_directories(run_dir)[0].name
    if changes and newest != found.resolve().name:
        raise CheckpointError(f"other settings continue from a run's newest step only; move {newest} out of the way")
    return found


def side_of(checkpoint: Path, config: TrainConfig) -> int:
    """The input side of a checkpoint's model if a phase of the run has it, otherwise that of the first phase."""
    side, sides = read_face_config(checkpoint).image_size, [phase.side for phase in config.phases]
    return side if side in sides else sides[0]


def state_to_resume(
    checkpoint: Path, config: TrainConfig, model: FaceConfig, data: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """(`load_state`, whether settings or data have changed) of a checkpoint, for a run with this model and data.

    CheckpointError if the checkpoint is of another model, or of other data without --allow-changed.
    """
    changes = difference(dataclasses.asdict(read_face_config(checkpoint)), dataclasses.asdict(model), "{}".format)
    if changes:
        raise CheckpointError(f"{checkpoint} is of another model or was trained on another backbone file:\n{changes}")
    state = load_state(checkpoint)
    before = dict(state["data"])
    for key in ("pixels", "files"):  # known of packed data alone, and of other
        if before.get(key) is None or data.get(key) is None:
            before[key] = data.get(key)
    changes = difference(before, data, "data, {}".format)
    if changes and not config.allow_changed:
        raise CheckpointError(
            f"{config.train_data} is not the data {checkpoint} was trained on; --allow-changed takes it:\n{changes}"
        )
    changed = bool(changes or changed_settings(config, state))
    into_epoch = state["progress"]["step"] - state["progress"]["first_step"]
    if not changed and not 0 <= into_epoch <= data["images"] // config.batch_size:
        raise CheckpointError(f"{checkpoint}/training.json is damaged: it is {into_epoch:,} steps into an epoch")
    return state, changed


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that shape the training, which a checkpoint keeps."""
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in BOOKKEEPING}


def changed_settings(config: TrainConfig, state: dict[str, Any]) -> str:
    """Lists what `config` changes in the settings of a checkpoint with this `state`; empty if nothing.

    A flag that is newer than the checkpoint had its default, which changes nothing.
    """
    now = settings_of(config)
    defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig) if item.name in now}
    return difference({**defaults, **state["settings"]}, now, to_flag)


def is_finished(config: TrainConfig, state: dict[str, Any]) -> bool:
    """True if nothing is left to train after a checkpoint with this `state`; changed settings may ask for more."""
    if changed_settings(config, state):
        return state["progress"]["epoch"] >= config.epochs
    return state["progress"]["finished"]


def difference(before: dict[str, Any], now: dict[str, Any], label: Callable[[str], str]) -> str:
    """Lists the values that changed, a line each; empty if none did."""
    names = [*now, *(name for name in before if name not in now)]
    changed = [name for name in names if before.get(name) != now.get(name)]
    return "\n".join(f"  {label(name)}: {before.get(name)} -> {now.get(name)}" for name in changed)
