"""Same person or not: thresholds on disk, and the verdict of a cosine against one of them.

A run or a bundle has them in thresholds.json, {"model": SHA-256 of the trained tensors, "pairs": {"same", "different"},
"thresholds": {FAR: {"threshold": cosine, "tar": true accept rate} or {"refused": why}}}; a frozen backbone has them in
NAME.thresholds.json beside its file. "source" names the pairs, where they are not those of people held out of training.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from vitface.errors import CheckpointError, ConfigError, EvaluationError, expect
from vitface.files import read_json
from vitface.metrics import far_threshold

THRESHOLDS_FILE = "thresholds.json"
FARS = (1e-2, 1e-3, 1e-4)  # the false accept rates that are calibrated and reported


def calibrate_scores(score: np.ndarray, issame: np.ndarray) -> tuple[dict[str, Any], list[str]]:
    """({"pairs", "thresholds"} from the cosines (M,) of pairs and their labels, the same in words, a line per FAR)."""
    pairs = {"same": int(issame.sum()), "different": int((~issame).sum())}
    thresholds: dict[str, dict[str, float | str]] = {}
    lines = []
    for far in FARS:
        try:
            threshold, tar = far_threshold(score, issame, far)
            thresholds[f"{far:g}"] = {"threshold": threshold, "tar": tar}
            lines.append(f"  FAR {far:g}: {threshold:.4f}, accepts {100 * tar:.2f} % of same pairs")
        except EvaluationError as error:
            thresholds[f"{far:g}"] = {"refused": str(error)}
            lines.append(f"  FAR {far:g}: not enough pairs ({error})")
    return {"pairs": pairs, "thresholds": thresholds}, lines


def source_text(calibration: Mapping[str, Any]) -> str:
    """Where the thresholds are from: "lfw, 3,000 same and 3,000 different pairs"."""
    same, different = (f"{calibration['pairs'][kind]:,}" for kind in ("same", "different"))
    return f"{calibration.get('source', 'people held out of training')}, {same} same and {different} different pairs"


def read_calibration(folder: Path, model: str, name: str = THRESHOLDS_FILE) -> dict[str, Any] | None:
    """Reads {"pairs", "thresholds"} of the model with this SHA-256 from a folder's file, its numbers alone; and the
    "source", if it has one.

    None if there is no file, or if it is another model's or has no threshold. CheckpointError if it is damaged.
    """
    path = folder / name
    try:
        written = read_json(path)
        if written["model"] != model:
            return None
        found = {
            f"{float(far):g}": {"threshold": number(entry["threshold"], -1), "tar": number(entry["tar"], 0)}
            for far, entry in written["thresholds"].items()
            if "threshold" in entry and float(far) in FARS
        }
        pairs = {kind: int(number(written["pairs"][kind], 0, 1e15)) for kind in ("same", "different")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path} is damaged; put a copy back or delete it: without it, pass --threshold"
        ) from None
    source = written.get("source")
    named = isinstance(source, str) and re.fullmatch(r"[\w .()-]{1,80}", source)
    return {"pairs": pairs, "thresholds": found, **({"source": source} if named else {})} if found else None


def number(value: Any, least: float, most: float = 1.0) -> float:
    """`value`, read from a file, if it is a number from `least` to `most`; else ValueError."""
    if type(value) not in (int, float) or not least <= value <= most:
        raise ValueError(f"{str(value)[:40]} is no number from {least:g} to {most:g}")
    return float(value)


@dataclass(frozen=True)
class Verdict:
    """The cosine of two embeddings, `score` in [-1, 1], against the `threshold` for "same person".

    `threshold` is None where nothing was calibrated. `far` is its false accept rate on held-out people, None if the
    user named the threshold. In an `if` it is `same`; ConfigError there without a threshold.
    """

    score: float
    threshold: float | None = None
    far: float | None = None

    @property
    def same(self) -> bool | None:
        """True for the same person, None without a threshold."""
        return None if self.threshold is None else self.score >= self.threshold

    def __bool__(self) -> bool:
        if self.same is None:
            raise ConfigError("without a threshold there is no verdict: calibrate the model, or compare its score")
        return self.same

    @property
    def far_in_words(self) -> str:
        """The false accept rate of the threshold, also as one in how many pairs."""
        if self.far is not None:
            return f"FAR {self.far:g}: 1 in {round(1 / self.far):,} pairs of different people passes for the same"
        return "no threshold was calibrated" if self.threshold is None else "your own threshold, its FAR is not known"

    def __str__(self) -> str:
        if self.threshold is None:
            return f"no verdict: cosine {self.score:.4f}, {self.far_in_words}"
        side = ("same person", ">=") if self.same else ("different people", "<")
        return f"{side[0]}: cosine {self.score:.4f} {side[1]} {self.threshold:.4f} ({self.far_in_words})"


def choose_threshold(
    thresholds: Mapping[float, float], far: float | None = None
) -> tuple[float, float] | tuple[None, None]:
    """(threshold, FAR) for one of the calibrated false accept rates, by default the lowest; (None, None) without any.

    `thresholds` is {FAR: cosine}. ConfigError for a `far` that was not calibrated.
    """
    if far is None and not thresholds:
        return None, None
    far = min(thresholds) if far is None else far
    expect(isinstance(far, Real) and not isinstance(far, bool), "far", far, "a false accept rate, such as 0.001")
    far = next((known for known in thresholds if math.isclose(far, known, rel_tol=1e-6)), far)
    if far not in thresholds:
        known = ", ".join(f"{known:g}" for known in sorted(thresholds)) or "none"
        raise ConfigError(f"no threshold was calibrated for a false accept rate of {far:g}; there is: {known}")
    return thresholds[far], far
