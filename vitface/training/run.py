"""A whole run, as train.py starts it: set up or resume, train, evaluate the best epoch once, write results.md."""

import csv
import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from vitface.config import TrainConfig
from vitface.errors import ConfigError, VitfaceError
from vitface.evaluation.benchmarks import Evaluation, evaluate_all
from vitface.evaluation.report import results_table
from vitface.evaluation.scores import keep_scores
from vitface.files import make_folder, replace_file
from vitface.lock import folder_lock
from vitface.recogniser import Recogniser
from vitface.store.faces import frozen_face, open_checkpoint
from vitface.training.header import header
from vitface.training.holdout import calibrate, thresholds_text
from vitface.training.loop import Trainer
from vitface.training.ranks.parallel import in_turns
from vitface.training.ranks.process_group import process_group, rank, share
from vitface.training.runs.checkpoint import link_checkpoint, load_state, step_directories
from vitface.training.runs.log import RunLog
from vitface.training.runs.resume import checkpoint_to_resume, is_finished
from vitface.training.setup import default_save_dir, final_benchmarks, resolve_choices
from vitface.version import __version__

Say = Callable[[str], None]


def run(config: TrainConfig, say: Say = print, with_frozen: bool = True) -> Path | None:
    """Trains as `config` says and returns the run directory, None for a dry run.

    At the end it is evaluated, the frozen backbone too if `with_frozen`.
    """
    config = resolve_choices(config)
    try:
        with process_group(config.device):
            say = say if rank() == 0 else _silent
            if config.dry_run:
                trainer = Trainer(config, None)
                say(header(trainer))
                trainer.fit(None)
                return None
            run_dir = Path(share(config.save_dir or str(default_save_dir(config))))
            return _run(config, run_dir, say, with_frozen)
    except torch.OutOfMemoryError:
        raise ConfigError(f"out of memory on {config.device}: lower --batch-size (now {config.batch_size})") from None


def _silent(text: str) -> None:
    """What ranks other than 0 say."""


def _run(config: TrainConfig, run_dir: Path, say: Say, with_frozen: bool) -> Path:
    """Rank 0 decides and writes; the others follow it."""
    trainer = None
    if not share(run_dir.is_dir()):  # what is wrong or missing is said before anything is created
        _to_resume(config, run_dir, say)
        trainer = Trainer(config, run_dir)
        if rank() == 0:
            make_folder(run_dir)
    with folder_lock(run_dir) if rank() == 0 else nullcontext():
        checkpoint = _to_resume(config, run_dir, say)
        if checkpoint is not None:
            state = load_state(checkpoint)
            if rank() == 0:
                link_checkpoint(checkpoint, state["is_best"])  # a kill may have come before the links
            if is_finished(config, state):
                _finish_again(config, run_dir, say, with_frozen)
                return run_dir
        trainer = trainer or Trainer(config, run_dir)
        if checkpoint is not None:
            trainer.restore(checkpoint)
            say(f"resumed {checkpoint} at step {trainer.progress.step:,}")
        if rank() == 0:
            replace_file(run_dir / "config.json", json.dumps(dataclasses.asdict(config), indent=1).encode())
        say(f"run directory: {run_dir}")
        say(header(trainer))
        try:
            trainer.fit(RunLog(run_dir, config, trainer.progress.step) if rank() == 0 else None)
        except (KeyboardInterrupt, VitfaceError, OSError, RuntimeError):
            say(what_is_saved(run_dir))
            raise
        finish(config, run_dir, say, with_frozen)
    return run_dir


def _to_resume(config: TrainConfig, run_dir: Path, say: Say) -> Path | None:
    """`checkpoint_to_resume` as rank 0 sees it: the others cannot come to another conclusion."""
    found = checkpoint_to_resume(config, run_dir, say) if rank() == 0 else None
    found = share(None if found is None else str(found))
    return None if found is None else Path(found)


