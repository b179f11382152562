"""An evaluation as one self-contained page: no script, no network, light and dark, readable on a phone.

It shows what `report.results_json` holds, and is drawn from the same results.
"""

import csv
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vitface.data.images import decode_image, to_crop
from vitface.data.synthetic.worlds import SYNTHETIC, TEST_PEOPLE, SyntheticSamples
from vitface.evaluation.benchmarks import BENCHMARKS, Evaluation, read_benchmark
from vitface.evaluation.plots import bar_chart, heat, line_chart, picture, table
from vitface.evaluation.protocol import Verification, roc
from vitface.evaluation.report import results_json
from vitface.evaluation.routing import synthetic_routing
from vitface.model.face import FaceModel

# what others published or recorded, and what kind of number it is; accuracies in %
ANCHORS = (
    ("FRoundation, DINOv2 ViT-S + LoRA, CASIA 10K identities", "average of five", "90.94", "paper"),
    ("FRoundation, CLIP ViT-B/16 + LoRA, CASIA 10K identities", "average of five", "92.13", "paper, second hand"),
    ("FRoundation, DINOv2 ViT-S + LoRA, CASIA 1K identities", "average of five", "87.10", "paper"),
    ("AdaFace R50, CASIA", "average of five", "94.68", "its README"),
    ("AdaFace R50, CASIA", "LFW", "99.42", "its README"),
    ("EXP-001, DINOv2 + LoRA, CASIA", "LFW", "90.45", "recorded; threshold chosen on the test pairs"),
)
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2530;--soft:#667;--line:#d5dae0;--card:#f6f8fa;--c0:#0b63ce;
--c1:#c2410c;--c2:#15803d;--c3:#7e22ce;--c4:#b91c6b;--c5:#0e7490}
@media (prefers-color-scheme:dark){:root{--bg:#11161c;--fg:#e4e9ef;--soft:#9aa6b4;--line:#333d49;--card:#19212a;
--c0:#6ab0ff;--c1:#ff9a62;--c2:#5fd38a;--c3:#c99bff;--c4:#ff8ac0;--c5:#5fd0e6}}
*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:70rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .5rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}th,td{padding:.3rem .6rem;text-align:left;
border-bottom:1px solid var(--line)}.grid2{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr))}figure{margin:0;max-width:36rem;padding:.6rem;background:var(--card);border-radius:.5rem}figcaption{color:var(--soft);font-size:.85rem}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:11px}.plot{fill:none;stroke:var(--line)}
.grid{stroke:var(--line);stroke-width:.5}polyline{fill:none;stroke-width:2}.faces{display:flex;flex-wrap:wrap;gap:.6rem}
.face img{display:block;width:112px;height:112px}.face{max-width:8.5rem}.alarm{color:var(--c1)}p.note{color:var(--soft);
font-size:.9rem}
"""
for _number in range(6):
    STYLE += f".c{_number}{{stroke:var(--c{_number})}}.b{_number}{{fill:var(--c{_number})}}"
    STYLE += f"svg text.t{_number}{{fill:var(--c{_number})}}"


def report_page(
    title: str, model: FaceModel, evaluation: Evaluation, run: Path | None, data_dir: Path, faces: bool,
    routing: Mapping[str, dict[str, Any]],
) -> str:  # fmt: skip
    """The whole page as HTML. `run` adds its learning curve; `faces` shows the hardest pairs of real people; `routing`
    {benchmark: `benchmark_routing`} adds what the router makes of their poses."""
    results = evaluation.results
    problems = [f"<p class=alarm>{escape(text)}</p>" for text in (*evaluation.alarms, *evaluation.failures)]
    sections = {
        "Summary": "".join(problems) + summary(results),
        "Beside what others report": table(("model", "benchmark", "accuracy", "source"), ANCHORS)
        + "<p class=note>Compare like with like: an average of five benchmarks is no LFW accuracy.</p>",
        "Learning curve": "" if run is None else learning_curve(run),
        "ROC": "" if not results else roc_chart(results),
        "Scores": grid([histogram(name, result) for name, result in results.items()]),
        "By category": "" if not results else category_bars(results),
        "Hardest pairs": hardest_pairs(results, data_dir) if faces else "",
        "Where CLS looks": attention_maps(model),
        "Routing": "" if model.config.num_domains == 1 else routing_section(model, routing),
        "Settings": table(("setting", "value"), [(k, str(v)) for k, v in vars(model.config).items()]),
    }
    body = "".join(f"<section><h2>{name}</h2>{html}</section>" for name, html in sections.items() if html)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def grid(figures: Sequence[str]) -> str:
    return f"<div class=grid2>{''.join(figures)}</div>" if figures else ""


def summary(results: dict[str, Verification]) -> str:
    """The text report's numbers as a table."""
    head = ("benchmark", "category", "pairs", "accuracy ± std", "95 % interval", "AUC", "EER", "TAR@FAR=1e-2")
    rows = []
    for name, entry in results_json(results).items():
        low, high = entry["interval"]
        tar = entry["tar_at_far"]["0.01"]
        rows.append(
            (name, BENCHMARKS[name].category, f"{entry['pairs']:,}",
             f"{100 * entry['accuracy']:.2f} ± {100 * entry['std']:.2f}", f"{100 * low:.2f} to {100 * high:.2f}",
             f"{entry['auc']:.4f}", f"{100 * entry['eer']:.2f}", "too few pairs" if tar is None else f"{100 * tar:.2f}")
        )  # fmt: skip
    note = "Ten folds in file order; the interval is a pair bootstrap, a lower bound on the uncertainty."
    return table(head, rows) + f"<p class=note>{note}</p>"


