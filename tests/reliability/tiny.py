"""A training run that takes milliseconds, and processes to kill."""

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import tiny_config
from ranks import in_ranks

from vitface.config import resolve
from vitface.data.counter import uniform
from vitface.data.formats.stored import Samples
from vitface.presets import VIT_PRESETS
from vitface.training import setup
from vitface.training.run import run

EPOCHS, STEPS_PER_EPOCH = 3, 4
TINY = dict(
    backbone="tiny",
    weights="random",
    image_size=32,
    train_data="memory",
    val_data=None,
    dtype="fp32",
    device="cpu",
    batch_size=8,
    epochs=EPOCHS,
    holdout_people=2,
    num_workers=0,
    embedding_dim=8,
    lora_rank=2,
    use_dalora=True,
    num_domains=2,
    router_depth=1,
    loss="adaface",
    head="bn",
)
LINEAR = dict(use_dalora=False, head="linear", loss="cosface")  # without anything that depends on the batch


class Faces(Samples):
    """10 people, 4 images each, of noise around the person's own: with 2 held out, an epoch is 4 batches of 8."""

    def __init__(self):
        self.labels = np.repeat(np.arange(10), 4)
        self.names = [str(i) for i in range(10)]

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        person, own = (uniform(112 * 112 * 3, key) for key in (int(self.labels[index]), 100 + index))
        return (255 * (0.5 * person + 0.5 * own)).astype(np.uint8).reshape(112, 112, 3)


def use_tiny(monkeypatch) -> None:
    """Makes the preset "tiny" known, and `Faces` what every run trains on."""
    monkeypatch.setitem(VIT_PRESETS, "tiny", tiny_config())
    monkeypatch.setattr(setup, "open_inputs", lambda config: Faces())


def settings(run_dir: Path, **changes):
    return resolve({**TINY, "save_dir": str(run_dir), **changes})


def train(run_dir, world=1, **changes):
    """A whole run on `world` ranks."""
    if world == 1:
        run(settings(run_dir, **changes))
    else:
        assert in_ranks(world, lambda rank: run(settings(run_dir, **changes))) == [0] * world
    return run_dir


def fingerprint(run_dir: Path) -> dict[str, str]:
    """SHA-256 of every file of the last checkpoint, where `best` points, and every line of the log but its speed."""
    last = run_dir / "checkpoints" / "last"
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in last.iterdir()}
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    log = json.dumps([{key: value for key, value in row.items() if key != "img_per_s"} for row in rows])
    return {**sums, "best": (run_dir / "checkpoints" / "best").resolve().name, "log": log}


def start(action: Callable[[], object]) -> int:
    """Runs `action` in a forked process; its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def in_child(action: Callable[[], object]) -> int:
    """Runs `action` in a forked process to its end: its exit code, or minus the signal that killed it."""
    _, status = os.waitpid(start(action), 0)
    return os.waitstatus_to_exitcode(status)
