"""A whole run, as train.py starts it: set up or resume, train, finish."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch

from vitface.config import TrainConfig
from vitface.errors import ConfigError, VitfaceError
from vitface.files import make_folder, replace_file
from vitface.lock import folder_lock
from vitface.training.finish import finish
from vitface.training.header import header
from vitface.training.loop import Trainer
from vitface.training.ranks.process_group import broadcast, process_group, rank
from vitface.training.runs.checkpoint import link_checkpoint, load_state, step_directories
from vitface.training.runs.log import RunLog
from vitface.training.runs.resume import checkpoint_to_resume, is_finished
from vitface.training.setup import Change, default_save_dir, open_data, resolve_choices

Say = Callable[[str], None]


class Run(NamedTuple):
    """What was asked for: see `run`."""

    config: TrainConfig
    say: Say
    with_frozen: bool
    change: Change | None


def run(config: TrainConfig, say: Say = print, with_frozen: bool = True, change: Change | None = None) -> Path | None:
    """Trains as `config` says and returns the run directory, None for a dry run.

    At the end it is evaluated, the frozen backbone too if `with_frozen`. `say` gets each text that is to be shown.
    `change` is what a study does to the model before it is trained, and again before it is evaluated.
    """
    config = resolve_choices(config)
    try:
        with process_group(config.device):
            say = say if rank() == 0 else _silent
            if config.dry_run:
                trainer = Trainer(config, None, change)
                say(header(trainer))
                trainer.fit(None)
                return None
            run_dir = Path(broadcast(config.save_dir or str(default_save_dir(config))))
            return _run(Run(config, say, with_frozen, change), run_dir)
    except torch.OutOfMemoryError:
        raise ConfigError(f"out of memory on {config.device}: lower --batch-size (now {config.batch_size})") from None


def _silent(text: str) -> None:
    """For the ranks other than 0: they print nothing."""


def _run(asked: Run, run_dir: Path) -> Path:
    """Rank 0 decides and writes; the others follow it."""
    config, say, trainer = asked.config, asked.say, None
    if not broadcast(run_dir.is_dir()):  # what is wrong or missing is said before anything is created
        _to_resume(config, run_dir, say)
        trainer = Trainer(config, run_dir, asked.change)
        if rank() == 0:
            make_folder(run_dir)
    with folder_lock(run_dir) if rank() == 0 else nullcontext():
        checkpoint = _to_resume(config, run_dir, say)
        if checkpoint is not None:
            state = load_state(checkpoint)
            if rank() == 0:
                link_checkpoint(checkpoint, state["is_best"])  # a kill may have come before the links
            if is_finished(config, state):
                _finish_again(asked, run_dir)
                return run_dir
        trainer = trainer or Trainer(config, run_dir, asked.change)
        if checkpoint is not None:
            trainer.restore(checkpoint)
            say(f"resumed {checkpoint} at step {trainer.state.progress.step:,}")
        if rank() == 0:
            replace_file(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=1).encode())
        say(f"run directory: {run_dir}")
        say(header(trainer))
        try:
            trainer.fit(RunLog(run_dir, config, trainer.state.progress.step) if rank() == 0 else None)
        except (KeyboardInterrupt, VitfaceError, OSError, RuntimeError):
            say(what_is_saved(run_dir))
            raise
        finish(config, run_dir, trainer.data, say, asked.with_frozen, asked.change)
    return run_dir


def _to_resume(config: TrainConfig, run_dir: Path, say: Say) -> Path | None:
    """`checkpoint_to_resume` as rank 0 sees it: the others cannot come to another conclusion."""
    found = checkpoint_to_resume(config, run_dir, say) if rank() == 0 else None
    found = broadcast(None if found is None else str(found))
    return None if found is None else Path(found)


def what_is_saved(run_dir: Path) -> str:
    """What to say when training stops before its end."""
    steps, again = step_directories(run_dir), f"vitface train --save-dir {run_dir} --resume auto"
    if not steps:
        return f"stopped before the first checkpoint; start again with\n  {again}"
    return f"stopped; saved up to {steps[0].name.replace('-', ' ')}, continue with\n  {again}"


def _finish_again(asked: Run, run_dir: Path) -> None:
    if broadcast((run_dir / "results.md").is_file()):
        asked.say(f"{run_dir} is finished; evaluate it with\n  vitface evaluate --checkpoint {run_dir} --bench all")
    else:
        finish(asked.config, run_dir, open_data(asked.config), asked.say, asked.with_frozen, asked.change)
