"""IJB results as text, as JSON, and in the folder of a run."""

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitface.data.formats.published import MODES
from vitface.errors import CheckpointError, VitfaceError, command, in_one_line
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


def kept_results(run: Path, name: str) -> dict[str, dict[str, Any]]:
    """{mode: `result_json`} that a run kept; CheckpointError unless it is of the run's best checkpoint."""
    from vitface.store.faces import open_checkpoint

    file, again = run / f"{name}.json", command("evaluate", "--checkpoint", run, "--bench", name)
    try:
        written = read_json(file)
        for mode, entry in written["modes"].items():
            rates = [entry["tar_at_far"][f"{far:g}"] for far in FARS] + [*entry["mean_search"].values()]
            if mode not in MODES or not all(rate is None or 0 <= rate <= 1 for rate in rates):
                raise ValueError
        if written["model"] == open_checkpoint(run).sha256:
            return written["modes"]
        fault = "is not of the run's best checkpoint"
    except VitfaceError:
        raise
    except OSError:
        fault = "is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        fault = "is damaged"
    raise CheckpointError(f"{file} {fault}; evaluate the run again with\n  {again}")


def comparison_lines(kept: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """A line per run and mode of {run: `kept_results`}: TAR at each FAR, rank-1 and TPIR, in %."""
    searched = ["rank-1", *(f"TPIR at FPIR {far:g}" for far in FPIRS)]
    lines = [_row("", [*(f"{far:.0e}" for far in FARS), *(name.replace(" at FPIR ", "@") for name in searched)])]
    for run, modes in kept.items():
        for mode, entry in modes.items():
            found = [*entry["tar_at_far"].values(), *(entry["mean_search"].get(name) for name in searched)]
            cells = ["-" if rate is None else _percent(rate) for rate in found]
            lines.append(f"{_row(mode, cells)}  {in_one_line(run)}")
    return lines
