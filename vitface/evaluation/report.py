"""Results as a text table and as JSON."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitface.data.formats.published import RFW, pair_quality
from vitface.errors import EvaluationError
from vitface.evaluation.benchmarks import BENCHMARKS, OWN, category
from vitface.evaluation.protocol import Verification
from vitface.evaluation.statistics import accuracy_interval, identity_interval
from vitface.metrics import far_threshold
from vitface.store.thresholds import FARS

FIVE = ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw")  # whose average papers print
REJECTED = (0, 0.05, 0.1, 0.2, 0.3)  # the shares of the pairs, in the order of their quality
Results = Mapping[str, Verification]  # by benchmark name


def results_table(results: Results) -> str:
    """A line per benchmark, grouped by category with each category's average, and what papers print of several;
    accuracies in %."""
    width = max([11, *(len(name) + 1 for name in results)])
    head = f"{'category':<11}{'pairs':>6}  {'accuracy ± std':<16}{'95 % interval':<17}{'AUC':<8}{'EER':<7}TAR@FAR=1e-2"
    lines = [f"{'benchmark':<{width}}{head}"]
    for kind in (*dict.fromkeys(benchmark.category for benchmark in BENCHMARKS.values()), OWN):
        rows = {name: result for name, result in results.items() if category(name) == kind}
        for name, result in rows.items():
            lines.append(
                f"{name:<{width}}{kind:<11}{len(result.correct):>6}  {_accuracy(result):<16}"
                f"{_interval(result):<17}{result.auc:<8.4f}{100 * result.eer:<7.2f}{_tar_text(result)}"
            )
        rows = {name: result for name, result in rows.items() if name in BENCHMARKS}
        if len(rows) > 1:
            lines.append(f"{'':<{width}}{kind + ' average':<19}{100 * _mean(rows):.2f}")
    return "\n".join([*lines, *(f"{'':<{width}}{text}" for text in summary_lines(results))])


def summary_lines(results: Results) -> list[str]:
    """What papers print of several sets: the average of five, and the spread between RFW's groups."""
    return [*_average_lines(results), *_rfw_lines(results)]


def notes(results: Results) -> list[str]:
    """What is to be known of sets that nobody published."""
    found = []
    for name, result in results.items():
        if category(name) != OWN:
            continue
        tars = {f"{far:g}": _tar(result, far) for far in FARS}
        known = [f"{100 * tar:.2f} at FAR {far}" for far, tar in tars.items() if tar is not None]
        how = f"{len(result.thresholds)} folds"
        if not result.in_folds:
            how = "no folds, as they would have fewer than 20 pairs"
            cosine = 1 - result.thresholds[0] / 2
            none = "no calibrated threshold either: AUC and EER are all there is"
            how += f"; {none}" if math.isnan(cosine) else f"; decided by the model's calibrated threshold, {cosine:.4f}"
        found.append(f"{name} is no published set: {how}; TAR {', '.join(known) or 'needs 3,000 different pairs'}")
    return found


def average_of_five(results: Results) -> float | None:
    """The mean accuracy of FIVE, None unless all are there."""
    return _mean({name: results[name] for name in FIVE}) if all(name in results for name in FIVE) else None


def rfw_spread(results: Results) -> dict[str, float | None] | None:
    """How the accuracies of RFW's four groups differ, as fractions; None unless all are there.

    "average", "spread" (the best minus the worst), "std" over the groups, and "skewed_error_ratio", the largest error
    divided by the smallest, None where a group has no error (Wang and Deng 2020).
    """
    if not all(name in results for name in RFW):
        return None
    accuracies = np.array([results[name].accuracy for name in RFW])
    worst, best = float(accuracies.min()), float(accuracies.max())
    ratio = (1 - worst) / (1 - best) if best < 1 else None
    return {
        "average": float(accuracies.mean()),
        "spread": best - worst,
        "std": float(accuracies.std()),
        "skewed_error_ratio": ratio,
    }


def quality_groups(result: Verification, quality: np.ndarray) -> list[dict[str, Any]]:
    """XQLFW's pairs in three groups of one size, by the lower quality (N, 2) of the two photos: {"quality": [from, to],
    "pairs", "accuracy"} of each, the accuracy by the thresholds of the folds."""
    lower = quality.min(axis=1)
    return [
        {
            "quality": [float(lower[rows].min()), float(lower[rows].max())],
            "pairs": len(rows),
            "accuracy": float(result.correct[rows].mean()),
        }
        for rows in np.array_split(np.argsort(lower, kind="stable"), 3)
    ]


