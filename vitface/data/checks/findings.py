"""The finding of a check, and the decorator that makes a check of a function."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

MIN_PAIRS = 200  # fewer pairs do not show whether labels fit
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """`what` is wrong, in words and numbers, and what to `do`. A note is no fault: correct sets have it too."""

    name: str
    severity: Severity
    what: str
    do: str


def finds(severity: Severity, do: str) -> Callable[[Callable[..., str | None]], Callable[..., list[Finding]]]:
    """Makes a check of a function that returns what is wrong, or None: the check returns a `Finding` of its name."""

    def decorate(function: Callable[..., str | None]) -> Callable[..., list[Finding]]:
        @functools.wraps(function)
        def check(*data: Any) -> list[Finding]:
            what = function(*data)
            return [Finding(function.__name__, severity, what, do)] if what else []

        return check

    return decorate


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])
