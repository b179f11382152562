"""Same person or not: thresholds on disk, and the verdict of a cosine against one of them.

A run or a bundle has them in thresholds.json, {"model": SHA-256 of the trained tensors, "pairs": {"same", "different"},
"thresholds": {FAR: {"threshold": cosine, "tar": true accept rate} or {"refused": why}}}.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitface.errors import CheckpointError, ConfigError

THRESHOLDS_FILE = "thresholds.json"
FARS = (1e-2, 1e-3, 1e-4)  # the false accept rates that are calibrated and reported


def read_calibration(folder: Path, model: str) -> dict[str, Any] | None:
    """Reads {"pairs", "thresholds"} of the model with this SHA-256 from a folder's file, its numbers alone.

    None if there is no file, or if it is another model's or has no threshold. CheckpointError if it is damaged.
    """
    path = folder / THRESHOLDS_FILE
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        if written["model"] != model:
            return None
        found = {
            f"{float(far):g}": {"threshold": float(entry["threshold"]), "tar": float(entry["tar"])}
            for far, entry in written["thresholds"].items()
            if "threshold" in entry and float(far) in FARS
        }
        pairs = {kind: int(written["pairs"][kind]) for kind in ("same", "different")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged; delete it, the model works without") from None
    return {"pairs": pairs, "thresholds": found} if found else None


@dataclass(frozen=True)
class Verdict:
    """The cosine of two embeddings, `score` in [-1, 1], against the `threshold` for "same person".

    `threshold` is None where nothing was calibrated. `far` is its false accept rate on held-out people, None if the
    user named the threshold.
    """

    score: float
    threshold: float | None = None
    far: float | None = None

    @property
    def same(self) -> bool | None:
        """True for the same person, None without a threshold."""
        return None if self.threshold is None else self.score >= self.threshold

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
    if far not in thresholds:
        known = ", ".join(f"{known:g}" for known in sorted(thresholds)) or "none"
        raise ConfigError(f"no threshold was calibrated for a false accept rate of {far:g}; there is: {known}")
    return thresholds[far], far
