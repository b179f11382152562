"""The finding of a check, and the decorator that makes a check of a function."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

MIN_PAIRS = 200  # fewer pairs do not show whether labels fit
Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """`what` is wrong, in words and numbers, in which `files`, if single ones are to blame, and what to `do`.

    A note is no fault: correct sets have it too.
    """

    name: str
    severity: Severity
    what: str
    do: str
    files: list[str] = field(default_factory=list)


What = str | tuple[str, list[str]] | None  # what is wrong, with the files concerned or without; None: nothing


def finds(severity: Severity, do: str) -> Callable[[Callable[..., What]], Callable[..., list[Finding]]]:
    """Makes a check of a function that returns what is wrong, or None: the check returns a `Finding` of its name."""

    def decorate(function: Callable[..., What]) -> Callable[..., list[Finding]]:
        @functools.wraps(function)
        def check(*data: Any) -> list[Finding]:
            found = function(*data)
            what, files = found if isinstance(found, tuple) else (found, [])
            return [Finding(function.__name__, severity, what, do, files)] if what else []

        return check

    return decorate


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Of the values of two arrays of one shape, -1 to 1; 0 where one of them is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])
