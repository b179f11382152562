"""The table of docs/reliability.md as data: what is done to the project, how often, and what must come of it.

`python tests/reliability/matrix.py` prints the table; a test compares it with the document, and every test of a row
runs exactly the counts given here and notes them (`ran`).
"""

from typing import NamedTuple

import pytest


class Cases(NamedTuple):
    asked: str  # that the project set out to run
    small: int  # in `python -m pytest`
    full: int  # in `python -m pytest -m slow`


class Row(NamedTuple):
    fault: str
    cases: Cases
    outcome: str


# What reading a file may take, MB of memory and seconds of a core: for each MB of the file, and for any file, or image
EACH, ANY, PICTURE = (100, 4), (96, 2), (1024, 8)
HOSTILE = "; nothing is executed, memory stays bounded"
ROWS = {
    "kill saving": Row(
        "SIGKILL at random instants while saving",
        Cases("400", 20, 400),
        "the newest verified checkpoint loads, no acknowledged step is lost",
    ),
    "power loss": Row(
        "power loss: prefixes of the recorded operations; what was not fsynced kept, lost, zeroed or reordered",
        Cases("120", 120, 600),
        "the old or the new checkpoint, never a bad one; the control without fsync loses steps",
    ),
    "failpoints": Row(
        "a fault at each operation of a save: SIGKILL, SIGTERM, Ctrl-C, ENOSPC, EIO, MemoryError",
        Cases("96", 24, 156),
        "the earlier checkpoints are intact, the message is clear, the next save works",
    ),
    "kill training": Row(
        "SIGKILL of the training process at step k, before the update or in a save; then resume",
        Cases("24", 4, 24),
        "all files of the last checkpoint, `best` and the log equal those of an unbroken run",
    ),
    "mutated controls": Row(
        "control: one item of the saved state changed before resuming",
        Cases("12", 4, 12),
        "the comparison fails for each item",
    ),
    "damage": Row(
        "flipped bits, zeroed tails, truncated, missing and swapped files, swapped steps, stale manifests",
        Cases("1,000", 100, 1000),
        "named error, the step before is taken",
    ),
    "on and off": Row(
        "workers 0, 1, 2; evaluation, saving and logging on and off; global random states disturbed",
        Cases("13", 7, 13),
        "identical training",
    ),
    "safetensors": Row(
        "mutated safetensors headers and adapter files",
        Cases("50,000", 1000, 50_000),
        "named error and the model untouched, or a valid file of exactly its tensors",
    ),
    "bin": Row("mutated .bin files", Cases("20,000", 500, 20_000), "named error or a valid set" + HOSTILE),
    "rec": Row("mutated .rec and .idx files", Cases("20,000", 500, 20_000), "named error or valid samples" + HOSTILE),
    "images": Row(
        "mutated JPEG, PNG and WebP images", Cases("5,000", 200, 5000), "named error or a valid image" + HOSTILE
    ),
    "bundles": Row(
        "mutated models with their backbone and thresholds, half of them sealed again",
        Cases("20,000", 300, 20_000),
        "named error or a model of finite embeddings and thresholds in range" + HOSTILE,
    ),
    "PEFT": Row(
        "mutated PEFT folders", Cases("-", 300, 5000), "named error or finite adapters that fit the backbone" + HOSTILE
    ),
    "galleries": Row(
        "mutated galleries", Cases("20,000", 300, 20_000), "named error or named rows of unit norm" + HOSTILE
    ),
    "packed": Row(
        "mutated packed folders, half of them sealed again",
        Cases("20,000", 300, 20_000),
        "named error or images whose labels have names" + HOSTILE,
    ),
    "scores": Row(
        "mutated scores.safetensors", Cases("20,000", 300, 20_000), "named error or scores of whole folds" + HOSTILE
    ),
    "pair lists": Row(
        "mutated pair lists of every published form",
        Cases("20,000", 300, 20_000),
        "named error or a valid set" + HOSTILE,
    ),
    "tables": Row(
        "mutated align.csv, landmarks, domain labels and logs of a run",
        Cases("20,000", 300, 20_000),
        "named error or numbers in range; a damaged line of a log or a report is left out" + HOSTILE,
    ),
    "writers": Row(
        "rounds in which three processes keep scores in one file",
        Cases("500", 20, 500),
        "each finds its own after each round; in the end all are there, and nothing else",
    ),
    "amplifiers": Row(
        "small files that ask for the most: thousands of scans and segments, shared ends, claimed sizes, deep nesting",
        Cases("-", 53, 106),
        f"memory of at most {EACH[0]} bytes and {EACH[1] * 1000 / 1024:.0f} us of a core for each byte, above "
        f"{ANY[0]} MB and {ANY[1]} s; an image {PICTURE[0]} MB and {PICTURE[1]} s, however small its file",
    ),
    "non-finite": Row(
        "NaN or infinity injected at step k: pixels, activation, loss, gradient, parameter",
        Cases("30", 10, 30),
        "stops before the update, parameters unchanged, a file says where",
    ),
    "infinity on a rank": Row(
        "infinity in the loss or the gradient of one rank of 2 and 4",
        Cases("3", 2, 6),
        "all ranks stop before the update and name it; resumed, the run is bit for bit as without; "
        "the control without agreement parts the ranks",
    ),
    "lost ranks": Row(
        "SIGKILL or SIGSTOP to one of 2 and 4 ranks: in a pass, an update, a save, an evaluation, reading",
        Cases("12", 1, 12),
        "the others end in an error that names it; resumed, the run is bit for bit as without",
    ),
    "secrets": Row("planted secrets x sinks", Cases("12 x 6", 72, 72), "none is found"),
}


def sizes(row: str) -> pytest.MarkDecorator:
    """Parametrises a test with `cases`: the small count by default, the full one if it differs with -m slow."""
    _, small, full = ROWS[row].cases
    counts = [small] if small == full else [small, pytest.param(full, marks=pytest.mark.slow)]
    return pytest.mark.parametrize("cases", counts)


def table() -> str:
    """The Markdown table of docs/reliability.md."""
    lines = [
        "| fault or input | asked for | `pytest` | `pytest -m slow` | outcome, asserted |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {fault} | {asked} | {small:,} | {full:,} | {outcome} |"
        for fault, (asked, small, full), outcome in ROWS.values()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
