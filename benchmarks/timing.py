"""Interleaved timing of several ways to do one thing, and how the result is printed."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch


def interleave(steps: dict[str, Callable[[], object]], images: int, repetitions: int, warmup: int) -> dict[str, list]:
    """img/s of every repetition of each step. All are warmed up, then take turns, so that what disturbs the machine
    disturbs all alike; a repetition is one call."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    rates: dict[str, list] = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            synchronise()
            started = time.perf_counter()
            step()
            synchronise()
            rates[name].append(images / (time.perf_counter() - started))
    return rates


def peak_memory(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    """GB, 10^9 bytes, that a call of each step takes on the GPU beyond what lies there before; empty without one.

    Weights and moments of all contestants lie there: this is activations, gradients and what operators ask for.
    """
    peaks = {}
    if torch.cuda.is_available():
        for name, step in steps.items():
            synchronise()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            synchronise()
            peaks[name] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)
    return peaks


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> str:
    """Where and with what: processor or GPU, threads, torch, Python, date."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return (
        f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {date.today()}"
    )


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(rates: dict[str, list], groups: dict[str, list[str]], limit: float, peaks: dict[str, float]) -> str:
    """A table of medians with their spread, then one line of JSON.

    Ours are the names that begin with "vitface"; the fastest of them counts. `groups` maps "peers", "tuned_peers",
    "runtimes" to names in `rates`; a ratio is our median over that of the fastest in the group. `limit` is the img/s at
    which the model's products alone would run at the measured ceiling; `peaks` is of `peak_memory`.
    """
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ours = max((name for name in rates if name.startswith("vitface")), key=medians.__getitem__)
    width = max(map(len, rates))
    lines = [machine(), f"{'':<{width}}  img/s (min to max)        {ours} is   of the ceiling   peak GB"]
    for name in sorted(rates, key=lambda name: -medians[name]):
        spread = f"({min(rates[name]):.2f} to {max(rates[name]):.2f})"
        ratio, part = f"{medians[ours] / medians[name]:>6.2f} x", f"{medians[name] / limit:>12.1%}"
        lines.append(f"{name:<{width}}  {medians[name]:>6.2f} {spread:<18} {ratio} {part}   {peaks.get(name, '')}")
    summary: dict = {"vitface": round(medians[ours], 3), "ceiling_share": round(medians[ours] / limit, 4)}
    summary |= {"peak_gb": peaks.get(ours), "machine": machine()}
    for group, names in groups.items():
        summary[group] = {name: round(medians[name], 3) for name in names}
        fastest = max((medians[name] for name in names), default=None)
        ratio = None if fastest is None else round(medians[ours] / fastest, 3)
        summary[f"ratio_to_fastest_{group.removesuffix('s')}"] = ratio
    return "\n".join([*lines, json.dumps(summary)])
