"""Reproduce published figures of a frozen backbone: are weights, preprocessing and protocol right?"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitface.commands.parser import CommandParser, add_shared, print_result
from vitface.config import FaceConfig
from vitface.data.formats.published import PAIRS, missing
from vitface.errors import DataError, WeightsError, command
from vitface.evaluation.benchmarks import available, evaluate_all
from vitface.evaluation.report import FIVE, average_of_five
from vitface.evaluation.statistics import wilson
from vitface.presets import backbone_name

if TYPE_CHECKING:
    from torch import Tensor

    from vitface.recogniser import Recogniser

# FRoundation (Chettaoui, Damer and Boutros 2025), without fine-tuning, at 224 px; CLIP's embedding is projected
PUBLISHED: dict[str, dict[str, float]] = {
    "clip_vitb16": {"lfw": 93.33, "cfp_fp": 88.86, "agedb_30": 74.67, "calfw": 77.13, "cplfw": 79.23, "average": 82.64},
    "dinov2_vits14": {"average": 64.70},
}
SIDE = 224
POSITIONS = "size"  # the rule of transformers, with which the figures were made
ROUNDED = 0.005  # points, of a figure with two decimals
EXAMPLES = """examples:
  vitface golden dinov2                                the fetched backbone, on data/lfw.bin, cfp_fp.bin, ...
  vitface golden clip --weights clip.safetensors       a file that vitface convert made of a whole CLIP
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("name", choices=["dinov2", "clip"], help="the backbone")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of lfw.bin, ... (default: data)")
    add_shared(parser, "--weights", "--device", "--json")


def run(arguments: argparse.Namespace) -> int:
    """Evaluates on those of FIVE that there are; 0 if each figure is within its tolerance, 1 if not."""
    from vitface.device import resolve_device

    names = [name for name in FIVE if name in available(arguments.data_dir)]
    if not names:
        raise DataError(f"no benchmark was found: {missing('lfw', arguments.data_dir)}")
    name = backbone_name(arguments.name)
    if set(PUBLISHED[name]) == {"average"} and len(names) < len(FIVE):
        absent = ", ".join(x for x in FIVE if x not in names)
        raise DataError(f"of {name} only the average of five was published, and {absent} not found; docs/benchmarks.md")
    model, projection = open_golden(name, arguments.weights)
    model.to(resolve_device(arguments.device)).prepare()
    evaluation = evaluate_all(lambda crops: project(model.embed(crops), projection), names, arguments.data_dir)
    measured = {key: 100 * result.accuracy for key, result in evaluation.results.items()}
    average = average_of_five(evaluation.results)
    rows = compare(PUBLISHED[name], measured | ({} if average is None else {"average": 100 * average}))
    problems = [*evaluation.alarms, *evaluation.failures]
    found = {"backbone": name, "rows": rows, "problems": problems}
    absent = [f"missing: {arguments.data_dir / x}.bin, so there is no average" for x in FIVE if x not in names]
    text = "\n".join([golden_text(name, rows), *absent, *(f"ALARM {problem}" for problem in problems)])
    print_result(arguments, found, text)
    return int(bool(evaluation.failures) or not all(row["within"] for row in rows))


def open_golden(name: str, weights: str | None) -> "tuple[Recogniser, Tensor | None]":
    """The frozen backbone at SIDE pixels, and the matrix (D, E) that projects its embeddings, None for DINOv2."""
    from vitface.model.face import FaceModel
    from vitface.model.positions import resample_pos_embed
    from vitface.recogniser import Recogniser
    from vitface.store.backbone import find_backbone, load_backbone, read_backbone, read_projection
    from vitface.store.faces import frozen_config

    path = Path(weights) if weights else find_backbone(name)
    vit = load_backbone(name, path, SIDE)
    assert vit.pos_embed is not None
    vit.pos_embed.data = resample_pos_embed(read_backbone(path)[2]["pos_embed"], vit.config.grid(SIDE), POSITIONS)
    projection = read_projection(path) if name.startswith("clip") else None
    if name.startswith("clip") and (projection is None or len(projection) != vit.config.embed_dim):
        again = command("convert", name, "--src", "FILE", "--out", path)
        raise WeightsError(
            f"{path} has no projection, and the figures of {name} are of projected embeddings. The file of a whole "
            f"CLIP has it, OpenAI's or another:\n  vitface fetch {name}\n  {again}"
        )
    face = frozen_config(FaceConfig(name, "golden", vit.config, SIDE, dtype="fp32"))
    return Recogniser(FaceModel(vit, face).eval()), projection


def project(rows: Any, projection: "Tensor | None") -> Any:
    """Embeddings (B, D) -> (B, E), of unit norm. The projection is linear, so it may follow the sum with the mirror
    image's embedding, and its normalisation."""
    import numpy as np

    if projection is None:
        return rows
    rows = rows @ projection.numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def compare(published: dict[str, float], measured: dict[str, float]) -> list[dict[str, Any]]:
    """A row per figure that was published and measured, in %: {"figure", "published", "measured", "tolerance",
    "within"}."""
    rows = []
    for key in (key for key in published if key in measured):
        allowed = tolerance(key, published[key])
        within = math.isclose(measured[key], published[key], rel_tol=0, abs_tol=allowed)
        figures = {"published": published[key], "measured": measured[key], "tolerance": allowed, "within": within}
        rows.append({"figure": key} | figures)
    return rows


def tolerance(figure: str, published: float) -> float:
    """Points by which a figure in % may differ: half the 95 % interval of such an accuracy on as many pairs, and what
    rounding took from it."""
    pairs = sum(PAIRS[name] for name in FIVE) if figure == "average" else PAIRS[figure]
    low, high = wilson(published / 100, pairs)
    return 50 * (high - low) + ROUNDED


def golden_text(name: str, rows: list[dict[str, Any]]) -> str:
    """A table and what it shows."""
    lines = [f"{name}, frozen, {SIDE} px, beside FRoundation's figures", f"{'':<12}published  measured  difference"]
    for row in rows:
        mark = "within" if row["within"] else "NOT within"
        figures = f"{row['published']:>9.2f}{row['measured']:>10.2f}{row['measured'] - row['published']:>+12.2f}"
        lines.append(f"{row['figure']:<12}{figures}  {mark} {row['tolerance']:.2f}")
    if rows and all(row["within"] for row in rows):
        return "\n".join([*lines, "reproduced: weights, preprocessing and protocol are those of the publication"])
    return "\n".join([*lines, "not reproduced: are the .bin files InsightFace's, and the weights the published ones?"])
