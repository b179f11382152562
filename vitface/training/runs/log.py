"""What a run leaves to read: log.jsonl (every few steps and every epoch), log.csv (every epoch), optional trackers."""

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from vitface.config import TrainConfig
from vitface.files import replace_file


class RunLog:
    """Appends to the logs of a run directory. A resumed run first drops what was written after its step."""

    def __init__(self, run_dir: Path, config: TrainConfig, resumed_step: int = 0):
        self.jsonl, self.csv = run_dir / "log.jsonl", run_dir / "log.csv"
        epochs = [row for row in self._keep_until(resumed_step) if "holdout_auc" in row]
        self.csv.unlink(missing_ok=True)  # a copy of what log.jsonl says
        for row in epochs:
            self._append_csv(row)
        self.trackers = [*_wandb(run_dir, config), *_tensorboard(run_dir, config)]

    def _keep_until(self, step: int) -> list[dict]:
        lines = self.jsonl.read_text(encoding="utf-8", errors="replace").splitlines() if self.jsonl.exists() else []
        kept = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # a line torn by a kill; its step comes again
                continue
            if row["step"] <= step:
                kept.append(row)
        replace_file(self.jsonl, "".join(json.dumps(row) + "\n" for row in kept).encode())
        return kept

    def sync(self) -> None:
        """Waits until all rows are on the disk: a checkpoint is never newer than the log that leads to it."""
        with open(self.jsonl, "a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def step(self, **values: Any) -> None:
        with open(self.jsonl, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        for tracker in self.trackers:
            tracker(values)

    def epoch(self, **values: Any) -> None:
        self.step(**values)
        self._append_csv(values)

    def _append_csv(self, values: dict) -> None:
        new = not self.csv.exists()
        with open(self.csv, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(values))
            if new:
                writer.writeheader()
            writer.writerow(values)


def _wandb(run_dir: Path, config: TrainConfig) -> list:
    if not config.wandb:
        return []
    import wandb

    run = wandb.init(
        project="vitface",
        name=run_dir.name,
        id=run_dir.name,
        resume="allow",
        dir=str(run_dir),
        config=dataclasses.asdict(config),
    )
    return [lambda values: run.log(values, step=values["step"])]


def _tensorboard(run_dir: Path, config: TrainConfig) -> list:
    if not config.tensorboard:
        return []
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(run_dir / "tensorboard")

    def track(values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, values["step"])
        writer.flush()

    return [track]
