"""The training loop: samples -> batches -> steps -> judged epochs -> checkpoints.

The best epoch is chosen on held-out training people (AUC over their pairs), never on a benchmark. Everything random is
a function of (seed, epoch, index), so a run resumed from any step continues as if it had not stopped.
"""

import dataclasses
import json
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from vitface.config import TrainConfig
from vitface.data.augment import augment, uniforms
from vitface.data.loader import epoch_order, read_batches, split_people
from vitface.data.preprocess import to_float
from vitface.errors import CheckpointError, ConfigError
from vitface.evaluation.verify import auc
from vitface.model.store import trained_tensors
from vitface.training import setup
from vitface.training.checkpoint import load_training, save_checkpoint
from vitface.training.holdout import holdout_scores
from vitface.training.interrupt import StopRequest, stop_requests
from vitface.training.log import RunLog
from vitface.training.step import parameter_groups, schedule, total_loss, update

LOG_EVERY = 10


@dataclasses.dataclass
class Progress:
    """What a checkpoint counts. `epoch` epochs are done and judged; `step` may be in the middle of the next one."""

    step: int = 0
    epoch: int = 0
    epoch_loss: float = 0.0  # summed over the steps of the epoch under way
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
        domains = self.samples.domains
        self.has_domain_labels = config.use_dalora and domains is not None and domains.max() + 1 == config.num_domains
        self.progress = Progress()

    def header(self) -> str:
        """What is printed before the first step: config, data, machine, parameters, estimated time."""
        config, split, benchmarks = self.config, self.split, setup.final_benchmarks(self.config)
        settings = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(config).items() if value is not None)
        seconds = setup.seconds_per_step(self.model, self.margin, config)
        remaining = seconds * (self.total_steps - self.progress.step)
        return "\n".join(
            [
                textwrap.fill(f"config: {settings}", width=110, subsequent_indent="        "),
                f"data: {len(split.indices):,} images of {split.num_people:,} people to train on, "
                f"{len(split.held_out):,} images of other people held out"
                f"{', with domain labels' if self.has_domain_labels else ''}",
                f"evaluated at the end on: {', '.join(benchmarks) or 'nothing, there is no benchmark in --val-data'}",
                f"device: {config.device}, {config.dtype}, adapted layers: {config.impl}",
                setup.parameter_table(self.model, self.margin),
                f"estimated time: {remaining / 60:.1f} min for {self.total_steps - self.progress.step:,} steps "
                f"({config.batch_size / seconds:,.0f} img/s before reading and augmenting)",
            ]
        )

    def fit(self, log: RunLog | None) -> None:
        """Runs from the current step to the end, or until `patience` epochs brought no better held-out AUC.

        After Ctrl-C or SIGTERM it finishes the step under way, saves, and raises KeyboardInterrupt.
        """
        with stop_requests() as stop:
            while not self.progress.finished:
                started, first = time.perf_counter(), self.progress.step
                self._epoch(log, stop)
                rate = (self.progress.step - first) * self.config.batch_size / (time.perf_counter() - started)
                # an epoch whose last step is done is judged before stopping: a step is saved once, in one state
                is_best = self.progress.step % self.steps_per_epoch == 0 and self._judge(rate, log)
                self._save(is_best)
                if stop.requested:
                    raise KeyboardInterrupt

    def _judge(self, rate: float, log: RunLog | None) -> bool:
        """Ends an epoch: its held-out AUC, whether it is the best, whether training is finished."""
        progress, config = self.progress, self.config
        loss, score = progress.epoch_loss / self.steps_per_epoch, self.holdout_auc()
        progress.epoch, progress.epoch_loss = progress.epoch + 1, 0.0
        is_best = score is None or score > progress.best_auc
        if is_best:
            progress.best_epoch, progress.best_auc = progress.epoch, -1.0 if score is None else score
        out_of_patience = 0 < config.patience <= progress.epoch - progress.best_epoch
        progress.finished = out_of_patience or progress.epoch == config.epochs
        judged = "" if score is None else f"  held-out AUC {score:.4f}{' (best)' if is_best else ''}"
        tqdm.write(f"epoch {progress.epoch}/{config.epochs}  loss {loss:.3f}{judged}  {rate:,.0f} img/s")
        if log is not None:
            rate = round(rate, 1)
            log.epoch(step=progress.step, epoch=progress.epoch, loss=loss, holdout_auc=score, img_per_s=rate)
        return is_best

    def _epoch(self, log: RunLog | None, stop: StopRequest) -> None:
        """What is left of the epoch under way, or up to the step after which a stop was requested."""
        config, epoch = self.config, self.progress.epoch
        self.model.train()
        bar = tqdm(
            self._batches(epoch), initial=self.progress.step - epoch * self.steps_per_epoch, total=self.steps_per_epoch,
            desc=f"epoch {epoch + 1}/{config.epochs}", unit_scale=config.batch_size, unit="img", leave=False,
            dynamic_ncols=True,
        )  # fmt: skip
        for images, labels, domains in bar:
            factor = schedule(self.progress.step, self.total_steps, round(config.warmup_epochs * self.steps_per_epoch))
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            parts = total_loss(self.forward, self.margin, images, labels, domains, config)
            norm = update(self.optimizer, parts["loss"], self.trained, config.clip)
            values = dict(zip(parts, torch.stack([part.detach() for part in parts.values()]).tolist(), strict=True))
            self.progress.step += 1
            self.progress.epoch_loss += values["loss"]
            bar.set_postfix(loss=f"{values['loss']:.2f}")
            if log is not None and self.progress.step % LOG_EVERY == 0:
                log.step(step=self.progress.step, epoch=epoch + 1, lr=config.lr * factor, grad_norm=norm, **values)
            if stop.requested:
                return

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """What is left of the epoch: normalised images (B, 3, S, S), labels (B,), domains (B,) or None."""
        config, split = self.config, self.split
        order = epoch_order(len(split.indices), config.seed, epoch)
        positions = [
            order[at * config.batch_size : (at + 1) * config.batch_size]
            for at in range(self.progress.step - epoch * self.steps_per_epoch, self.steps_per_epoch)
        ]
        domains = self.samples.domains if self.has_domain_labels else None
        pinned = self.device.type == "cuda"
        for where, images in read_batches(self.samples, split.indices, positions, config.num_workers, pinned):
            u = uniforms(config.seed, epoch, split.indices[where])
            pixels = augment(to_float(images.to(self.device, non_blocking=True)), u, config.augment)
            labels = torch.from_numpy(split.labels[where]).to(self.device)
            known = None if domains is None else torch.from_numpy(domains[split.indices[where]]).to(self.device)
            yield self.model.preprocess(pixels), labels, known

    def holdout_auc(self) -> float | None:
        """AUC over all pairs of the held-out people; None where there are none."""
        if not len(self.split.held_out):
            return None
        self.model.eval()
        return auc(*holdout_scores(self.model, self.samples, self.split.held_out))

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
            {"progress": dataclasses.asdict(self.progress), "data": self.split.fingerprint()},
            is_best,
        )

    def restore(self, checkpoint: Path) -> None:
        """Continues where a verified checkpoint stopped; CheckpointError if it is of another model or other data."""
        settings = json.loads((checkpoint / "model.json").read_text())
        if settings != json.loads(json.dumps(dataclasses.asdict(self.model.config))):
            raise CheckpointError(f"{checkpoint} is of another model or was trained on another backbone file")
        tensors, state = load_training(checkpoint)
        if state["data"] != self.split.fingerprint():
            raise CheckpointError(
                f"{self.config.train_data} is not the data {checkpoint} was trained on: "
                f"{state['data']} then, {self.split.fingerprint()} now"
            )
        self.model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        self.margin.load_state_dict({k[7:]: v for k, v in tensors.items() if k.startswith("margin.")})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".")
                moments.setdefault(int(number), {})[key] = tensor
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": moments, "param_groups": whole["param_groups"]})
        self.progress = Progress(**state["progress"])
