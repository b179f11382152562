"""Contestants that take turns, each in a process of its own.

One process would not do: torch.compile shares graphs between models of one class, inductor has global switches, and a
contestant that runs out of memory must not end the others. So a benchmark starts itself again for each contestant, with
`--only NAME`: that process builds the contestant, compares its results with the reference, and then makes one
repetition for each line that it reads.

A group with more than two contestants begins with a heat: each runs alone, and the fastest two reach the final, in
which all groups take turns. On a GPU, whose memory would not hold all, each runs once, on its own: the groups in turn,
and of each the last one first, which is the compiled one. Each is printed when it is done, and none is begun after
`--minutes`.
"""

import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from timing import seconds, synchronise

WARMUP, HEAT, FINALISTS = 2, 3, 2
OVER = "the time was over"
PACKAGES = {"timm": "timm", "transformers": "transformers", "peft": "peft"}
PACKAGES |= {"openvino": "openvino", "onnxruntime": "onnx onnxruntime", "triton": "triton"}


@dataclass(frozen=True)
class Contestant:
    """`build` compares a contestant with the reference and returns a function that makes one repetition."""

    group: str  # vitface, packed, reference, peers, tuned_peers, runtimes
    dtype: str
    build: Callable[[], Callable[[], object]]
    needs: tuple[str, ...] = ()  # modules


@dataclass
class Results:
    """img/s of each repetition in the final, and in the heat of those that did not reach it."""

    final: dict[str, list[float]] = field(default_factory=dict)
    heat: dict[str, list[float]] = field(default_factory=dict)
    peak_gb: dict[str, float] = field(default_factory=dict)  # of a GPU
    left_out: dict[str, str] = field(default_factory=dict)  # and why


