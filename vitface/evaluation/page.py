"""An evaluation as one self-contained page: no script, no network, light and dark, readable on a phone.

It shows what `report.results_json` holds, and charts of the same results; its text and markup are in report.html.j2.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitface.data.formats.pairs import EncodedImages
from vitface.data.synthetic.worlds import SYNTHETIC, TEST_PEOPLE, SyntheticSamples
from vitface.documents import render
from vitface.evaluation import plots
from vitface.evaluation.benchmarks import Evaluation, category, read_benchmark
from vitface.evaluation.plots import Chart, bar_chart, heat, line_chart, picture
from vitface.evaluation.protocol import Verification
from vitface.evaluation.report import notes, quality_lines, quality_of, results_json, summary_lines
from vitface.evaluation.routing import synthetic_routing
from vitface.evaluation.scores import benchmark_of
from vitface.metrics import roc
from vitface.recogniser import Recogniser
from vitface.store.settings import read_epochs

Pictures = list[tuple[str, str]]  # of `picture`


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

    `run` adds its learning curve, `faces` the pictures of the hardest pairs, real people's faces, `routing`
    {benchmark: `benchmark_routing`} the router's weights by pose, and `others` results that are not of pairs of photos,
    as text and charts.
    """
    results = evaluation.results
    return render(
        "evaluation/report.html.j2",
        box=plots.BOX,
        title=title,
        problems=[*evaluation.alarms, *evaluation.failures],
        results=results_json(results),
        remarks=[*summary_lines(results), *quality_lines(quality_of(results, data_dir)), *notes(results)],
        category=category,
        degraded=degraded_curves(evaluation),
        learning=learning_curve(run) if run else [],
        roc=roc_chart(results) if results else None,
        scores=[histogram(name, result) for name, result in results.items()],
        categories=category_bars(results),
        hardest=hardest_pairs(results, data_dir) if faces else {},
        attention=attention_maps(model),
        routing=routing_section(model, routing) if model.config.num_domains > 1 else None,
        settings=vars(model.config),
        others=others,
    )


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
    """True accept rate over false accept rate, where that is not zero."""
    curves = {}
    for name, result in results.items():
        far, tar, _ = roc(-result.distance, result.issame)
        curves[name] = far[far > 0], tar[far > 0]
    return line_chart("ROC", "false accept rate (log)", "true accept rate", curves, log_x=True)


def histogram(name: str, result: Verification) -> Chart:
    """The cosines of same and of different pairs, and the mean threshold."""
    cosine, edges = 1 - result.distance / 2, np.linspace(-1, 1, 61)
    steps = np.repeat(edges, 2)[1:-1]  # from the left edge of each bin to its right edge
    curves = {
        label: (steps, np.repeat(np.histogram(cosine[kind], edges)[0] / kind.sum(), 2))
        for label, kind in (("same", result.issame), ("different", ~result.issame))
    }
    threshold = 1 - result.thresholds.mean() / 2
    title = f"{name}: cosine of the pairs" + ("" if np.isnan(threshold) else f"; the mean threshold is {threshold:.3f}")
    return line_chart(title, "cosine", "share of pairs", curves)


def degraded_curves(evaluation: Evaluation) -> list[Chart]:
    """Accuracy by the amount of a sensor, for each kind of which several amounts were evaluated."""
    from vitface.data.degrade import KINDS

    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for label, degraded in evaluation.degraded.items():
        if len(degraded.sensors) == 1:
            sensor, curve = degraded.sensors[0], benchmark_of(label) + ", the second photo only" * degraded.probe
            point = sensor.low, 100 * evaluation.results[label].accuracy
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
    groups: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        if not np.isnan(result.accuracy):
            groups.setdefault(category(name), {})[name] = 100 * result.accuracy
    title = "Accuracy by what makes a benchmark hard"
    return bar_chart(title, "category", "accuracy in %", groups, 100) if groups else None


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
                picture(images.read(2 * i + side), f"cosine {1 - result.distance[i] / 2:.2f}")
                for i in worst.tolist()
                for side in (0, 1)
            ]
    return found


def attention_maps(model: Recogniser) -> Pictures:
    """The last block's attention of CLS, mean over heads, on procedural faces: no real person is shown."""
    samples = SyntheticSamples(2, 3, first_person=TEST_PEOPLE.start)
    images = samples.render(np.arange(len(samples)))
    maps = model.attention(images).mean(axis=1)
    return [picture(heat(image, weights), "bright: looked at") for image, weights in zip(images, maps, strict=True)]


def routing_section(model: Recogniser, by_pose: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean domain weights by the known hard factor of procedural faces, and by the pose of a benchmark's faces."""
    found = next((found for name, found in by_pose.items() if name in SYNTHETIC), None) or synthetic_routing(model)
    return {
        **found,
        "chart": domain_bars(
            "procedural faces", "hard factor", [*found["labels"], "all"], [*found["weights"], found["usage"]]
        ),
        "poses": [
            {**pose, "chart": domain_bars(name, "turned by", [f"{d}°" for d in pose["degrees"]], pose["weights"])}
            for name, pose in by_pose.items()
            if name not in SYNTHETIC
        ],
    }


def domain_bars(faces: str, x_label: str, labels: list[str], weights: list[list[float] | None]) -> Chart:
    """A group of bars for each row of weights (K,) that is not None."""
    groups = {
        label: {f"domain {k}": weight for k, weight in enumerate(row)}
        for label, row in zip(labels, weights, strict=True)
        if row is not None
    }
    return bar_chart(f"Mean domain weights on {faces}", x_label, "weight", groups, 1)
