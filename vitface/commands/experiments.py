"""List the recorded experiments exp_001 to exp_004 beside your runs of them."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vitface.commands.parser import CommandParser, add_shared
from vitface.config import BOOKKEEPING, differences, to_flag
from vitface.documents import put_between_markers, table
from vitface.errors import VitfaceError
from vitface.presets import EXPERIMENTS
from vitface.store.settings import read_config

RECORDED_ON = ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw")
RECORDED = {  # accuracies in % as they were written down, and what was trainable; of the others nothing is known
    "exp_001": (865_664, (90.45, 71.81, 52.30, 69.27, 68.67)),
    "exp_003": (1_849_731, (89.50, 72.73, 54.17, 68.45, 68.82)),
}
CAVEATS = (
    "Recorded accuracies are of the threshold that was best on the test pairs themselves. AgeDB-30 was at chance (AUC "
    "0.4848 and 0.514), which is the mark of misread pairs, so an average with it means nothing. The patch convolution "
    "was trained by mistake; `--train-patch-embed` repeats that."
)
EXAMPLES = """examples:
  vitface train --exp exp_001 --save-dir runs/exp_001       CASIA-WebFace in data/, hours on one GPU
  vitface evaluate --checkpoint runs/exp_001 --bench all
  vitface experiments --docs docs/results.md
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="default: runs")
    add_shared(parser, "--docs")


def experiments_markdown(runs: Path) -> str:
    """The table: for each experiment the recorded result, and the results of every run of it in `runs`."""
    head = ("experiment", "", "trainable parameters", *RECORDED_ON, "settings that differ")
    rows, settings = [], {}
    for run in sorted(runs.glob("*/")):
        try:
            settings[run] = read_config(run)
        except VitfaceError as error:
            print(f"left out: {error}", file=sys.stderr)
    for name in (name for name in EXPERIMENTS if name.startswith("exp_")):
        if name in RECORDED:
            trainable, accuracies = RECORDED[name]
            rows.append([name, "recorded", f"{trainable:,}", *(f"{value:.2f}" for value in accuracies)])
        ours = {run: given for run, given in settings.items() if given.get("exp") == name}
        rows += [[name, run.name, *_cells(run, given)] for run, given in ours.items()] or [[name, "not run"]]
    return f"Command: `vitface experiments`. Accuracies in %. {CAVEATS}\n\n{table(head, rows)}\n"


def _cells(run: Path, settings: dict[str, Any]) -> list[str]:
    """Cells of one run with these settings: trainable parameters, accuracy on each benchmark, settings that differ.

    A benchmark has several accuracies if the run was evaluated on several files of its name.
    """
    from vitface.evaluation.compare import read_run
    from vitface.evaluation.scores import benchmark_of
    from vitface.model.counts import parameter_counts
    from vitface.store.faces import meta_model, open_checkpoint

    try:
        trainable = f"{parameter_counts(meta_model(open_checkpoint(run).config))['all'][1]:,}"
        results = read_run(run)
    except VitfaceError as error:
        print(f"{run}: no results: {error}", file=sys.stderr)
        trainable, results = "", {}
    scored = {
        bench: [result for name, result in results.items() if benchmark_of(name) == bench] for bench in RECORDED_ON
    }
    accuracies = [
        "; ".join(f"{100 * found.accuracy:.2f} ± {100 * found.std:.2f}" for found in scored[bench]) or "not evaluated"
        for bench in RECORDED_ON
    ]
    differ = {name: value for name, value in differences(settings).items() if name not in BOOKKEEPING}
    return [trainable, *accuracies, ", ".join(f"`{to_flag(name)} {value}`" for name, value in differ.items())]


def run(arguments: argparse.Namespace) -> None:
    text = experiments_markdown(arguments.runs)
    print(text, end="")
    if arguments.docs:
        put_between_markers(arguments.docs, "The recorded experiments", text)
        print(f"wrote {arguments.docs}", file=sys.stderr)
