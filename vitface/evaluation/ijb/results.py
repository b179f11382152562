"""IJB results as text, as JSON, and in the folder of a run."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitface.evaluation.ijb.scoring import FARS, FPIRS, RANKS, TemplateResult
from vitface.files import json_bytes, read_json, replace_file

SURE = 30  # false accepts that decide a rate (Doddington's rule of 30)


def mean_search(result: TemplateResult) -> dict[str, float]:
    """{"rank-1": ..., "TPIR at FPIR 0.01": ...}, the means over the two galleries, as papers give them; {} without."""
    if not result.searches:
        return {}
    ranks = {f"rank-{k}": [found.rank[k] for found in result.searches] for k in RANKS}
    tpirs = {f"TPIR at FPIR {far:g}": [found.tpir[far] for found in result.searches] for far in FPIRS}
    return {name: sum(values) / len(values) for name, values in (ranks | tpirs).items()}


def is_sure(result: TemplateResult, far: float) -> bool:
    """Whether enough false accepts decide the rate at a FAR."""
    return round(far * (result.counts["pairs"] - result.counts["same"]), 6) >= SURE


def result_text(result: TemplateResult) -> str:
    """The counts; true accept rates in %, marked where few pairs decide; a line per gallery and their mean."""
    counts = ", ".join(f"{count:,} {what}" for what, count in result.counts.items())
    rates = [f"{_percent(result.tar[far])}{'' if is_sure(result, far) else '*'}" for far in FARS]
    lines = [f"{result.name} {result.mode}: {counts}", _row("TAR at FAR", [f"{far:.0e}" for far in FARS] + ["AUC"])]
    lines.append(_row("1:1", [*rates, f"{result.auc:.4f}"]))
    if not all(is_sure(result, far) for far in FARS):
        lines.append(f"* fewer than {SURE} false accepts decide it")
    if result.searches:
        head = [f"rank-{k}" for k in RANKS] + [f"TPIR@{far:g}" for far in FPIRS]
        lines.append(_row("1:N", [*head, "mated", "unmated"]))
        for found in result.searches:
            values = [_percent(value) for value in (*found.rank.values(), *found.tpir.values())]
            lines.append(_row(found.gallery.rpartition("_")[2], [*values, f"{found.mated:,}", f"{found.unmated:,}"]))
        lines.append(_row("mean", [_percent(value) for value in mean_search(result).values()]))
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells)


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def result_json(result: TemplateResult) -> dict[str, Any]:
    """{"mode", "faces", "templates", "pairs", "same", "tar_at_far", "auc", "mean_search", "searches"}; None for a TPIR
    without unmated probes."""
    searches = [
        {
            "gallery": found.gallery,
            "mated": found.mated,
            "unmated": found.unmated,
            "rank": {str(k): share for k, share in found.rank.items()},
            "tpir_at_fpir": {f"{far:g}": _number(share) for far, share in found.tpir.items()},
        }
        for found in result.searches
    ]
    return {
        "mode": result.mode,
        **result.counts,
        "tar_at_far": {f"{far:g}": share for far, share in result.tar.items()},
        "auc": result.auc,
        "mean_search": {name: _number(value) for name, value in mean_search(result).items()},
        "searches": searches,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def keep_result(run: Path, result: TemplateResult, model: str) -> None:
    """Writes ijbb.json or ijbc.json of a run: {"model", "modes": {mode: `result_json`}}, of one model, the SHA-256."""
    file, modes = run / f"{result.name}.json", {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        written = read_json(file)
        modes = dict(written["modes"]) if written["model"] == model else {}
    replace_file(file, json_bytes({"model": model, "modes": {**modes, result.mode: result_json(result)}}))
