"""What a check finds, and the two measures that checks share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Finding:
    """`what` is wrong, in words and numbers, and what to `do`. A note is worth knowing but found in sound sets too."""

    name: str
    severity: Literal["error", "warning", "note"]
    what: str
    do: str


Findings = Iterator[Finding]


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """The probability that one of `above` is larger than one of `below`."""
    below = np.sort(below)
    wins = np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")
    return float(wins.mean() / 2 / len(below))
