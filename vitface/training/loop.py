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
from torch import Tensor
from tqdm import tqdm

from vitface.config import TrainConfig
from vitface.data.augment import augment, uniforms
from vitface.data.loader import EPOCH_ORDERS, read_batches, split_people
from vitface.data.preprocess import to_float
from vitface.errors import CheckpointError, ConfigError
from vitface.evaluation.verify import auc
from vitface.model.store import load_trained, trained_tensors
from vitface.training import setup
from vitface.training.alarms import alarms
from vitface.training.checkpoint import load_state, save_checkpoint
from vitface.training.diagnose import write_diagnosis
from vitface.training.holdout import all_pairs, embed_held_out
from vitface.training.interrupt import StopRequest, stop_requests
from vitface.training.log import RunLog
from vitface.training.memory import plan_memory
from vitface.training.resume import difference, is_finished, settings_of
from vitface.training.state import load_training, read_training, training_tensors
from vitface.training.step import NonFiniteError, parameter_groups, schedule, total_loss, update

LOG_EVERY = 10


@dataclasses.dataclass
class Progress:
    """What a checkpoint counts. `epoch` epochs are done and judged; `step` may be in the middle of the next one."""

    step: int = 0
    epoch: int = 0
    first_step: int = 0  # of the epoch under way
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
        self.split = split_people(
            self.samples, config.holdout_people, config.max_samples, config.seed, config.max_images_per_identity
        )
        if len(self.split.indices) < config.batch_size:
            raise ConfigError(
                f"{len(self.split.indices)} training images do not fill one --batch-size {config.batch_size}; lower it"
            )
        self.steps_per_epoch = len(self.split.indices) // config.batch_size
        if config.limit_batches is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, config.limit_batches)
        self.model, self.margin = setup.build_model(config, self.split.num_people)
        self.memory = plan_memory(self.model, self.margin, config.batch_size, config.memory_budget)
        self.model.vit.recomputed = self.memory.recomputed
        groups = parameter_groups(self.model, self.margin, config)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=self.device.type in ("cpu", "cuda"))
        self.forward: torch.nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore
        domains = self.samples.domains
        self.has_domain_labels = config.use_dalora and domains is not None and domains.max() + 1 == config.num_domains
        self.progress = Progress()
        self.alarmed: set[str] = set()

    @property
    def total_steps(self) -> int:
        return self.progress.first_step + self.steps_per_epoch * (self.config.epochs - self.progress.epoch)

    @property
    def steps_into_epoch(self) -> int:
        return self.progress.step - self.progress.first_step

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
                f"memory: {self.memory}",
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
                is_best = self.steps_into_epoch == self.steps_per_epoch and self._judge(rate, log)
                if log is not None:
                    log.sync()
                self._save(is_best)
                if stop.requested:
                    raise KeyboardInterrupt

    def _judge(self, rate: float, log: RunLog | None) -> bool:
        """Ends an epoch: its held-out AUC, whether it is the best, whether training is finished."""
        progress, config = self.progress, self.config
        loss, (score, found) = progress.epoch_loss / self.steps_per_epoch, self.judge_held_out()
        progress.epoch, progress.first_step, progress.epoch_loss = progress.epoch + 1, progress.step, 0.0
        is_best = score is None or score > progress.best_auc
        if is_best:
            progress.best_epoch, progress.best_auc = progress.epoch, -1.0 if score is None else score
        out_of_patience = 0 < config.patience <= progress.epoch - progress.best_epoch
        progress.finished = out_of_patience or progress.epoch == config.epochs
        judged = "" if score is None else f"  held-out AUC {score:.4f}{' (best)' if is_best else ''}"
        tqdm.write(f"epoch {progress.epoch}/{config.epochs}  loss {loss:.3f}{judged}  {rate:,.0f} img/s")
        if log is not None:
            log.epoch(
                step=progress.step, epoch=progress.epoch, loss=loss, holdout_auc=score, alarms=", ".join(found),
                img_per_s=round(rate, 1),
            )  # fmt: skip
        for name, text in found.items():
            if name not in self.alarmed:
                tqdm.write(f"ALARM {name}: {text}")
        self.alarmed |= found.keys()
        return is_best

    def _epoch(self, log: RunLog | None, stop: StopRequest) -> None:
        """What is left of the epoch under way, or up to the step after which a stop was requested."""
        config, epoch = self.config, self.progress.epoch
        self.model.train()
        bar = tqdm(
            self._batches(epoch), initial=self.steps_into_epoch, total=self.steps_per_epoch,
            desc=f"epoch {epoch + 1}/{config.epochs}", unit_scale=config.batch_size, unit="img", leave=False,
            dynamic_ncols=True,
        )  # fmt: skip
        for images, labels, domains in bar:
            factor = schedule(self.progress.step, self.total_steps, round(config.warmup_epochs * self.steps_per_epoch))
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            parts = total_loss(self.forward, self.margin, images, labels, domains, config)
            try:
                norm = update(self.optimizer, parts["loss"], self.trained, config.clip)
            except NonFiniteError as error:
                raise self._diagnosed(error, images, parts) from None
            values = dict(zip(parts, torch.stack([part.detach() for part in parts.values()]).tolist(), strict=True))
            self.progress.step += 1
            self.progress.epoch_loss += values["loss"]
            bar.set_postfix(loss=f"{values['loss']:.2f}")
            if log is not None and self.progress.step % LOG_EVERY == 0:
                log.step(step=self.progress.step, epoch=epoch + 1, lr=config.lr * factor, grad_norm=norm, **values)
            if stop.requested:
                return

    def _diagnosed(self, error: NonFiniteError, images: Tensor, parts: dict[str, Tensor]) -> NonFiniteError:
        if self.run_dir is None:
            return error
        path = self.run_dir / "non_finite.json"
        step, epoch, rate = self.progress.step + 1, self.progress.epoch + 1, self.optimizer.param_groups[0]["lr"]
        where = {"step": step, "epoch": epoch, "seed": self.config.seed, "lr": rate, "reason": str(error)}
        modules = torch.nn.ModuleDict({"model": self.model, "margin": self.margin})
        write_diagnosis(path, where, images, parts, modules)
        return NonFiniteError(f"step {step:,}: {error}; {path} says more")

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """What is left of the epoch: normalised images (B, 3, S, S), labels (B,), domains (B,) or None."""
        config, split = self.config, self.split
        order = EPOCH_ORDERS[config.sampler](split.labels, config.seed, epoch)
        positions = [
            order[at * config.batch_size : (at + 1) * config.batch_size]
            for at in range(self.steps_into_epoch, self.steps_per_epoch)
        ]
        domains = self.samples.domains if self.has_domain_labels else None
        pinned = self.device.type == "cuda"
        for where, images in read_batches(self.samples, split.indices, positions, config.num_workers, pinned):
            u = uniforms(config.seed, epoch, split.indices[where])
            pixels = augment(to_float(images.to(self.device, non_blocking=True)), u, config.augment)
            labels = torch.from_numpy(split.labels[where]).to(self.device)
            known = None if domains is None else torch.from_numpy(domains[split.indices[where]]).to(self.device)
            yield self.model.preprocess(pixels), labels, known

    def judge_held_out(self) -> tuple[float | None, dict[str, str]]:
        """AUC over all pairs of the held-out people, and alarms, a sentence by name; (None, {}) where nobody is."""
        if not len(self.split.held_out):
            return None, {}
        self.model.eval()
        embeddings, gates, labels = embed_held_out(self.model, self.samples, self.split.held_out)
        score = auc(*all_pairs(embeddings, labels))
        return score, alarms(embeddings, score, gates if self.config.use_dalora else None)

    def _save(self, is_best: bool) -> None:
        if self.run_dir is None:
            return
        save_checkpoint(
            self.run_dir,
            self.progress.step,
            trained_tensors(self.model),
            dataclasses.asdict(self.model.config),
            training_tensors(self.margin, self.optimizer),
            {
                "progress": dataclasses.asdict(self.progress),
                "is_best": is_best,
                "settings": settings_of(self.config),
                "data": self.split.fingerprint(),
            },
            is_best,
        )

    def restore(self, checkpoint: Path) -> None:
        """Continues where a verified checkpoint stopped; CheckpointError if it is of another model or other data.

        --allow-changed lets other settings and other data of as many people pass: the epoch under way starts again.
        """
        before = json.loads((checkpoint / "model.json").read_text(encoding="utf-8"))
        now = json.loads(json.dumps(dataclasses.asdict(self.model.config)))
        if before != now:
            raise CheckpointError(
                f"{checkpoint} is of another model or was trained on another backbone file:\n"
                f"{difference(before, now, str)}"
            )
        state = load_state(checkpoint)
        other_data = difference(state["data"], self.split.fingerprint(), "data, {}".format)
        if other_data and not self.config.allow_changed:
            raise CheckpointError(
                f"{self.config.train_data} is not the data {checkpoint} was trained on; --allow-changed takes it:\n"
                f"{other_data}"
            )
        tensors = read_training(checkpoint / "training.safetensors", self.margin, self.optimizer)
        load_trained(self.model, checkpoint / "model.safetensors")
        load_training(tensors, self.margin, self.optimizer)
        self.progress = Progress(**state["progress"])
        self.progress.finished = is_finished(self.config, state)
        if other_data or difference(state["settings"], settings_of(self.config)):
            self.progress.first_step, self.progress.epoch_loss = self.progress.step, 0.0
