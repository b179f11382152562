"""Describe a file or folder of vitface: a run or checkpoint, a converted backbone, a gallery."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitface.commands.parser import CommandParser, add_shared, print_result
from vitface.errors import CheckpointError
from vitface.presets import VIT_ALIASES, VIT_PRESETS, backbone_name

if TYPE_CHECKING:
    from vitface.store.faces import Checkpoint

RESULT = ("accuracy", "std", "auc", "eer")
SHOWN = ("TAR@1e-04", "rank-1", "rank-5", "TPIR@0.01")  # of IJB and TinyFace; --json has all
EXAMPLES = """examples:
  vitface info                                     the newest run in runs/
  vitface info runs/a --json
  vitface info lvface_b                            a backbone, with its licence and thresholds
  vitface info weights/dinov2_vits14.safetensors
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument(
        "path", type=Path, nargs="?", metavar="CHECKPOINT", help="run, checkpoint, backbone file or gallery"
    )
    add_shared(parser, "--json")


def describe(path: Path) -> dict[str, Any]:
    """The contents of `path`, ready for JSON; the errors are those of reading that kind of file or folder."""
    from vitface.gallery.parts import is_gallery, part_files, read_names, read_settings
    from vitface.model.counts import parameter_counts
    from vitface.store.backbone import find_backbone
    from vitface.store.faces import meta_model, open_checkpoint
    from vitface.store.settings import log_faults, read_epochs

    if not path.exists() and str(path) in (*VIT_PRESETS, *VIT_ALIASES):
        path = find_backbone(backbone_name(str(path)))
    if path.is_file():
        return _backbone(path)
    if is_gallery(path):
        about = dataclasses.asdict(read_settings(path))
        folders = [folder for folder, _ in about.pop("folders")]
        about["written"] = max(map(_date, part_files(path)), default=None)
        return {"kind": "gallery", "images": len(read_names(path)), **about, "folders": folders}
    checkpoint = open_checkpoint(path)
    counts = parameter_counts(meta_model(checkpoint.config))
    of_manifest = {key: value for key, value in checkpoint.manifest.items() if isinstance(value, str | int)}
    epochs = read_epochs(checkpoint.run) if checkpoint.run else []
    for fault in log_faults(checkpoint.run) if checkpoint.run else ():
        print(f"note: {fault}", file=sys.stderr)
    settings = dataclasses.asdict(checkpoint.config)
    del settings["vit"]
    return {
        "kind": "checkpoint",
        "checkpoint": str(checkpoint.folder),
        **{key: of_manifest.get(key) for key in ("step", "vitface_version", "torch_version")},
        "written": _date(checkpoint.folder / "manifest.json"),
        "sha256": checkpoint.sha256,
        "data": _data(checkpoint),
        "benchmarks": _results(checkpoint),
        "settings": settings,
        "parameters": {part: {"total": total, "trained": trained} for part, (total, trained) in counts.items()},
        "thresholds": {f"{far:g}": threshold for far, threshold in checkpoint.thresholds.items()},
        "last_epoch": {name: value for name, value in epochs[-1].items() if value} if epochs else None,
    }


def _backbone(path: Path) -> dict[str, Any]:
    from vitface.store.backbone import read_backbone
    from vitface.store.faces import open_backbone
    from vitface.store.thresholds import source_text

    name, config, tensors, source = read_backbone(path)
    count = sum(tensor.numel() for tensor in tensors.values())
    about = {"kind": "backbone", "name": name, "parameters": count, **dataclasses.asdict(config), "source": source}
    calibration = open_backbone(name, path).calibration
    about["written"] = _date(path)
    return {**about, "calibration": calibration and {**calibration, "source": source_text(calibration)}}


def _date(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime).isoformat(" ", "minutes")


