"""An evaluation as one self-contained page: no script, no network, light and dark, readable on a phone.

It shows what `report.results_json` holds, and charts of the same results; its text and markup are in report.html.j2.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitface.data.formats.pairs import EncodedImages
from vitface.data.synthetic.worlds import SYNTHETIC, TEST_PEOPLE, SyntheticSamples
from vitface.documents import render
from vitface.errors import CheckpointError
from vitface.evaluation import plots
from vitface.evaluation.benchmarks import Evaluation, category, read_benchmark
from vitface.evaluation.plots import Chart, bar_chart, heat, heat_scale, line_chart, pictures
from vitface.evaluation.protocol import Verification
from vitface.evaluation.report import (
    REJECTED,
    average_of_five,
    errors_by_reject,
    notes,
    quality_lines,
    quality_of,
    results_json,
    summary_lines,
)
from vitface.evaluation.routing import domain_names, synthetic_routing
from vitface.evaluation.scores import benchmark_of
from vitface.evaluation.statistics import tar_interval
from vitface.metrics import roc
from vitface.recogniser import Recogniser
from vitface.store.settings import read_config, read_epochs

Pictures = list[tuple[list[str], str]]  # of `pictures`
CURVE_POINTS = 120
FIVE_TOGETHER = "average of five"
_FROZEN = "FRoundation, CLIP ViT-B/16, not trained on faces"
_LARGE = "FRoundation, CLIP ViT-B/16 + LoRA, data larger than CASIA"
_PAPER, _QUOTED = "paper", "paper, second hand"
PUBLISHED = {  # benchmark -> (accuracy in %, model, source)
    FIVE_TOGETHER: [
        ("90.94", "FRoundation, DINOv2 ViT-S + LoRA, CASIA 10K identities", _PAPER),
        ("92.13", "FRoundation, CLIP ViT-B/16 + LoRA, CASIA 10K identities", _QUOTED),
        ("87.10", "FRoundation, DINOv2 ViT-S + LoRA, CASIA 1K identities", _PAPER),
        ("94.68", "AdaFace R50, CASIA", "its README"),
    ],
    "lfw": [
        ("99.30", _LARGE, _QUOTED),
        ("93.33", _FROZEN, _QUOTED),
        ("99.42", "AdaFace R50, CASIA", "its README"),
        ("90.45", "EXP-001, DINOv2 + LoRA, CASIA", "recorded; threshold chosen on the test pairs"),
    ],
    "cfp_fp": [("93.93", _LARGE, _QUOTED), ("88.86", _FROZEN, _QUOTED)],
    "agedb_30": [("88.90", _LARGE, _QUOTED), ("74.67", _FROZEN, _QUOTED)],
    "calfw": [("92.75", _LARGE, _QUOTED), ("77.13", _FROZEN, _QUOTED)],
    "cplfw": [("90.67", _LARGE, _QUOTED), ("79.23", _FROZEN, _QUOTED)],
}


def report_page(
    title: str,
    model: Recogniser,
    evaluation: Evaluation,
    run: Path | None,
    data_dir: Path,
    faces: bool,
    routing: Mapping[str, dict[str, Any]],
    others: Sequence[tuple[str, list[Chart]]] = (),
) -> str:
    """The whole page as HTML.

    `run` adds its learning curve and settings, `faces` the pictures of the hardest pairs, real people's faces,
    `routing` {benchmark: `benchmark_routing`} the router's weights by pose, and `others` results that are not of pairs
    of photos, as text and charts.
    """
    results, training = evaluation.results, training_settings(run)
    names = domain_names(training, model.config.num_domains)
    return render(
        "evaluation/report.html.j2",
        box=plots.BOX,
        title=title,
        problems=[*evaluation.alarms, *evaluation.failures],
        results=results_json(results),
        remarks=[*summary_lines(results), *quality_lines(quality_of(results, data_dir)), *notes(results)],
        category=category,
        beside=beside_published(results),
        degraded=degraded_curves(evaluation),
        learning=learning_curve(run) if run else [],
        roc=roc_chart(results) if results else None,
        scores=[*(histogram(name, result) for name, result in results.items()), *reject_charts(results)],
        categories=category_bars(results),
        hardest=hardest_pairs(results, data_dir) if faces else {},
        attention=attention_maps(model),
        scale=pictures("", heat_scale(224, 12))[0][0],
        routing=routing_section(model, routing, names) if model.config.num_domains > 1 else None,
        settings=model_settings(model),
        training={name: value for name, value in training.items() if value is not None},
        others=others,
    )


def beside_published(results: dict[str, Verification]) -> list[tuple[str, str, str, str]]:
    """(benchmark, accuracy in %, model, source): of each benchmark of which others report figures, ours and theirs."""
    ours = {name: result.accuracy for name, result in results.items()} | {FIVE_TOGETHER: average_of_five(results)}
    rows = []
    for name, theirs in PUBLISHED.items():
        if (accuracy := ours.get(name)) is not None and not np.isnan(accuracy):
            rows += [(name, f"{100 * accuracy:.2f}", "this model", ""), *((name, *row) for row in theirs)]
    return rows


def training_settings(run: Path | None) -> dict[str, Any]:
    """Those of the run; {} without one or, with a note, if they are damaged."""
    try:
        return read_config(run) if run else {}
    except CheckpointError as error:
        print(f"note: {error}", file=sys.stderr)
        return {}


def model_settings(model: Recogniser) -> dict[str, Any]:
    settings = dataclasses.asdict(model.config)
    return settings | {f"vit {name}": value for name, value in settings.pop("vit").items()}


def learning_curve(run: Path) -> list[Chart]:
    """Loss and held-out AUC by epoch, from the run's log.csv."""
    rows = read_epochs(run)
    charts = []
    for key, label in (("loss", "training loss"), ("holdout_auc", "AUC on held-out training people")):
        x, y = (np.array([row[column] for row in rows if row[key]], float) for column in ("epoch", key))
        if len(x) > 1:
            charts.append(line_chart(label, "epoch", label, {label: (x, y)}))
    return charts


