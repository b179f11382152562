"""Interleaved timing of several ways to do one thing, in one process; and where it was measured."""

import platform
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
            rates[name].append(images / seconds(step))
    return rates


def seconds(step: Callable[[], object]) -> float:
    """The time of one call, the work that it left to a GPU included."""
    synchronise()
    started = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - started


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
