"""A whole run, as train.py starts it: set up or resume, train, evaluate the best epoch once, write results.md."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from vitface.config import TrainConfig
from vitface.evaluation.benchmarks import available, evaluate_all
from vitface.evaluation.report import Results, results_table
from vitface.model.store import frozen_face, load_face
from vitface.training.log import RunLog
from vitface.training.loop import Trainer
from vitface.training.resume import checkpoint_to_resume
from vitface.training.setup import default_save_dir, resolve_choices
from vitface.version import __version__


def run(config: TrainConfig, say: Callable[[str], None] = print) -> Path | None:
    """Trains as `config` says and returns the run directory, None for a dry run."""
    config = resolve_choices(config)
    if config.dry_run:
        trainer = Trainer(config, None)
        say(trainer.header())
        trainer.fit(None)
        return None
    run_dir = Path(config.save_dir) if config.save_dir else default_save_dir(config)
    checkpoint = checkpoint_to_resume(config, run_dir)
    trainer = Trainer(config, run_dir)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        say(f"resumed {checkpoint} at step {trainer.progress.step:,}")
    if trainer.progress.finished:
        say(f"{run_dir} is finished; evaluate it with\n  python evaluate.py --checkpoint {run_dir} --bench all")
        return run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    say(f"run directory: {run_dir}")
    say(trainer.header())
    try:
        trainer.fit(RunLog(run_dir, config, trainer.progress.step))
    except KeyboardInterrupt:
        say(
            f"stopped at step {trainer.progress.step:,}; continue with\n  python train.py --save-dir {run_dir} --resume auto"
        )
        raise
    finish(config, run_dir, say)
    return run_dir


def finish(config: TrainConfig, run_dir: Path, say: Callable[[str], None]) -> None:
    """Evaluates the best epoch and the frozen backbone on the benchmarks there are, and writes results.md."""
    names = available(config.val_data) if config.val_data else []
    if config.train_data == "synthetic":
        names = ["synthetic", *names]
    sections = {}
    if names:
        adapted = load_face(run_dir, config.weights).to(config.device)
        frozen = frozen_face(config.backbone, config.weights, config.image_size, adapted.config.dtype).to(config.device)
        for title, model in (("frozen backbone, raw CLS", frozen), ("adapted, best epoch", adapted)):
            evaluation = evaluate_all(model.embed, names, config.val_data or "")
            sections[title] = evaluation.results
            say(f"\n{title}\n{results_table(evaluation.results)}")
            for problem in (*evaluation.alarms, *evaluation.failures):
                say(f"ALARM {problem}")
    else:
        say(f"no benchmark files in {config.val_data}: put lfw.bin, cfp_fp.bin, ... there to have the run evaluated")
    (run_dir / "results.md").write_text(results_markdown(config, run_dir, sections))
    bench = "synthetic" if names == ["synthetic"] else "all"
    again = f"python evaluate.py --checkpoint {run_dir} --bench {bench}"
    say(f"\nwrote {run_dir}/results.md; evaluate again with\n  {again}")


def results_markdown(config: TrainConfig, run_dir: Path, sections: dict[str, Results]) -> str:
    """The run on one page: settings, learning curve, results."""
    with open(run_dir / "log.csv", newline="") as file:
        curve = list(csv.DictReader(file))
    settings = "\n".join(f"- {key}: {value}" for key, value in dataclasses.asdict(config).items() if value is not None)
    lines = [
        f"# {run_dir.name}",
        f"vitface {__version__}. The best epoch was chosen on held-out training people.",
        *(f"## {title}\n```\n{results_table(results)}\n```" for title, results in sections.items() if results),
        "## Learning curve\n| epoch | loss | held-out AUC | img/s |\n|---|---|---|---|",
    ]
    lines[-1] += "".join(
        f"\n| {row['epoch']} | {float(row['loss']):.3f} | {float(row['holdout_auc']):.4f} | {row['img_per_s']} |"
        for row in curve
    )
    return "\n\n".join([*lines, f"## Settings\n{settings}"]) + "\n"
