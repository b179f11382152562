"""The logs of a run: log.jsonl (every few steps and every epoch), log.csv (every epoch), W&B and TensorBoard."""

import csv
import dataclasses
import io
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from vitface.config import TrainConfig
from vitface.data.progress import Progress as Bar
from vitface.errors import raw
from vitface.files import open_regular, replace_file
from vitface.training.runs.checkpoint import Progress

Tracker = Callable[[dict[str, Any]], None]


class Curves(NamedTuple):
    """A chart for the trackers that draw: {name: (x, y)}, lists of numbers."""

    title: str
    x_label: str
    lines: dict[str, tuple[list[float], list[float]]]


class RunLog:
    """The logs of a run directory. A resumed run first drops the rows that were written after its step."""

    def __init__(self, run_dir: Path, config: TrainConfig, resumed_step: int = 0):
        self.jsonl, self.csv = run_dir / "log.jsonl", run_dir / "log.csv"
        self.epochs = [row for row in self._keep_until(resumed_step) if "holdout_auc" in row]
        self._write_csv()
        trackers = {"wandb": _wandb, "tensorboard": _tensorboard}
        self.trackers = [start(run_dir, config) for name, start in trackers.items() if getattr(config, name)]

    def _keep_until(self, step: int) -> list[dict]:
        data = b""
        with suppress(FileNotFoundError), open_regular(self.jsonl) as file:
            data = file.read()
        kept = []
        for line in data.decode("utf-8", errors="replace").splitlines():
            with suppress(ValueError, RecursionError):  # a kill cut this line off; its step is repeated
                row = json.loads(line)
                whole = isinstance(row, dict) and type(row.get("step")) is int
                kept += [row] if whole and row["step"] <= step else []
        replace_file(self.jsonl, "".join(json.dumps(row) + "\n" for row in kept).encode())
        return kept

    def sync(self) -> None:
        """Waits until all rows are on the disk: a checkpoint is never newer than the log that leads to it."""
        with open(self.jsonl, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def step(self, **values: Any) -> None:
        with open(self.jsonl, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        for track in self.trackers:
            track(values)

    def epoch(self, **values: Any) -> None:
        self.step(**values)
        self.epochs.append(values)
        self._write_csv()

    def results(self, values: Mapping[str, Any]) -> None:
        """Sends the final results, numbers and `Curves`, to the trackers, which end with them."""
        for track in self.trackers:
            track({"step": self.epochs[-1]["step"] if self.epochs else 0, **values, "final": 1})

    def _write_csv(self) -> None:
        """Writes the epochs' rows, which log.jsonl has too."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in self.epochs for name in row)))
        writer.writeheader()
        writer.writerows(self.epochs)
        replace_file(self.csv, text.getvalue().encode(errors="backslashreplace"))


def _wandb(run_dir: Path, config: TrainConfig) -> Tracker:
    import wandb

    settings, own = dataclasses.asdict(config), wandb_id(run_dir)
    sys.stdout, sys.stderr = raw(sys.stdout), raw(sys.stderr)  # W&B prints colours
    run = wandb.init(project="vitface", name=run_dir.name, id=own, resume="allow", dir=str(run_dir), config=settings)

    def track(values: dict[str, Any]) -> None:
        drawn = {
            name: wandb.plot.line_series(
                [x for x, _ in curves.lines.values()],
                [y for _, y in curves.lines.values()],
                keys=list(curves.lines),
                title=curves.title,
                xname=curves.x_label,
            )
            for name, curves in values.items()
            if isinstance(curves, Curves)
        }
        run.log({**values, **drawn}, step=values["step"])
        if "final" in values:
            run.finish()

    return track


def wandb_id(run_dir: Path) -> str:
    """The run's id for W&B, kept in its folder: two runs may have folders of one name."""
    path, kept = run_dir / "wandb-id.txt", ""
    with suppress(OSError), open_regular(path) as file:
        kept = file.read(1000).decode(errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,128}", kept, re.ASCII):
        if kept:
            print(f"note: {path} is damaged; the run gets a new id, and so a new page of W&B", file=sys.stderr)
        replace_file(path, (kept := secrets.token_hex(8)).encode())
    return kept


def _tensorboard(run_dir: Path, config: TrainConfig) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir / "tensorboard")

    def track(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, values["step"])
        writer.flush()

    return track


def epoch_bar(config: TrainConfig, progress: Progress, steps: int) -> Bar:
    """The bar of the current epoch, which has so many steps."""
    return Bar(
        initial=progress.steps_into_epoch,
        total=steps,
        desc=f"epoch {progress.epoch + 1}/{config.epochs}",
        unit_scale=config.batch_size,
        unit="img",
        leave=False,
        dynamic_ncols=True,
    )