def roc_chart(results: dict[str, Verification]) -> Chart:
    """True accept rate over false accept rate, where that is not zero, with its interval."""
    curves, bands = {}, {}
    for name, result in results.items():
        far, tar, _ = roc(-result.distance, result.issame)
        curves[name] = far[far > 0], tar[far > 0]
        some = np.geomspace(curves[name][0].min(), 1, CURVE_POINTS)
        bands[name] = some, *tar_interval(result, some)
    title = "ROC; shaded: the 95 % interval by bootstrap over pairs"
    return line_chart(title, "false accept rate (log)", "true accept rate", curves, log_x=True, bands=bands)


def histogram(name: str, result: Verification) -> Chart:
    """The cosines of same and of different pairs, and the mean threshold."""
    cosine, edges = 1 - result.distance / 2, np.linspace(-1, 1, 61)
    steps = np.repeat(edges, 2)[1:-1]  # from the left edge of each bin to its right edge
    curves = {
        label: (steps, np.repeat(np.histogram(cosine[kind], edges)[0] / kind.sum(), 2))
        for label, kind in (("same", result.issame), ("different", ~result.issame))
    }
    threshold = 1 - result.thresholds.mean() / 2
    at = "" if np.isnan(threshold) else f"; the mean threshold is {_plain(threshold, 3)}"
    return line_chart(f"{name}: cosine of the pairs{at}", "cosine", "share of pairs", curves)


def reject_charts(results: dict[str, Verification]) -> list[Chart]:
    """The errors among the pairs that remain when those of the lowest quality are rejected, where that is known."""
    shares = 100 * np.array(REJECTED)
    curves = {name: (shares, 100 * np.array([*errors.values()])) for name, errors in errors_by_reject(results).items()}
    title = "Errors by how many pairs are rejected, those of the lowest quality first"
    return [line_chart(title, "rejected pairs in %", "errors in %", curves)] if curves else []


