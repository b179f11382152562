"""The logs of a run: log.jsonl (every few steps and every epoch), log.csv (every epoch), W&B and TensorBoard."""

import csv
import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitface.config import TrainConfig
from vitface.files import replace_file

Tracker = Callable[[dict[str, Any]], None]


class RunLog:
    """The logs of a run directory. A resumed run first drops the rows that were written after its step."""

    def __init__(self, run_dir: Path, config: TrainConfig, resumed_step: int = 0):
        self.jsonl, self.csv = run_dir / "log.jsonl", run_dir / "log.csv"
        self.epochs = [row for row in self._keep_until(resumed_step) if "holdout_auc" in row]
        self._write_csv()
        trackers = {"wandb": _wandb, "tensorboard": _tensorboard}
        self.trackers = [start(run_dir, config) for name, start in trackers.items() if getattr(config, name)]

    def _keep_until(self, step: int) -> list[dict]:
        lines = self.jsonl.read_text(encoding="utf-8", errors="replace").splitlines() if self.jsonl.exists() else []
        kept = []
        for line in lines:
            with suppress(ValueError):  # a kill cut this line off; its step is repeated
                row = json.loads(line)
                kept += [row] if row["step"] <= step else []
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

    def _write_csv(self) -> None:
        """Writes the epochs' rows, which log.jsonl has too."""
        with open(self.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(name for row in self.epochs for name in row)))
            writer.writeheader()
            writer.writerows(self.epochs)


def _wandb(run_dir: Path, config: TrainConfig) -> Tracker:
    import wandb

    settings, name = dataclasses.asdict(config), run_dir.name
    run = wandb.init(project="vitface", name=name, id=name, resume="allow", dir=str(run_dir), config=settings)
    return lambda values: run.log(values, step=values["step"])


def _tensorboard(run_dir: Path, config: TrainConfig) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir / "tensorboard")

    def track(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, values["step"])
        writer.flush()

    return track
