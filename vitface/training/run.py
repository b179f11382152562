"""A whole run, as `vitface train` starts it: set up or resume, train, finish."""

import dataclasses
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from vitface.config import TrainConfig
from vitface.errors import ConfigError, VitfaceError, command
from vitface.evaluation.benchmarks import next_command
from vitface.files import check_output, json_bytes, make_folder, replace_file
from vitface.lock import folder_lock
from vitface.store.faces import step_directories
from vitface.training.finish import finish
from vitface.training.header import header
from vitface.training.loop import Trainer
from vitface.training.memory import bytes_of_a_person, peak_memory
from vitface.training.ranks.process_group import broadcast, print0, process_group, rank
from vitface.training.runs.checkpoint import link_checkpoint, load_state
from vitface.training.runs.log import RunLog
from vitface.training.runs.resume import RUN_FILES, checkpoint_to_resume, is_finished
from vitface.training.setup import Change, open_data, resolve_choices


def run(config: TrainConfig, with_frozen: bool = True, change: Change | None = None) -> Path | None:
    """Trains with the settings of `config`, evaluates the result, and returns the run directory, None for a dry run.

    `with_frozen` evaluates the frozen backbone too. A study passes `change`, which changes the model before it is
    trained, and again before it is evaluated.
    """
    config = resolve_choices(config)
    try:
        with process_group(config.device):
            config = dataclasses.replace(config, dtype=broadcast(config.dtype))  # each rank has measured its own
            if config.dry_run:
                if config.save_dir:
                    check_output(Path(config.save_dir), RUN_FILES)
                trainer = Trainer(config, None, change)
                print0(header(trainer, with_frozen=False))
                trainer.fit(None)
                each = bytes_of_a_person(config.embedding_dim, trainer.data.micro_batch, config.partial_fc is not None)
                adds = f"each person of your data adds {each / 1000:.1f} kB"
                print0(f"memory at its peak: {peak_memory(trainer.device)}; {adds}")
                return None
            default = f"runs/{config.exp or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
            run_dir = Path(broadcast(config.save_dir or default))
            _run(config, run_dir, with_frozen, change)
            return run_dir
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        smaller = f"lower --batch-size (now {config.batch_size}), raise --grad-accum or set --memory-budget"
        raise ConfigError(f"out of memory on {config.device}: {smaller}") from None


def _run(config: TrainConfig, run_dir: Path, with_frozen: bool, change: Change | None) -> None:
    """Rank 0 decides and writes; the other ranks follow it."""
    trainer = None
    if rank() == 0:
        check_output(run_dir, RUN_FILES)
    if not broadcast(run_dir.is_dir()):  # every mistake is found before anything is created
        _to_resume(config, run_dir)
        trainer = Trainer(config, run_dir, change)
        if rank() == 0:
            make_folder(run_dir)
    with folder_lock(run_dir) if rank() == 0 else nullcontext():
        checkpoint = _to_resume(config, run_dir)
        finished, state = False, {}
        if checkpoint is not None:
            state = load_state(checkpoint)
            finished = is_finished(config, state)
            if rank() == 0:
                link_checkpoint(checkpoint)  # a kill may have come before the links
        if not finished:
            trainer = trainer or Trainer(config, run_dir, change)
            log = _train(trainer, run_dir, checkpoint, with_frozen)
            data = trainer.data
        elif broadcast((run_dir / "results.md").is_file()):
            again = next_command(run_dir, config.val_data, config.train_data)
            print0(f"{run_dir} is finished, see its results.md; next\n  {again}")
            return
        else:
            data = open_data(config)
            step = state["progress"]["step"]
            log = RunLog(run_dir, config, step) if rank() == 0 else None
        finish(config, run_dir, data, log, with_frozen, change)


def _to_resume(config: TrainConfig, run_dir: Path) -> Path | None:
    """`checkpoint_to_resume` as rank 0 finds it, on every rank."""
    found = checkpoint_to_resume(config, run_dir) if rank() == 0 else None
    found = broadcast(None if found is None else str(found))
    return None if found is None else Path(found)


def _train(trainer: Trainer, run_dir: Path, checkpoint: Path | None, with_frozen: bool) -> RunLog | None:
    """Trains to the end, and returns the log on rank 0; if training stops before the end, prints what is saved, after
    Ctrl-C as the text of its KeyboardInterrupt."""
    if checkpoint is not None:
        trainer.restore(checkpoint)
        print0(f"resumed {checkpoint} at step {trainer.state.progress.step:,}")
    if rank() == 0:
        replace_file(run_dir / "config.json", json_bytes(dataclasses.asdict(trainer.config)))
    print0(f"run directory: {run_dir}\n{header(trainer, with_frozen)}")
    log = RunLog(run_dir, trainer.config, trainer.state.progress.step) if rank() == 0 else None
    try:
        trainer.fit(log)
    except (KeyboardInterrupt, VitfaceError, OSError, RuntimeError) as error:
        steps, again = step_directories(run_dir), command("train", "--save-dir", run_dir, "--resume", "auto")
        saved = f"; saved up to {steps[0].name.replace('-', ' ')}, continue with" if steps else ""
        text = f"stopped{saved or ' before the first checkpoint; start again with'}\n  {again}"
        if isinstance(error, KeyboardInterrupt) and rank() == 0:
            raise KeyboardInterrupt(text) from None
        print0(text)
        raise
    return log