def degraded_curves(evaluation: Evaluation) -> list[Chart]:
    """Accuracy by the amount of a sensor, for each kind of which several amounts have one."""
    from vitface.data.degrade import KINDS

    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for label, degraded in evaluation.degraded.items():
        accuracy = evaluation.results[label].accuracy
        if len(degraded.sensors) == 1 and not np.isnan(accuracy):
            sensor, curve = degraded.sensors[0], benchmark_of(label) + ", the second photo only" * degraded.probe
            point = sensor.low, 100 * accuracy
            charts.setdefault(sensor.kind, {}).setdefault(curve, []).append(point)
    return [
        line_chart(
            f"Accuracy by {kind}",
            f"{kind}, {KINDS[kind].unit}",
            "accuracy in %",
            {n: _xy(c) for n, c in curves.items()},
        )
        for kind, curves in charts.items()
        if min(map(len, curves.values())) > 1
    ]


def _xy(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(sorted(points)).T
    return x, y


def category_bars(results: dict[str, Verification]) -> Chart | None:
    """A bar for each benchmark's accuracy; None for a single one, whose bar says no more than the table."""
    groups: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        if not np.isnan(result.accuracy):
            groups.setdefault(category(name), {})[name] = 100 * result.accuracy
    each = (f"{kind}: {', '.join(values)}" for kind, values in groups.items())
    title = f"Accuracy by what makes a benchmark hard; {'; '.join(each)}"
    return bar_chart(title, "category", "accuracy in %", groups, 100) if sum(map(len, groups.values())) > 1 else None


def hardest_pairs(results: dict[str, Verification], data_dir: Path) -> dict[str, Pictures]:
    """The four most distant same pairs and the four nearest different pairs of every real benchmark, not degraded."""
    found = {}
    for name, result in results.items():
        if name in SYNTHETIC or name != benchmark_of(name):
            continue
        images = EncodedImages(name, read_benchmark(name, data_dir).images)
        for label, kind, sign in (("same", result.issame, -1), ("different", ~result.issame, 1)):
            worst = np.flatnonzero(kind)[np.argsort(sign * result.distance[kind])[:4]]
            found[f"{name}, {label}"] = [
                pictures(f"cosine {_plain(1 - result.distance[i] / 2, 2)}", images.read(2 * i), images.read(2 * i + 1))
                for i in worst.tolist()
            ]
    return found


def _plain(value: float | np.ndarray, digits: int) -> str:
    return f"{round(float(value), digits) + 0.0:.{digits}f}"  # no -0


def attention_maps(model: Recogniser) -> Pictures:
    """The last block's attention of CLS, mean over heads, on procedural faces: no real person is shown."""
    samples = SyntheticSamples(2, 3, first_person=TEST_PEOPLE.start)
    images = samples.render(np.arange(len(samples)))
    maps = model.attention(images).mean(axis=1)
    kinds = [samples.domain_names[domain] for domain in samples.domains]
    return [
        pictures(f"hard by {kind}; up to {100 * weights.max():.0f}\N{NO-BREAK SPACE}%", image, heat(image, weights))
        for kind, image, weights in zip(kinds, images, maps, strict=True)
    ]


def routing_section(model: Recogniser, by_pose: Mapping[str, dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Mean domain weights by the known hard factor of procedural faces, and by the pose of a benchmark's faces."""
    found = next((found for name, found in by_pose.items() if name in SYNTHETIC), None) or synthetic_routing(model)
    return {
        **found,
        "names": names,
        "chart": domain_bars(
            "procedural faces", "hard factor", [*found["labels"], "all"], [*found["weights"], found["usage"]], names
        ),
        "poses": [
            {
                **pose,
                "chart": domain_bars(name, "turned by", [f"{d}°" for d in pose["degrees"]], pose["weights"], names),
            }
            for name, pose in by_pose.items()
            if name not in SYNTHETIC
        ],
    }


def domain_bars(
    faces: str, x_label: str, labels: list[str], weights: list[list[float] | None], names: list[str]
) -> Chart:
    """A group of bars for each row of weights (K,) that is not None."""
    groups = {
        label: dict(zip(names, row, strict=True)) for label, row in zip(labels, weights, strict=True) if row is not None
    }
    return bar_chart(f"Mean domain weights on {faces}", x_label, "weight", groups, 1)
