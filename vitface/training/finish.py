"""The end of a run: the best epoch is evaluated, calibrated on the people held out, and described in results.md."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from vitface.config import TrainConfig
from vitface.documents import table
from vitface.evaluation.benchmarks import Evaluation, evaluate_all, next_command
from vitface.evaluation.judging import evaluate_frozen, judged, judged_frozen
from vitface.evaluation.report import results_table
from vitface.evaluation.scores import keep_scores
from vitface.files import replace_file
from vitface.metrics import roc
from vitface.store.faces import open_checkpoint
from vitface.store.settings import read_epochs
from vitface.training.batches import TrainingData
from vitface.training.holdout import calibrate
from vitface.training.ranks.parallel import in_turns
from vitface.training.ranks.process_group import broadcast, print0, rank
from vitface.training.runs.log import Curves, RunLog
from vitface.training.setup import Change, final_benchmarks
from vitface.training.start import worse_than_frozen
from vitface.version import __version__

FROZEN = {
    "cls": "frozen backbone, raw CLS",
    "attention": "frozen backbone, its attention pool",
    "tokens": "frozen recogniser",
}


def finish(
    config: TrainConfig,
    run_dir: Path,
    data: TrainingData,
    log: RunLog | None,
    with_frozen: bool = True,
    change: Change | None = None,
) -> None:
    """Evaluates the best epoch, and the frozen backbone, on the benchmarks there are.

    Writes thresholds.json, the scores and results.md, and sends the results to the trackers of `log`.
    `with_frozen` and `change` are those of `training.run.run`.
    """
    broadcast(None)  # until rank 0 has written the last checkpoint
    names = final_benchmarks(config)
    checkpoint = open_checkpoint(run_dir, config.weights)
    device = torch.device(config.device)
    adapted = judged(checkpoint, device, change)
    alarms = data.samples.alarm, worse_than_frozen(config, read_epochs(run_dir))
    thresholds = "\nALARM ".join([calibrate(data, checkpoint, adapted.model), *filter(None, alarms)])
    data_dir, sections = config.val_data or "", {}
    held_out = len(np.unique(data.samples.labels[data.split.held_out]))
    title = "adapted, best epoch" if held_out else "adapted, last epoch"
    if names and with_frozen:
        frozen = judged_frozen(config.backbone, config.weights, config.side, device)
        before = FROZEN[frozen.config.vit.pool]
        sections[before] = evaluate_frozen(frozen, names, data_dir, in_turns, broadcast, keep=rank() == 0)
        print0(f"\n{before}\n{evaluation_text(sections[before])}")
    if names:
        sections[title] = evaluate_all(adapted.embed, names, data_dir, in_turns)
        print0(f"\n{title}\n{evaluation_text(sections[title])}")
    if rank() > 0:
        return
    if names:
        keep_scores(run_dir, sections[title].results, checkpoint.sha256)
    replace_file(run_dir / "results.md", results_markdown(config, run_dir, held_out, sections, thresholds).encode())
    if log is not None:
        log.results(tracked_results(sections))
    again = next_command(run_dir, config.val_data, config.train_data)
    print(f"\n{thresholds}\n\nwrote {run_dir}/results.md; next\n  {again}")


def tracked_results(sections: dict[str, Evaluation]) -> dict[str, float | Curves]:
    """For trackers: KIND/BENCHMARK/METRIC, and the ROC of each kind, at 100 of its points."""
    values: dict[str, float | Curves] = {}
    for title, evaluation in sections.items():
        kind, lines = title.partition(" ")[0].rstrip(","), {}
        for name, result in evaluation.results.items():
            values |= {
                f"{kind}/{name}/{metric}": getattr(result, metric) for metric in ("accuracy", "std", "auc", "eer")
            }
            far, tar, _ = roc(-result.distance, result.issame)
            some = np.unique(np.linspace(0, len(far) - 1, 100).astype(int))
            lines[name] = far[some].tolist(), tar[some].tolist()
        values |= {f"{kind}/ROC": Curves(f"ROC, {title}", "false accept rate", lines)} if lines else {}
    return values


def evaluation_text(evaluation: Evaluation) -> str:
    """The table, and under it what is to be known about it: every alarm and failure."""
    lines = [results_table(evaluation.results)] if evaluation.results else []
    lines += [f"kept from an earlier evaluation: {', '.join(evaluation.kept)}"] if evaluation.kept else []
    return "\n".join([*lines, *(f"ALARM {problem}" for problem in (*evaluation.alarms, *evaluation.failures))])


def results_markdown(
    config: TrainConfig, run_dir: Path, held_out: int, sections: dict[str, Evaluation], thresholds: str
) -> str:
    """The run on one page: results, learning curve, settings. `held_out` is how many people were."""
    chosen = f"The best epoch was chosen on {held_out} held-out training people, never on a benchmark."
    epochs = read_epochs(run_dir)
    curve = [
        [row["epoch"], f"{float(row['loss'] or 'nan'):.3f}", row["holdout_auc"][:6], row["img_per_s"]] for row in epochs
    ]
    skipped = int(float(epochs[-1].get("skipped") or 0)) if epochs else 0  # of fp16 alone
    note = f"\n\nSteps skipped because a gradient overflowed in fp16: {skipped}." if skipped else ""
    settings = "\n".join(f"- {key}: {value}" for key, value in dataclasses.asdict(config).items() if value is not None)
    parts = [
        f"# {run_dir.name}",
        f"vitface {__version__}. {chosen if held_out else 'Nobody was held out: the last epoch was taken.'}",
        *(f"## {title}\n\n```\n{evaluation_text(evaluation)}\n```" for title, evaluation in sections.items()),
        f"## Thresholds\n\n```\n{thresholds}\n```",
        f"## Learning curve\n\n{table(('epoch', 'loss', 'held-out AUC', 'img/s'), curve)}{note}",
        f"## Settings\n\n{settings}",
    ]
    return "\n\n".join(parts) + "\n"
