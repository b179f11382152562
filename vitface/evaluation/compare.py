"""Tests whether B verifies better than A on the same pairs; the runs of each side differ only in the seed."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitface.config import BOOKKEEPING
from vitface.data.synthetic.worlds import SYNTHETIC
from vitface.errors import CheckpointError, ConfigError, EvaluationError, command
from vitface.evaluation.benchmarks import Degraded
from vitface.evaluation.protocol import Verification
from vitface.evaluation.report import FIVE
from vitface.evaluation.scores import SCORES, benchmark_of, labelled, load_scores
from vitface.evaluation.statistics import difference_draws, interval, mcnemar
from vitface.store.faces import open_checkpoint
from vitface.store.settings import read_config

SAME_EXPERIMENT = BOOKKEEPING | {"exp", "seed"}
ONE_SEED = "One seed: this is about these runs, not about the methods."


@dataclass(frozen=True)
class Side:
    """The runs of one experiment, one per seed, with their results by benchmark."""

    name: str
    seeds: list[int | None]  # [None] for a model that was not trained, on one side at most
    results: list[dict[str, Verification]]


@dataclass(frozen=True)
class Difference:
    """B against A on one benchmark, or on the average of several; accuracies and differences are fractions.

    `only_a` and `only_b` count the pairs that only A or only B decides correctly, and `p` is McNemar's; they are None
    for the average.
    """

    benchmark: str
    accuracy_a: float
    accuracy_b: float
    difference: float
    interval: tuple[float, float]
    only_a: int | None = None
    only_b: int | None = None
    p: float | None = None


@dataclass(frozen=True)
class Comparison:
    a: str
    b: str
    seeds_a: list[int | None]
    seeds_b: list[int | None]
    rows: list[Difference]  # the last one is the average where there are several benchmarks
    verdict: str


def read_run(run: Path, degraded: Degraded | None = None) -> dict[str, Verification]:
    """The results of a run by benchmark, as they are or `degraded`; CheckpointError if they are missing or not of its
    best checkpoint."""
    trained, file, words = (run / "checkpoints").is_dir(), SCORES, ["--bench", "all"]
    if degraded:
        file, words = degraded.scores, [*words, f"--degrade{'-probe' * degraded.probe}", degraded.text]
    again = command("evaluate", "--checkpoint", run, *words)
    if not (run / file).is_file():
        advice = f"it was not evaluated yet; do it with\n  {again}" if trained else "it is no run; name run directories"
        raise CheckpointError(f"{run} has no scores ({file} is missing): {advice}")
    results, model = load_scores(run / file)
    if trained and model != open_checkpoint(run).sha256:
        raise CheckpointError(f"{run / file} is not of the run's best checkpoint; evaluate it again with\n  {again}")
    return results


def group_runs(runs: Sequence[Path], results: Sequence[dict[str, Verification]]) -> list[Side]:
    """Sides in the order of their first runs; a side's name has the settings in which the sides differ.

    ConfigError if one experiment has the same seed twice, or if there are fewer than two sides.
    """
    settings = [{k: v for k, v in read_config(run).items() if k not in SAME_EXPERIMENT} for run in runs]
    seeds = [read_config(run).get("seed") for run in runs]
    kinds = [kind for i, kind in enumerate(settings) if kind not in settings[:i]]
    if len(kinds) < 2:
        differ = "differ only in the seed" if len({*seeds}) > 1 else "are one run and copies of it, or repeat it"
        raise ConfigError(f"these runs {differ}; --compare needs at least two experiments")
    keys = dict.fromkeys(key for kind in kinds for key in kind)
    differ = [key for key in keys if any(kind.get(key) != kinds[0].get(key) for kind in kinds)]
    sides = []
    for kind in kinds:
        members = sorted((i for i in range(len(runs)) if settings[i] == kind), key=lambda i: str(seeds[i]))
        if len({seeds[i] for i in members}) < len(members):
            names = ", ".join(str(runs[i]) for i in members)
            raise ConfigError(f"{names}: the same experiment and seed twice; a repeated run is not another seed")
        name = ", ".join(f"{key} {kind[key]}" for key in differ if kind.get(key) is not None)
        sides.append(Side(name, [seeds[i] for i in members], [results[i] for i in members]))
    return sides


def compare(a: Side, b: Side) -> Comparison:
    """B minus A on every benchmark that all their runs have, and on average.

    Synthetic benchmarks count only if there are no others. The average is of the five that papers have where all of
    these are there, else of all. EvaluationError if the runs have no benchmark in common, or
    if their pairs differ.
    """
    every = on_common_data([with_accuracy(results) for results in (*a.results, *b.results)])
    names = [name for name in every[0] if benchmark_of(name) not in SYNTHETIC] or list(every[0])
    if not names:
        again = "vitface evaluate --checkpoint RUN --bench NAME"
        raise EvaluationError(f"{a.name} and {b.name} have no benchmark in common; evaluate them with\n  {again}")
    for name, results in itertools.product(names, every):
        ours, theirs = every[0][name], results[name]
        if not (np.array_equal(ours.issame, theirs.issame) and np.array_equal(ours.folds, theirs.folds)):
            raise EvaluationError(f"{name}: the runs were not evaluated on the same pairs; use one file for all")
    sides = every[: len(a.results)], every[len(a.results) :]
    first, second = ([[results[name] for results in side] for name in names] for side in sides)
    draws = difference_draws(first, second, matched=a.seeds == b.seeds)
    rows = []
    for name, of_a, of_b, drawn in zip(names, first, second, draws, strict=True):
        mean_a, mean_b = (float(np.mean([result.accuracy for result in results])) for results in (of_a, of_b))
        pairs = mcnemar(*(np.stack([result.correct for result in results]) for results in (of_a, of_b)))
        rows.append(Difference(name, mean_a, mean_b, mean_b - mean_a, interval(drawn), *pairs))
    five = [i for i, name in enumerate(names) if name in FIVE]
    averaged = five if len(five) == len(FIVE) else list(range(len(rows)))
    if len(averaged) > 1:
        of_a, of_b = (float(np.mean([getattr(rows[i], key) for i in averaged])) for key in ("accuracy_a", "accuracy_b"))
        title = "average of five" if len(five) == len(FIVE) else f"average of {len(averaged)}"
        rows.append(Difference(title, of_a, of_b, of_b - of_a, interval(draws[averaged].mean(axis=0))))
    return Comparison(a.name, b.name, a.seeds, b.seeds, rows, verdict(a, b, rows[-1]))


def with_accuracy(results: Mapping[str, Verification]) -> dict[str, Verification]:
    """Without the sets that are too small for folds and had no threshold."""
    return {label: result for label, result in results.items() if not np.isnan(result.accuracy)}


def on_common_data(runs: Sequence[Mapping[str, Verification]]) -> list[dict[str, Verification]]:
    """Of each run's results those on pairs that all runs were evaluated on.

    EvaluationError if all runs have a benchmark, but from different files.
    """
    found = [{(benchmark_of(label), result.data): result for label, result in run.items()} for run in runs]
    shared = [key for key in found[0] if all(key in run for run in found)]
    for name in dict.fromkeys(name for name, _ in found[0]):
        files = [sorted({data[:8] or "unknown" for other, data in run if other == name}) for run in found]
        if all(files) and name not in dict(shared):
            seen = ", ".join(dict.fromkeys(data for run in files for data in run))
            raise EvaluationError(
                f"{name}: the runs were evaluated on different files of that name (SHA-256 {seen}); evaluate them on "
                f"one\n  vitface evaluate --checkpoint RUN --bench {name} --data-dir FOLDER"
            )
    return [labelled((name, run[name, data]) for name, data in shared) for run in found]


def verdict(a: Side, b: Side, row: Difference) -> str:
    """What the interval shows, as a sentence."""
    low, high = (100 * bound for bound in row.interval)
    size, seeds = 100 * row.difference, min(len(side.seeds) for side in (a, b) if side.seeds != [None])
    if low > 0 or high < 0:
        better, worse = (b.name, a.name) if low > 0 else (a.name, b.name)
        near, far = sorted((abs(low), abs(high)))
        text = f"[{better}] is better than [{worse}] by {abs(size):.2f} points (95 % interval {near:.2f} to {far:.2f})"
    else:
        text = (
            f"no difference shown between [{a.name}] and [{b.name}]: {size:+.2f} points; gains above {high:.2f} and "
            f"losses beyond {-low:.2f} are unlikely (95 % interval)"
        )
    if seeds == 1:
        return text + f". {ONE_SEED}"
    return text + f", over {seeds} seeds."


def comparison_text(comparison: Comparison) -> str:
    """The table and the verdict; accuracies and differences in % and points."""
    lines = [
        f"A: {comparison.a}  ({_seeds(comparison.seeds_a)})",
        f"B: {comparison.b}  ({_seeds(comparison.seeds_b)})",
        f"{'benchmark':<14}{'A':>7}{'B':>8}{'B - A':>8}  {'95 % interval':<18}{'only A':>7}{'only B':>8}  McNemar p",
    ]
    for row in comparison.rows:
        low, high = (100 * bound for bound in row.interval)
        pairs = "" if row.p is None else f"{row.only_a:>7}{row.only_b:>8}  {row.p:.2g}"
        lines.append(
            f"{row.benchmark:<14}{100 * row.accuracy_a:>7.2f}{100 * row.accuracy_b:>8.2f}"
            f"{100 * row.difference:>+8.2f}  {f'{low:+.2f} to {high:+.2f}':<18}{pairs}".rstrip()
        )
    return "\n".join([*lines, f"verdict: {comparison.verdict}"])


def _seeds(seeds: list[int | None]) -> str:
    known = [str(seed) for seed in seeds if seed is not None]
    return f"seed{'s' if len(known) > 1 else ''} {', '.join(known)}" if known else "no seed"
