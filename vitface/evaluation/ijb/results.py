"""IJB results as text, and in the folder of a run."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from vitface.data.formats.published import IJB, MODES
from vitface.errors import CheckpointError, VitfaceError, command, in_one_line
from vitface.evaluation.ijb.scoring import FARS, RATES, Result
from vitface.evaluation.plots import Chart, line_chart
from vitface.files import json_bytes, read_json, replace_file

SURE = 30  # false accepts that decide a rate (Doddington's rule of 30)


def result_text(name: str, result: Result) -> str:
    """The counts; true accept rates in %, marked where few pairs decide; a line per gallery and their mean."""
    counts = ", ".join(f"{result[what]:,} {what}" for what in ("faces", "templates", "pairs", "same"))
    few = [round(far * (result["pairs"] - result["same"]), 6) < SURE for far in FARS]
    rates = [_percent(rate) + "*" * mark for rate, mark in zip(result["tar_at_far"].values(), few, strict=True)]
    lines = [f"{name} {result['mode']}: {counts}", _row("TAR at FAR", [*(f"{far:.0e}" for far in FARS), "AUC"])]
    lines.append(_row("1:1", [*rates, f"{result['auc']:.4f}"]))
    lines += [f"* fewer than {SURE} false accepts decide it"] if any(few) else []
    lines += [_row("1:N", [*RATES, "mated", "unmated"])] if result["searches"] else []
    for gallery, found in result["searches"].items():
        probes = [f"{found[kind]:,}" for kind in ("mated", "unmated") if kind in found]
        lines.append(_row(gallery, [*(_percent(found[rate]) for rate in RATES), *probes]))
    return "\n".join(lines)


def _row(name: str, cells: Iterable[str]) -> str:
    return f"{name:<12}" + "".join(f"{cell:>10}" for cell in cells)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def roc_of_templates(name: str, result: Result) -> Chart:
    """True accept rate over false accept rate of IJB's pairs, from 1e-6."""
    far, tar = np.array(result["roc"]).T
    return line_chart(f"{name}, 1:1", "false accept rate (log)", "true accept rate", {name: (far, tar)}, log_x=True)


def keep_result(run: Path, name: str, result: Result, model: str) -> None:
    """Adds it to NAME.json of a run, {"model": SHA-256, "results": {mode, "" without one: result}}, of one model."""
    file, results = run / f"{name}.json", {}
    with suppress(OSError, ValueError, KeyError, TypeError):
        written = read_json(file)
        results = dict(written["results"]) if written["model"] == model else {}
    replace_file(file, json_bytes({"model": model, "results": {**results, result.get("mode", ""): result}}))


def kept_results(run: Path, name: str) -> dict[str, Result]:
    """{mode: result} that a run kept; CheckpointError unless it is of the run's best checkpoint, its rates shares."""
    from vitface.store.faces import open_checkpoint

    file, again = run / f"{name}.json", command("evaluate", "--checkpoint", run, "--bench", name)
    fault = "is not of the run's best checkpoint"
    try:
        written = read_json(file)
        for mode, result in written["results"].items():
            shares = compared_rates(name, result).values()
            if mode not in ("", *MODES) or not all(share is None or 0 <= share <= 1 for share in shares):
                raise ValueError
        if not written["results"]:
            raise ValueError
        if written["model"] == open_checkpoint(run).sha256:
            return written["results"]
    except VitfaceError:
        raise
    except OSError:
        fault = "is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        fault = "is damaged"
    raise CheckpointError(f"{file} {fault}; evaluate the run again with\n  {again}")


def compared_rates(name: str, result: Result) -> dict[str, float | None]:
    """The shares by which runs are compared: TinyFace's ranks; of IJB, TAR at each of FARS and the means of RATES."""
    if name not in IJB:
        return {f"rank-{k}": share for k, share in result["rank"].items()}
    searched = result["searches"].get("mean", {})
    rates = {f"TAR@{far:.0e}": result["tar_at_far"][f"{far:g}"] for far in FARS}
    return rates | {rate: searched.get(rate) for rate in RATES}


def comparison_text(name: str, kept: Mapping[str, Mapping[str, Result]]) -> str:
    """A line per run and mode of {run: `kept_results`}: its `compared_rates`, in %."""
    rows = [(run, mode, compared_rates(name, result)) for run, of in kept.items() for mode, result in of.items()]
    lines = [f"{_row(mode, map(_percent, rates.values()))}  {in_one_line(run)}" for run, mode, rates in rows]
    return "\n".join([_row("", rows[0][2]), *lines])