def what_is_saved(run_dir: Path) -> str:
    """What to say when training stops before its end."""
    steps, again = step_directories(run_dir), f"vitface train --save-dir {run_dir} --resume auto"
    if not steps:
        return f"stopped before the first checkpoint; start again with\n  {again}"
    return f"stopped; saved up to {steps[0].name.replace('-', ' ')}, continue with\n  {again}"


def _finish_again(config: TrainConfig, run_dir: Path, say: Say, with_frozen: bool) -> None:
    if share((run_dir / "results.md").is_file()):
        say(f"{run_dir} is finished; evaluate it with\n  vitface evaluate --checkpoint {run_dir} --bench all")
    else:
        finish(config, run_dir, say, with_frozen)


def finish(config: TrainConfig, run_dir: Path, say: Say, with_frozen: bool = True) -> None:
    """Evaluates the best epoch (and the frozen backbone) on the benchmarks there are; leaves thresholds.json, the
    scores and results.md."""
    share(None)  # rank 0 has written the last checkpoint
    names = final_benchmarks(config)
    checkpoint = open_checkpoint(run_dir, config.weights)
    adapted = Recogniser.from_checkpoint(checkpoint).to(config.device)
    thresholds = calibrate(config, checkpoint, adapted.model)
    models = {"adapted, best epoch": adapted}
    if with_frozen:
        frozen = frozen_face(config.backbone, config.weights, config.image_size, adapted.config.dtype)
        models = {"frozen backbone, raw CLS": Recogniser(frozen).to(config.device), **models}
    sections = {}
    for title, model in models.items() if names else ():
        sections[title] = evaluate_all(model.embed, names, config.val_data or "", in_turns)
        say(f"\n{title}\n{evaluation_text(sections[title])}")
    if rank() > 0:
        return
    if names:
        keep_scores(run_dir, sections["adapted, best epoch"].results, checkpoint.sha256)
    text = thresholds_text(thresholds) if thresholds else "thresholds: none, nobody was held out"
    say(f"\n{text}")
    replace_file(run_dir / "results.md", results_markdown(config, run_dir, sections, text).encode())
    bench = names[0] if names == [config.train_data] else "all"
    say(f"\nwrote {run_dir}/results.md; evaluate again with\n  vitface evaluate --checkpoint {run_dir} --bench {bench}")


def evaluation_text(evaluation: Evaluation) -> str:
    """The table, and under it every alarm and failure."""
    problems = [f"ALARM {problem}" for problem in (*evaluation.alarms, *evaluation.failures)]
    return "\n".join([*([results_table(evaluation.results)] if evaluation.results else []), *problems])


def results_markdown(config: TrainConfig, run_dir: Path, sections: dict[str, Evaluation], thresholds: str) -> str:
    """The run on one page: results, learning curve, settings."""
    with open(run_dir / "log.csv", newline="", encoding="utf-8") as file:
        epochs = list(csv.DictReader(file))
    curve = "".join(
        f"\n| {row['epoch']} | {float(row['loss']):.3f} | {row['holdout_auc'][:6]} | {row['img_per_s']} |"
        for row in epochs
    )
    skipped = int(epochs[-1].get("skipped", 0))  # of fp16 alone
    note = f"\n\nSteps skipped because a gradient overflowed in fp16: {skipped}." if skipped else ""
    settings = "\n".join(f"- {key}: {value}" for key, value in dataclasses.asdict(config).items() if value is not None)
    parts = [
        f"# {run_dir.name}",
        f"vitface {__version__}. The best epoch was chosen on held-out training people, never on a benchmark.",
        *(f"## {title}\n\n```\n{evaluation_text(evaluation)}\n```" for title, evaluation in sections.items()),
        f"## Thresholds\n\n```\n{thresholds}\n```",
        f"## Learning curve\n\n| epoch | loss | held-out AUC | img/s |\n|---|---|---|---|{curve}{note}",
        f"## Settings\n\n{settings}",
    ]
    return "\n\n".join(parts) + "\n"
