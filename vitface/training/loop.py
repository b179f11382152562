"""The training loop: samples -> batches -> steps -> checkpoints, then one evaluation of the best epoch.

The best epoch is chosen on held-out training people (AUC over their pairs), never on a benchmark. Everything random is
a function of (seed, epoch, index), so a run resumed from any step continues as if it had not stopped.
"""

import dataclasses
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vitface.config import TrainConfig
from vitface.data.augment import augment, uniforms
from vitface.data.loader import epoch_order, read_batches, split_people
from vitface.data.preprocess import to_float
from vitface.errors import ConfigError
from vitface.evaluation.verify import auc
from vitface.model.store import trained_tensors
from vitface.training import setup
from vitface.training.checkpoint import load_training, save_checkpoint
from vitface.training.log import RunLog
from vitface.training.step import parameter_groups, schedule, total_loss, update

LOG_EVERY = 10
HOLDOUT_IMAGES = 2000


@dataclasses.dataclass
class Progress:
    """What a checkpoint counts: `step` steps are done; the best epoch so far by held-out AUC."""

    step: int = 0
    best_epoch: int = 0
    best_auc: float = -1.0
    finished: bool = False


class Trainer:
    """One run. `config` is resolved (see `setup.resolve_choices`); `run_dir` None writes nothing."""

    def __init__(self, config: TrainConfig, run_dir: Path | None):
        self.config, self.run_dir = config, run_dir
        self.device = torch.device(config.device)
        self.samples = setup.open_inputs(config)
        self.split = split_people(self.samples, config.holdout_people, config.max_samples, config.seed)
        if len(self.split.indices) < config.batch_size:
            raise ConfigError(
                f"{len(self.split.indices)} training images do not fill one --batch-size {config.batch_size}"
            )
        self.steps_per_epoch = len(self.split.indices) // config.batch_size
        if config.limit_batches is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, config.limit_batches)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.model, self.margin = setup.build_model(config, self.split.num_people)
        groups = parameter_groups(self.model, self.margin, config)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=self.device.type in ("cpu", "cuda"))
        self.forward: torch.nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore
        self.progress = Progress()

    def header(self) -> str:
        """What is printed before the first step: config, data, machine, parameters, estimated time."""
        config, split = self.config, self.split
        settings = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(config).items() if value is not None)
        seconds = setup.seconds_per_step(self.model, self.margin, config)
        remaining = seconds * (self.total_steps - self.progress.step)
        return "\n".join(
            [
                textwrap.fill(f"config: {settings}", width=110, subsequent_indent="        "),
                f"data: {len(split.indices):,} images of {split.num_people:,} people to train on, "
                f"{len(split.held_out):,} images of other people held out",
                f"device: {config.device}, {config.dtype}, adapted layers: {config.impl}",
                setup.parameter_table(self.model, self.margin),
                f"estimated time: {remaining / 60:.1f} min for {self.total_steps - self.progress.step:,} steps "
                f"({config.batch_size / seconds:,.0f} img/s before reading and augmenting)",
            ]
        )

    def fit(self, log: RunLog | None) -> None:
        """Runs from the current step to the end, or until `patience` epochs brought no better held-out AUC."""
        for epoch in range(self.progress.step // self.steps_per_epoch, self.config.epochs):
            started, first = time.perf_counter(), self.progress.step
            try:
                loss = self._epoch(epoch, log)
            except KeyboardInterrupt:
                self._save(is_best=False)
                raise
            rate = (self.progress.step - first) * self.config.batch_size / (time.perf_counter() - started)
            score = self.holdout_auc()
            is_best = score >= self.progress.best_auc
            if is_best:
                self.progress.best_epoch, self.progress.best_auc = epoch + 1, score
            stop = 0 < self.config.patience <= epoch + 1 - self.progress.best_epoch
            self.progress.finished = stop or epoch + 1 == self.config.epochs
            tqdm.write(
                f"epoch {epoch + 1}/{self.config.epochs}  loss {loss:.3f}  held-out AUC {score:.4f}"
                f"{' (best)' if is_best else ''}  {rate:,.0f} img/s"
            )
            if log is not None:
                log.epoch(
                    step=self.progress.step, epoch=epoch + 1, loss=loss, holdout_auc=score, img_per_s=round(rate, 1)
                )
            self._save(is_best)
            if stop:
                return

    def _epoch(self, epoch: int, log: RunLog | None) -> float:
        config, losses = self.config, []
        self.model.train()
        bar = tqdm(
            self._batches(epoch), initial=self.progress.step % self.steps_per_epoch, total=self.steps_per_epoch,
            desc=f"epoch {epoch + 1}/{config.epochs}", unit_scale=config.batch_size, unit="img", leave=False,
            dynamic_ncols=True,
        )  # fmt: skip
        for images, labels, domains in bar:
            factor = schedule(self.progress.step, self.total_steps, round(config.warmup_epochs * self.steps_per_epoch))
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            parts = total_loss(self.forward, self.margin, images, labels, domains, config)
            norm = update(self.optimizer, parts["loss"], self.trained, config.clip)
            self.progress.step += 1
            values = {name: part.item() for name, part in parts.items()}
            losses.append(values["loss"])
            bar.set_postfix(loss=f"{values['loss']:.2f}")
            if log is not None and self.progress.step % LOG_EVERY == 0:
                log.step(step=self.progress.step, epoch=epoch + 1, lr=config.lr * factor, grad_norm=norm, **values)
        return float(np.mean(losses)) if losses else float("nan")

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """What is left of the epoch: normalised images (B, 3, S, S), labels (B,), domains (B,) or None."""
        config, split = self.config, self.split
        order = epoch_order(len(split.indices), config.seed, epoch)
        positions = [
            order[at * config.batch_size : (at + 1) * config.batch_size]
            for at in range(self.progress.step % self.steps_per_epoch, self.steps_per_epoch)
        ]
        domains = self.samples.domains if config.num_domains == _count(self.samples.domains) else None
        for where, images in read_batches(self.samples, split.indices, positions, config.num_workers):
            u = uniforms(config.seed, epoch, split.indices[where])
            pixels = augment(to_float(images.to(self.device, non_blocking=True)), u, config.augment)
            labels = torch.from_numpy(split.labels[where]).to(self.device)
            known = None if domains is None else torch.from_numpy(domains[split.indices[where]]).to(self.device)
            yield self.model.preprocess(pixels), labels, known

    def holdout_auc(self) -> float:
        """AUC over all pairs of (at most HOLDOUT_IMAGES images of) the held-out people; 0 where none are held out."""
        held_out = self.split.held_out
        if not len(held_out):
            return 0.0
        held_out = held_out[:: -(-len(held_out) // HOLDOUT_IMAGES)]
        positions = np.array_split(np.arange(len(held_out)), -(-len(held_out) // 128))
        self.model.eval()
        rows = [self.model.embed(images, flip=False) for _, images in read_batches(self.samples, held_out, positions)]
        embeddings, labels = np.concatenate(rows), self.samples.labels[held_out]
        first, second = np.triu_indices(len(labels), 1)
        return auc((embeddings @ embeddings.T)[first, second], labels[first] == labels[second])

    def _save(self, is_best: bool) -> None:
        if self.run_dir is None:
            return
        state = self.optimizer.state_dict()["state"]
        moments = {f"optimizer.{i}.{key}": value for i, entry in state.items() for key, value in entry.items()}
        margin = {f"margin.{name}": value for name, value in self.margin.state_dict().items()}
        save_checkpoint(
            self.run_dir,
            self.progress.step,
            trained_tensors(self.model),
            dataclasses.asdict(self.model.config),
            {**margin, **moments},
            dataclasses.asdict(self.progress),
            is_best,
        )

    def restore(self, checkpoint: Path) -> None:
        """Continues where a verified checkpoint of the same run stopped."""
        from safetensors.torch import load_file

        tensors, state = load_training(checkpoint)
        self.model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        self.margin.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("margin.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = tensor
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": moments, "param_groups": whole["param_groups"]})
        self.progress = Progress(**state)


def _count(domains: np.ndarray | None) -> int:
    return 0 if domains is None else int(domains.max()) + 1
