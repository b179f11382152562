"""Reproduce published figures of a frozen backbone: are weights, preprocessing and protocol right?"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitface.commands.parser import CommandParser, add_shared, print_result
from vitface.config import FaceConfig
from vitface.data.formats.published import missing
from vitface.errors import ConfigError, DataError, WeightsError
from vitface.evaluation.benchmarks import available, evaluate_all
from vitface.evaluation.report import FIVE, average_of_five
from vitface.presets import VIT_PRESETS, ViTConfig, backbone_name

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
TOLERANCE, OF_AVERAGE = 1.0, 0.5  # points, by which another resize and JPEG decoder may differ: docs/benchmarks.md
EXAMPLES = """examples:
  vitface golden dinov2                                the fetched backbone, on data/lfw.bin, cfp_fp.bin, ...
  vitface golden clip --src ViT-B-16.pt                OpenAI's file, which holds the projection too
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("name", choices=["dinov2", "clip"], help="the backbone")
    parser.add_argument("--src", type=Path, metavar="FILE", help="its original file, instead of the converted one")
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
    model, projection = open_golden(name, arguments.src, arguments.weights)
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


def open_golden(name: str, src: Path | None, weights: str | None) -> "tuple[Recogniser, Tensor | None]":
    """The frozen backbone at SIDE pixels, and the matrix (D, E) that projects its embeddings, None for DINOv2."""
    from vitface.model.face import FaceModel
    from vitface.model.vit import ViT
    from vitface.recogniser import Recogniser
    from vitface.store.backbone import resample_pos_embed
    from vitface.store.faces import frozen_config

    if src is not None and weights is not None:
        raise ConfigError("--src is the original file, --weights a converted one: name one of them")
    config, tensors, projection = _from_source(name, src) if src else (*_converted(name, weights), None)
    config = dataclasses.replace(config, pos_interp=POSITIONS)
    tensors["pos_embed"] = resample_pos_embed(tensors["pos_embed"], config.grid(SIDE), POSITIONS)
    vit = ViT(config, SIDE)
    vit.load_state_dict(tensors)
    face = frozen_config(FaceConfig(name, "golden", config, SIDE, dtype="fp32"))
    return Recogniser(FaceModel(vit, face).eval()), projection


def _from_source(name: str, src: Path) -> "tuple[ViTConfig, dict[str, Tensor], Tensor | None]":
    from vitface.files import sha256_file
    from vitface.weights.conversion import map_tensors, read_source

    if not src.is_file():
        raise WeightsError(f"{src}: no such file")
    state = read_source(src, sha256_file(src))
    _, config, tensors, _ = map_tensors(src, state, name, VIT_PRESETS[name])
    return config, tensors, find_projection(src, state) if name.startswith("clip") else None


def _converted(name: str, weights: str | None) -> "tuple[ViTConfig, dict[str, Tensor]]":
    """ConfigError for CLIP: a converted file has no projection."""
    from vitface.store.backbone import expected_tensors, find_backbone, read_backbone
    from vitface.store.tensors import first_fault
    from vitface.weights.sources import SOURCES

    if name.startswith("clip"):
        source = SOURCES[name]
        raise ConfigError(
            f"the figures of {name} are of projected embeddings, and a converted file has no projection: name the "
            f"original with --src FILE; it is {source.url}\n(sha256 {source.sha256}), or {source.timm}'s safetensors"
        )
    path = Path(weights) if weights else find_backbone(name)
    stored, config, tensors, _ = read_backbone(path)
    if fault := first_fault(tensors, expected_tensors(config), exact_dtype=False) or (stored != name and stored):
        raise WeightsError(f"{path} is no whole {name}: {fault}")
    return config, tensors


def find_projection(src: Path, state: "dict[str, Tensor]") -> "Tensor":
    """CLIP's projection (D, E), float32, under the names of OpenAI and open_clip, transformers and timm."""
    for key, tensor in state.items():
        if key in ("visual.proj", "proj"):
            return tensor.float()
        if key in ("visual_projection.weight", "head.weight"):
            return tensor.float().T
    raise WeightsError(f"{src} has the vision tower without its projection; take the file of the whole CLIP model")


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
        tolerance = OF_AVERAGE if key == "average" else TOLERANCE
        within = math.isclose(measured[key], published[key], rel_tol=0, abs_tol=tolerance)
        figures = {"published": published[key], "measured": measured[key], "tolerance": tolerance, "within": within}
        rows.append({"figure": key} | figures)
    return rows


def golden_text(name: str, rows: list[dict[str, Any]]) -> str:
    """A table and what it shows."""
    lines = [f"{name}, frozen, {SIDE} px, beside FRoundation's figures", f"{'':<12}published  measured  difference"]
    for row in rows:
        mark = "within" if row["within"] else "NOT within"
        figures = f"{row['published']:>9.2f}{row['measured']:>10.2f}{row['measured'] - row['published']:>+12.2f}"
        lines.append(f"{row['figure']:<12}{figures}  {mark} {row['tolerance']:g}")
    if rows and all(row["within"] for row in rows):
        return "\n".join([*lines, "reproduced: weights, preprocessing and protocol are those of the publication"])
    return "\n".join([*lines, "not reproduced: are the .bin files InsightFace's, and the weights the published ones?"])
