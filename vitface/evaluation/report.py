"""Results as a text table and as JSON."""

from collections.abc import Mapping

from vitface.data.synthetic.worlds import SYNTHETIC
from vitface.errors import EvaluationError
from vitface.evaluation.benchmarks import BENCHMARKS
from vitface.evaluation.protocol import Verification
from vitface.evaluation.scores import benchmark_of
from vitface.evaluation.statistics import accuracy_interval, identity_interval
from vitface.metrics import far_threshold
from vitface.store.thresholds import FARS

Results = Mapping[str, Verification]  # by benchmark name


def results_table(results: Results) -> str:
    """A line per result, grouped by the benchmark's category with each category's average; accuracies in %."""
    wide = max([11, *(len(name) + 1 for name in results)])
    lines = [
        f"{'benchmark':<{wide}}{'category':<11}{'pairs':>6}  {'accuracy ± std':<16}{'95 % interval':<17}{'AUC':<8}EER"
    ]
    for category in dict.fromkeys(BENCHMARKS[name].category for name in BENCHMARKS):
        rows = {name: result for name, result in results.items() if BENCHMARKS[benchmark_of(name)].category == category}
        for name, result in rows.items():
            low, high = accuracy_interval(result)
            accuracy = f"{100 * result.accuracy:.2f} ± {100 * result.std:.2f}"
            lines.append(
                f"{name:<{wide}}{category:<11}{len(result.correct):>6}  {accuracy:<16}"
                f"{f'{100 * low:.2f} to {100 * high:.2f}':<17}{result.auc:<8.4f}{100 * result.eer:.2f}"
            )
        rows = {name: result for name, result in rows.items() if name in BENCHMARKS}
        if len(rows) > 1:
            lines.append(f"{'':<{wide}}{category + ' average':<19}{100 * _mean(rows):.2f}")
    real = {name: result for name, result in results.items() if name in BENCHMARKS and name not in SYNTHETIC}
    if len(real) > 1:
        lines.append(f"{'':<{wide}}{f'average of {len(real)}':<19}{100 * _mean(real):.2f}")
    return "\n".join(lines)


def _mean(results: Results) -> float:
    return sum(result.accuracy for result in results.values()) / len(results)


def _tar(result: Verification, far: float) -> float | None:
    try:
        return far_threshold(-result.distance, result.issame, far)[1]
    except EvaluationError:
        return None


def results_json(results: Results) -> dict[str, dict]:
    """{benchmark: {"accuracy", "std", "interval", "identity_interval", "auc", "eer", "tar_at_far", "pairs", "data"}}.

    "identity_interval" is None where the pairs' people are not known; a TAR is None where there are too few different
    pairs.
    """
    return {
        name: {
            "accuracy": result.accuracy,
            "std": result.std,
            "interval": accuracy_interval(result),
            "identity_interval": identity_interval(result),
            "auc": result.auc,
            "eer": result.eer,
            "tar_at_far": {f"{far:g}": _tar(result, far) for far in FARS},
            "pairs": len(result.correct),
            "data": result.data,
        }
        for name, result in results.items()
    }