def _data(checkpoint: "Checkpoint") -> dict[str, Any]:
    """What it was trained on; {} for a bundle, which does not tell."""
    from vitface.training.runs.checkpoint import load_state

    if checkpoint.run is None:
        return {}
    written = (_noted(load_state, checkpoint.folder) or {"data": {}})["data"]
    counts = {name: written[name] for name in ("images", "people") if type(written.get(name)) is int}
    return {"train_data": checkpoint.settings.get("train_data"), **counts}


def _results(checkpoint: "Checkpoint") -> dict[str, dict[str, float | None]]:
    """{benchmark: rates} of this model, as its run kept them: RESULT of pairs, as they are and degraded, then
    `compared_rates` of IJB and TinyFace."""
    from vitface.data.formats.published import IJB
    from vitface.evaluation.benchmarks import kept_conditions
    from vitface.evaluation.ijb.results import compared_rates, kept_results
    from vitface.evaluation.scores import SCORES

    run, found = checkpoint.run, {}
    if run is None:
        return {}
    if (run / SCORES).is_file():
        found |= _scores(run / SCORES, checkpoint.sha256)
    for degraded in kept_conditions(run):
        results = _scores(run / degraded.scores, checkpoint.sha256)
        found |= {degraded.label(name): result for name, result in results.items()}
    for name in (*IJB, "tinyface"):
        if checkpoint.is_best and (run / f"{name}.json").is_file():
            results = _noted(kept_results, run, name) or {}
            found |= {f"{name} {mode}".strip(): compared_rates(name, result) for mode, result in results.items()}
    return found


def _scores(file: Path, sha256: str) -> dict[str, dict[str, float | None]]:
    """{benchmark: RESULT} of a file of scores, {} if they are another model's."""
    from vitface.evaluation.report import results_json
    from vitface.evaluation.scores import load_scores

    results, model = _noted(load_scores, file) or ({}, None)
    found = results_json(results) if model == sha256 else {}
    return {name: {key: result[key] for key in RESULT} for name, result in found.items()}


def _noted(read: Callable[..., Any], *arguments: Any) -> Any:
    """What `read` returns; None with a note to stderr if that is damaged or of another checkpoint."""
    try:
        return read(*arguments)
    except CheckpointError as error:
        print(f"note: {error}", file=sys.stderr)
    return None


def _result_text(result: dict[str, float | None]) -> str:
    """Accuracy and EER of pairs, or the rates SHOWN of a search, in %."""
    if "accuracy" not in result:
        shares = {rate: result[rate] for rate in SHOWN if rate in result}
        return ", ".join(f"{rate} {'-' if share is None else f'{100 * share:.2f} %'}" for rate, share in shares.items())
    accuracy, std, auc, eer = (result[key] for key in RESULT)
    spread = "" if std is None else f" ± {100 * std:.2f}"
    first = "no accuracy" if accuracy is None else f"accuracy {100 * accuracy:.2f}{spread} %"
    return f"{first}, AUC {auc:.4f}, EER {100 * (eer or 0):.2f} %"


def _lines(value: dict[str, Any], indent: str = "") -> list[str]:
    """Names and values, a line each; nested ones are indented."""
    lines = []
    for name, item in value.items():
        if isinstance(item, dict) and item.keys() == {"total", "trained"}:
            lines.append(f"{indent}{name:<18} {item['total']:>12,}, {item['trained']:,} of them trained")
        elif isinstance(item, dict) and (item.keys() == {*RESULT} or "rank-1" in item):
            lines.append(f"{indent}{name:<18} {_result_text(item)}")
        elif isinstance(item, dict) and item:
            lines += [f"{indent}{name}", *_lines(item, indent + "  ")]
        else:
            shown = f"{item:,}" if type(item) is int else "none" if item in (None, {}) else str(item)
            lines.append(f"{indent}{name:<{max(20 - len(indent), 1)}} {shown}")
    return lines


def run(arguments: argparse.Namespace) -> None:
    from vitface.commands.inputs import newest_run

    found = describe(arguments.path or newest_run())
    print_result(arguments, found, "\n".join(_lines(found)))
