"""How much of real training is the loader, and how long would 40 epochs of CASIA-WebFace take?

    python benchmarks/end_to_end.py [--seconds 60] [train.py's flags, e.g. --device cuda --batch-size 256]

Runs train.py's own loop on packed drawn faces (--train-data for others) with random weights: for so many seconds on
what the loader brings, read, copied and augmented, and as long on one batch that stays on the device. The two take
turns, a tenth of the time each. The last line is JSON.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

import torch
from data import jpeg_folder
from timing import machine, synchronise

from vitface.commands.parser import add_settings
from vitface.config import resolve
from vitface.data.formats.packing import pack
from vitface.training.batches import Ahead, Batch, rank_batches
from vitface.training.loop import Trainer
from vitface.training.setup import resolve_choices

IMAGES, EPOCHS = 494_149, 40  # CASIA-WebFace
TURNS, WARM_UP = 10, 5
DEFAULTS = dict(weights="random", val_data=None, holdout_people=0, epochs=1)


def endless(trainer: Trainer) -> Generator[Batch]:
    """Epoch after epoch, as the loop reads them."""
    for epoch in itertools.count():
        yield from rank_batches(trainer.config, trainer.data, trainer.model, epoch, range(trainer.data.steps_per_epoch))


def measure(trainer: Trainer, seconds: float) -> tuple[list[float], list[float]]:
    """img/s of each turn: on the loader's batches, on one batch."""
    loaded = Ahead(endless(trainer), trainer.device)
    first = next(loaded)
    fixed = Ahead((first for _ in itertools.count()), trainer.device)
    for batches in (loaded, fixed):
        for _ in range(WARM_UP):
            trainer._step(batches)
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for batches, found in zip((loaded, fixed), rates, strict=True):
            found.append(turn(trainer, batches, seconds / TURNS))
    return rates


def turn(trainer: Trainer, batches: Ahead, seconds: float) -> float:
    """img/s of as many steps as begin within `seconds`."""
    synchronise()
    started, steps = time.perf_counter(), 0
    while steps == 0 or time.perf_counter() - started < seconds:
        trainer._step(batches)
        steps += 1
    synchronise()
    return steps * trainer.config.batch_size / (time.perf_counter() - started)


def summary(loaded: list[float], fixed: list[float]) -> dict[str, float | str | None]:
    """The loader's cost is the share of a step's time that is gone without it."""
    rate, without = statistics.median(loaded), statistics.median(fixed)
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 3) if torch.cuda.is_available() else None
    return {
        "images_per_s": round(rate, 2),
        "images_per_s_one_batch": round(without, 2),
        "loader_cost": round(1 - rate / without, 4),
        "hours_of_40_epochs": round(EPOCHS * IMAGES / rate / 3600, 2),
        "peak_gb": peak,
        "machine": machine(),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of each of the two (default: 60)")
    add_settings(parser)
    given = vars(parser.parse_args(argv))
    seconds = given.pop("seconds")
    with tempfile.TemporaryDirectory() as folder:
        if "train_data" not in given:
            given["train_data"] = str(Path(folder) / "packed")
            pack(jpeg_folder(None, Path(folder) / "faces"), given["train_data"])
        trainer = Trainer(resolve_choices(resolve({**DEFAULTS, **given})), None)
        trainer.model.train()
        loaded, fixed = measure(trainer, seconds)
    found, config = summary(loaded, fixed), trainer.config
    print(machine())
    print(f"{config.backbone} at {config.image_size} px, batch {config.batch_size}, {config.dtype}")
    for name, rates in (("with the loader", loaded), ("on one batch", fixed)):
        print(f"{name:<16} {statistics.median(rates):>8.2f} img/s ({min(rates):.2f} to {max(rates):.2f})")
    print(
        f"the loader costs {found['loader_cost']:.1%} of a step; {EPOCHS} epochs of {IMAGES:,} images would take "
        f"{found['hours_of_40_epochs']} hours (estimated from these {seconds:.0f} s)"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