def serve(contestant: Contestant) -> None:
    """What the process of one contestant does: a line of JSON when it is ready, then the seconds of each repetition."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stdout
    step = contestant.build()
    for _ in range(WARMUP):
        step()
    print(json.dumps({"peak_gb": _peak_memory(step)}), file=channel)
    for _ in sys.stdin:
        print(seconds(step), file=channel)


def hold(
    command: list[str],
    contestants: dict[str, Contestant],
    images: int,
    repetitions: int,
    minutes: float = math.inf,
    on_gpu: bool = False,
) -> Results:
    """Runs all `contestants`; `command` is that of the benchmark without `--only`. SystemExit if all of ours fail."""
    results, entrants, end = Results(), [], time.monotonic() + 60 * minutes
    for name, contestant in contestants.items():
        missing = [module for module in contestant.needs if importlib.util.find_spec(module) is None]
        if missing:
            results.left_out[name] = f"pip install {' '.join(PACKAGES[module] for module in missing)}"
        else:
            entrants.append(name)
    if on_gpu:
        _one_by_one(command, contestants, entrants, images, repetitions, end, results)
    else:
        _heats_and_final(command, contestants, entrants, images, repetitions, results)
    for name in results.final:
        results.heat.pop(name, None)
    for name, why in results.left_out.items():
        print(f"{name}: left out, {why}", file=sys.stderr)
    ours = {name for name, contestant in contestants.items() if contestant.group == "vitface"}
    if not ours & (results.final.keys() | results.heat.keys()):
        raise SystemExit(f"{', '.join(ours)} failed")
    return results


def _one_by_one(
    command: list[str],
    contestants: dict[str, Contestant],
    entrants: list[str],
    images: int,
    repetitions: int,
    end: float,
    results: Results,
) -> None:
    groups: dict[str, list[str]] = {}
    for name in reversed(entrants):
        groups.setdefault(contestants[name].group, []).append(name)
    order = dict.fromkeys(name for row in itertools.zip_longest(*reversed(groups.values())) for name in row if name)
    for name in order:
        if time.monotonic() > end:
            results.left_out[name] = OVER
            continue
        _turns(command, [name], images, repetitions, results, results.final)
        if rates := results.final.get(name):
            spread = f"({min(rates):.1f} to {max(rates):.1f})"
            print(f"{name}: {statistics.median(rates):.1f} img/s {spread}", flush=True)


def _heats_and_final(
    command: list[str],
    contestants: dict[str, Contestant],
    entrants: list[str],
    images: int,
    repetitions: int,
    results: Results,
) -> None:
    for group in dict.fromkeys(contestants[name].group for name in entrants):
        names = [name for name in entrants if contestants[name].group == group]
        if len(names) > FINALISTS:
            for name in names:
                _turns(command, [name], images, HEAT, results, results.heat)
            names = sorted(set(names) & results.heat.keys(), key=lambda name: -statistics.median(results.heat[name]))
        entrants = [name for name in entrants if contestants[name].group != group] + names[:FINALISTS]
    _turns(command, entrants, images, repetitions, results, results.final)


def _turns(command: list[str], names: list[str], images: int, repetitions: int, results: Results, found: dict) -> None:
    with ExitStack() as stack:
        ready = {}
        for name in names:
            try:
                ready[name], results.peak_gb[name] = stack.enter_context(_process([*command, "--only", name]))
            except RuntimeError as error:
                results.left_out[name] = str(error)
        found |= {name: [] for name in ready}
        for _ in range(repetitions):
            for name, repetition in ready.items():
                found[name].append(images / repetition())


@contextmanager
def _process(command: list[str]) -> Iterator[tuple[Callable[[], float], float]]:
    """(a function that makes one repetition and returns its seconds, peak GB); RuntimeError if the process fails."""
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen([sys.executable, *command], **pipes) as process:

            def line() -> str:
                text = process.stdout.readline()
                if not text:
                    process.wait()
                    errors.seek(0)
                    raise RuntimeError((errors.read().strip().splitlines() or ["it ended without a word"])[-1])
                return text

            def repetition() -> float:
                process.stdin.write("\n")
                process.stdin.flush()
                return float(line())

            yield repetition, json.loads(line())["peak_gb"]
            process.stdin.close()


def _peak_memory(step: Callable[[], object]) -> float | None:
    """GB, 10^9 bytes, that a repetition takes on the GPU beyond what lies there before; None without one."""
    if not torch.cuda.is_available():
        return None
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    synchronise()
    return round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)


def report(results: Results, contestants: dict[str, Contestant], limits: dict[str, float], machine: str) -> str:
    """A table of medians with their spread, the finalists first, then one line of JSON.

    The fastest of ours counts, against the fastest of each group, whatever their dtypes. `limits`: by dtype the img/s
    at which the model's products alone would run at the measured ceiling.
    """
    rates = {**results.final, **results.heat}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    groups: dict[str, list[str]] = {}
    for name in sorted(rates, key=lambda name: -medians[name]):
        groups.setdefault(contestants[name].group, []).append(name)
    ours, width = groups["vitface"][0], max(map(len, rates))
    lines = [machine, f"{'':<{width}}  img/s (min to max)        {ours} is   of the ceiling   peak GB"]
    for name in sorted(rates, key=lambda name: (name in results.heat, -medians[name])):
        spread = f"({min(rates[name]):.2f} to {max(rates[name]):.2f})"
        share = f"{medians[name] / limits[contestants[name].dtype]:>12.1%}"
        notes = f"{results.peak_gb[name] or ''} {'heat' if name in results.heat else ''}".rstrip()
        row = f"{name:<{width}}  {medians[name]:>6.2f} {spread:<18} {medians[ours] / medians[name]:>6.2f} x {share}"
        lines.append(f"{row}   {notes}".rstrip())
    share = round(medians[ours] / limits[contestants[ours].dtype], 4)
    summary: dict = {"vitface": round(medians[ours], 3), "ceiling_share": share, "peak_gb": results.peak_gb[ours]}
    summary |= {"fastest": ours, "machine": machine, "left_out": results.left_out}
    for group, names in groups.items():
        if group != "vitface":
            summary[group] = {name: round(medians[name], 3) for name in names}
            summary[f"ratio_to_fastest_{group.removesuffix('s')}"] = round(medians[ours] / medians[names[0]], 3)
    return "\n".join([*lines, json.dumps(summary)])