def learning_curve(run: Path) -> str:
    """Loss and held-out AUC by epoch, from the run's log.csv."""
    path = run / "log.csv"
    if not path.is_file():
        return ""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    charts = []
    for key, label in (("loss", "training loss"), ("holdout_auc", "AUC on held-out training people")):
        points = [(float(row["epoch"]), float(row[key])) for row in rows if row[key]]
        if points:
            x, y = np.array(points).T
            charts.append(line_chart(label, "epoch", label, {label: (x, y)}))
    return grid(charts)


def roc_chart(results: dict[str, Verification]) -> str:
    """True accepts over false accepts, from one false accept on."""
    curves = {}
    for name, result in results.items():
        far, tar, _ = roc(-result.distance, result.issame)
        shown = far > 0
        curves[name] = far[shown], tar[shown]
    return line_chart("ROC", "false accept rate (log)", "true accept rate", curves, log_x=True)


def histogram(name: str, result: Verification) -> str:
    """The cosines of same and of different pairs, and the mean threshold."""
    cosine, edges = 1 - result.distance / 2, np.linspace(-1, 1, 61)
    curves = {
        label: (edges[:-1], np.histogram(cosine[kind], edges)[0] / kind.sum())
        for label, kind in (("same", result.issame), ("different", ~result.issame))
    }
    threshold = 1 - result.thresholds.mean() / 2
    title = f"{name}: cosine of the pairs; the mean threshold is {threshold:.3f}"
    return line_chart(title, "cosine", "share of pairs", curves, step=True)


def category_bars(results: dict[str, Verification]) -> str:
    categories = dict.fromkeys(BENCHMARKS[name].category for name in results)
    groups = {
        category: {name: 100 * r.accuracy for name, r in results.items() if BENCHMARKS[name].category == category}
        for category in categories
    }
    return bar_chart("Accuracy by what makes a benchmark hard", "category", "accuracy in %", groups, 100)


def hardest_pairs(results: dict[str, Verification], data_dir: Path, count: int = 4) -> str:
    """The same pairs farthest apart and the different pairs nearest, of every real benchmark."""
    parts = []
    for name, result in results.items():
        if name in SYNTHETIC:
            continue
        pairs = read_benchmark(name, data_dir)
        for label, kind, sign in (("same", result.issame, -1), ("different", ~result.issame, 1)):
            worst = np.flatnonzero(kind)[np.argsort(sign * result.distance[kind])[:count]]
            shown = [
                picture(
                    to_crop(decode_image(pairs.images[2 * i + side], name)), f"cosine {1 - result.distance[i] / 2:.2f}"
                )
                for i in worst.tolist()
                for side in (0, 1)
            ]
            parts.append(f"<p>{name}, {label}:</p><div class=faces>{''.join(shown)}</div>")
    return "".join(parts)


def attention_maps(model: FaceModel) -> str:
    """The last block's attention of CLS, mean over heads, on procedural faces: no real person is shown."""
    samples = SyntheticSamples(2, 3, first_person=TEST_PEOPLE.start)
    images = samples.render(np.arange(len(samples)))
    maps = model.attention(images).mean(axis=1)
    shown = [picture(heat(image, weights), "bright: looked at") for image, weights in zip(images, maps, strict=True)]
    return f"<div class=faces>{''.join(shown)}</div>"


def routing_section(model: FaceModel, by_pose: Mapping[str, dict[str, Any]]) -> str:
    """Mean domain weights by the known hard factor of procedural faces, and by pose on benchmarks."""
    routing = next((found for name, found in by_pose.items() if name in SYNTHETIC), None) or synthetic_routing(model)
    charts = "".join(pose_chart(name, found) for name, found in by_pose.items() if name not in SYNTHETIC)
    rows = zip([*routing["labels"], "all"], [*routing["weights"], routing["usage"]], strict=True)
    groups = {label: {f"domain {k}": weight for k, weight in enumerate(row)} for label, row in rows}
    found = "" if routing["agreement"] is None else f"Agreement with the known factor {routing['agreement']:.1%}. "
    note = f"<p class=note>{found}Entropy {routing['entropy']:.3f} (0: one domain per image, 1: all alike).</p>"
    return bar_chart("Mean domain weights on procedural faces", "hard factor", "weight", groups, 1) + note + charts


def pose_chart(name: str, routing: dict[str, Any]) -> str:
    """Mean domain weights by how far the faces of a benchmark are turned."""
    bins = zip(routing["degrees"], routing["weights"], strict=True)
    groups = {
        f"{degrees}°": {f"domain {k}": weight for k, weight in enumerate(row)}
        for degrees, row in bins
        if row is not None
    }
    areas = ", ".join(f"domain {k} {area:.2f}" for k, area in enumerate(routing["auc"] or ()))
    note = f"<p class=note>Far turned or not, told by a domain's weight, AUC: {areas}.</p>" if areas else ""
    return bar_chart(f"Mean domain weights on {name}", "turned by", "weight", groups, 1) + note