def error_by_reject(result: Verification) -> dict[str, float] | None:
    """{share of the pairs that is rejected, those of the lowest quality: share of wrong decisions among the others};
    the thresholds stay those of all pairs. None where the quality is not known, or without an accuracy."""
    if result.quality is None or math.isnan(result.accuracy):
        return None
    kept = result.correct[np.argsort(result.quality, kind="stable")]
    return {f"{share:g}": float(1 - kept[round(share * len(kept)) :].mean()) for share in REJECTED}


def errors_by_reject(results: Results) -> dict[str, dict[str, float]]:
    """`error_by_reject` of the results that have one."""
    return {name: errors for name, result in results.items() if (errors := error_by_reject(result))}


def reject_lines(results: Results) -> list[str]:
    """The errors of each benchmark, of all pairs and without those of the lowest quality, in %."""
    return [
        f"{name}: errors {', '.join(f'{100 * error:.2f}' for error in errors.values())} % with the "
        f"{', '.join(f'{100 * share:g}' for share in REJECTED)} % of pairs of the lowest quality rejected"
        for name, errors in errors_by_reject(results).items()
    ]


def quality_of(results: Results, data_dir: Path) -> list[dict[str, Any]]:
    """`quality_groups` of XQLFW where it is among the results and its scores are there, else []."""
    quality = pair_quality(data_dir) if "xqlfw" in results else None
    return [] if quality is None else quality_groups(results["xqlfw"], quality)


def quality_lines(groups: list[dict[str, Any]]) -> list[str]:
    texts = ("{:.2f} at {:.2f} to {:.2f}".format(100 * x["accuracy"], *x["quality"]) for x in groups)
    return [f"xqlfw by the lower quality of the two photos: {', '.join(texts)}"] if groups else []


def _average_lines(results: Results) -> Iterator[str]:
    absent = [name for name in FIVE if name not in results]
    if not absent:
        yield f"{'average of five':<19}{100 * _mean({name: results[name] for name in FIVE}):.2f}"
    elif len(absent) < 4:
        yield f"no average of five: {_are_missing(absent)}"


def _rfw_lines(results: Results) -> Iterator[str]:
    if spread := rfw_spread(results):
        worst, best = (pick(RFW, key=lambda name: results[name].accuracy) for pick in (min, max))
        points, std, ratio = (spread[key] or 0 for key in ("spread", "std", "skewed_error_ratio"))
        text = f"{100 * points:.2f} points, {RFW[best]} to {RFW[worst]}; deviation {100 * std:.2f}"
        yield f"{'spread of RFW':<19}{text}" + (f"; largest error / smallest {ratio:.2f}" if ratio else "")
    elif any(name in results for name in RFW):
        yield f"no spread of RFW: {_are_missing([name for name in RFW if name not in results])}"


def _are_missing(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing"


def _accuracy(result: Verification) -> str:
    accuracy = "-" if math.isnan(result.accuracy) else f"{100 * result.accuracy:.2f}"
    return f"{accuracy} ± {100 * result.std:.2f}" if result.in_folds else accuracy


def _interval(result: Verification) -> str:
    low, high = accuracy_interval(result)
    return "-" if math.isnan(low) else f"{100 * low:.2f} to {100 * high:.2f}"


def _tar_text(result: Verification) -> str:
    tar = _tar(result, FARS[0])
    return "-" if tar is None else f"{100 * tar:.2f}"


def _mean(results: Results) -> float:
    return sum(result.accuracy for result in results.values()) / len(results)


def _tar(result: Verification, far: float) -> float | None:
    try:
        return far_threshold(-result.distance, result.issame, far)[1]
    except EvaluationError:
        return None


def results_json(results: Results) -> dict[str, dict]:
    """{benchmark: {"accuracy", "std", "interval", "identity_interval", "auc", "eer", "tar_at_far", "pairs", "data",
    "published", "threshold", "error_by_reject"}}.

    "identity_interval" is None where the pairs' people are not known; a TAR is None where there are too few different
    pairs. "published" is false for one's own pairs; "threshold" is the cosine that decided those that are too few for
    folds, else None. What does not exist is None.
    """
    return {
        name: {
            "accuracy": _number(result.accuracy),
            "std": _number(result.std),
            "interval": None if math.isnan(result.accuracy) else accuracy_interval(result),
            "identity_interval": identity_interval(result),
            "auc": result.auc,
            "eer": result.eer,
            "tar_at_far": {f"{far:g}": _tar(result, far) for far in FARS},
            "pairs": len(result.correct),
            "data": result.data,
            "published": category(name) != OWN,
            "threshold": None if result.in_folds else _number(1 - float(result.thresholds[0]) / 2),
            "error_by_reject": error_by_reject(result),
        }
        for name, result in results.items()
    }


def summary_json(results: Results) -> dict[str, Any]:
    """{"average_of_five": see there, "rfw": `rfw_spread`}."""
    return {"average_of_five": average_of_five(results), "rfw": rfw_spread(results)}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
