"""The training loop: samples -> batches -> steps -> judged epochs -> checkpoints.

The best epoch is chosen on held-out training people (AUC over their pairs), never on a benchmark. Everything random is
a function of (seed, epoch, index), so a run resumed from any step continues as if it had not stopped.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import textwrap
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitface.config import TrainConfig
from vitface.data.loader import split_people
from vitface.errors import CheckpointError, ConfigError
from vitface.evaluation.verify import auc
from vitface.files import replace_file
from vitface.model.store import load_trained, trained_tensors
from vitface.model.tensors import tensor_bytes
from vitface.training import setup
from vitface.training.alarms import alarms
from vitface.training.batches import Batch, micro_batch_size, rank_batches
from vitface.training.checkpoint import load_state, save_checkpoint
from vitface.training.diagnose import diagnose
from vitface.training.distributed import agree, check_same, rank, share, wait_for_all, world_size
from vitface.training.holdout import all_pairs, embed_held_out
from vitface.training.identities import ShardedMargin
from vitface.training.identity_files import identity_files, read_identities
from vitface.training.interrupt import StopRequest, stop_requests
from vitface.training.log import RunLog
from vitface.training.memory import plan_memory
from vitface.training.parallel import accumulating, gather_rows, replicate, synchronise_batch_norms
from vitface.training.resume import changed_settings, difference, is_finished, settings_of
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
        wait_for_all("inputs")  # packing takes one rank hours, and the others wait
        self.micro_batch = micro_batch_size(config)
        if len(self.split.indices) < config.batch_size:
            raise ConfigError(
                f"{len(self.split.indices)} training images do not fill one --batch-size {config.batch_size}; lower it"
            )
        self.steps_per_epoch = len(self.split.indices) // config.batch_size
        if config.limit_batches is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, config.limit_batches)
        self.model, self.margin = setup.build_model(config, self.split.num_people)
        self.memory = plan_memory(self.model, self.margin, self.micro_batch, config.memory_budget)
        self.model.vit.recomputed = self.memory.recomputed
        if world_size() > 1:
            synchronise_batch_norms(self.model)
        groups = parameter_groups(self.model, self.margin, config)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=self.device.type in ("cpu", "cuda"))
        compiled: torch.nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore
        self.forward = replicate(compiled, self.device)
        self.margin_forward = self.margin
        if not config.shard_identities:
            self.margin_forward = replicate(self.margin, self.device)
            self.margin.whole_batch = gather_rows
        domains = self.samples.domains
        self.has_domain_labels = config.use_dalora and domains is not None and domains.max() + 1 == config.num_domains
        self.sampled = self.margin if isinstance(self.margin, ShardedMargin) and self.margin.sample_rate < 1 else None
        self.progress = Progress()
        self.alarmed: set[str] = set()

    @property
    def total_steps(self) -> int:
        return self.progress.first_step + self.steps_per_epoch * (self.config.epochs - self.progress.epoch)

    @property
    def steps_into_epoch(self) -> int:
        return self.progress.step - self.progress.first_step

    @functools.cached_property
    def seconds_per_step(self) -> float:
        """Measured on blank images. In the first pass DDP orders its buckets, and with them every later sum."""
        return setup.seconds_per_step(self.forward, self.margin_forward, self.micro_batch, self.config)

    def header(self) -> str:
        """What is printed before the first step: config, data, machine, parameters, estimated time."""
        config, split, benchmarks = self.config, self.split, setup.final_benchmarks(self.config)
        settings = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(config).items() if value is not None)
        seconds = self.seconds_per_step
        remaining = seconds * (self.total_steps - self.progress.step)
        ranks = f", {world_size()} ranks" if world_size() > 1 else ""
        parts = f" in passes of {self.micro_batch}" if config.grad_accum > 1 or ranks else ""
        return "\n".join(
            [
                textwrap.fill(f"config: {settings}", width=110, subsequent_indent="        "),
                f"data: {len(split.indices):,} images of {split.num_people:,} people to train on, "
                f"{len(split.held_out):,} images of other people held out"
                f"{', with domain labels' if self.has_domain_labels else ''}",
                f"evaluated at the end on: {', '.join(benchmarks) or 'nothing, there is no benchmark in --val-data'}",
                f"device: {config.device}, {config.dtype}, layers: {config.impl}{ranks}{parts}",
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
        if world_size() > 1:
            check_same(self._facts())
            _ = self.seconds_per_step  # resumed or not, every step sums in the same order
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
                if agree(stop.requested, [])[0]:
                    raise KeyboardInterrupt

    def _facts(self) -> dict[str, Any]:
        """What must be the same on every rank before the first step."""
        tensors = {**trained_tensors(self.model), **training_tensors(self.margin, self.optimizer)}
        trained = hashlib.sha256(tensor_bytes(tensors)).hexdigest()
        facts = {**settings_of(self.config), **self.split.fingerprint(), "step": self.progress.step}
        return {**facts, "trained tensors": trained, "backbone file": self.model.config.weights_sha256}

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
        if rank() == 0:
            tqdm.write(f"epoch {progress.epoch}/{config.epochs}  loss {loss:.3f}{judged}  {rate:,.0f} img/s")
        if log is not None:
            log.epoch(
                step=progress.step, epoch=progress.epoch, loss=loss, holdout_auc=score, alarms=", ".join(found),
                img_per_s=round(rate, 1),
            )  # fmt: skip
        for name, text in found.items():
            if name not in self.alarmed and rank() == 0:
                tqdm.write(f"ALARM {name}: {text}")
        self.alarmed |= found.keys()
        return is_best

    def _epoch(self, log: RunLog | None, stop: StopRequest) -> None:
        """What is left of the epoch under way, or up to a step that is saved: at --save-every, or to stop there."""
        config, progress = self.config, self.progress
        epoch, batches = progress.epoch, self._batches(progress.epoch)
        self.model.train()
        bar = tqdm(
            initial=self.steps_into_epoch, total=self.steps_per_epoch, desc=f"epoch {epoch + 1}/{config.epochs}",
            unit_scale=config.batch_size, unit="img", leave=False, dynamic_ncols=True, disable=rank() > 0,
        )  # fmt: skip
        with contextlib.closing(batches), bar:
            while self.steps_into_epoch < self.steps_per_epoch:
                factor = schedule(progress.step, self.total_steps, round(config.warmup_epochs * self.steps_per_epoch))
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                norm, values = self._step(batches)
                stopped, means = agree(stop.requested, list(values.values()))
                values = dict(zip(values, means, strict=True))
                progress.step += 1
                progress.epoch_loss += values["loss"]
                bar.update()
                bar.set_postfix(loss=f"{values['loss']:.2f}")
                if log is not None and progress.step % LOG_EVERY == 0:
                    log.step(step=progress.step, epoch=epoch + 1, lr=config.lr * factor, grad_norm=norm, **values)
                if stopped or (config.save_every and progress.step % config.save_every == 0):
                    return

    def _step(self, batches: Generator[Batch]) -> tuple[float, dict[str, float]]:
        """One update from the next --grad-accum micro-batches: the gradient's norm, and the mean loss by its parts."""
        count, losses = self.config.grad_accum, []
        for part in range(count):
            images, labels, domains, people = next(batches)
            if self.sampled is not None and part == 0:
                self.sampled.draw(self.progress.step, people, self.optimizer)
            last = part == count - 1
            with accumulating(last, self.forward, self.margin_forward):
                parts = total_loss(self.forward, self.margin_forward, images, labels, domains, self.config)
                losses.append({name: part.detach() / count for name, part in parts.items()})
                if not last:
                    (parts["loss"] / count).backward()
                    continue
                loss = parts["loss"] / count + sum(earlier["loss"] for earlier in losses[:-1])
                try:
                    norm = update(self.optimizer, loss, self.trained, self.config.clip)
                except NonFiniteError as error:
                    raise self._diagnosed(error, images, parts) from None
        if self.sampled is not None:
            self.sampled.put_back(self.optimizer)
        totals = torch.stack([sum(each[name] for each in losses) for name in losses[0]])  # type: ignore[arg-type]
        return norm, dict(zip(losses[0], totals.tolist(), strict=True))

    def _diagnosed(self, error: NonFiniteError, images: Tensor, parts: dict[str, Tensor]) -> NonFiniteError:
        """Rank 0 writes down what the rank that met the value found."""
        if self.run_dir is None:
            return error
        path = self.run_dir / "non_finite.json"
        step, epoch, rate = self.progress.step + 1, self.progress.epoch + 1, self.optimizer.param_groups[0]["lr"]
        where = {"step": step, "epoch": epoch, "seed": self.config.seed, "lr": rate, "reason": str(error)}
        modules = torch.nn.ModuleDict({"model": self.model, "margin": self.margin})
        found = share(diagnose(where, images, parts, modules), error.culprit)
        if rank() == 0:
            replace_file(path, json.dumps(found, indent=1).encode())
        return NonFiniteError(f"step {step:,}: {error}; {path} says more", error.culprit)

    def _batches(self, epoch: int) -> Generator[Batch]:
        """What is left of the epoch, as `rank_batches`, ready for the model."""
        steps = range(self.steps_into_epoch, self.steps_per_epoch)
        domains = self.samples.domains if self.has_domain_labels else None
        for pixels, labels, known, people in rank_batches(self.config, self.samples, self.split, epoch, steps, domains):
            yield self.model.preprocess(pixels), labels, known, people

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
        more_files = identity_files(self.margin, self.optimizer) if isinstance(self.margin, ShardedMargin) else iter(())
        if rank() == 0:
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
                more_files,
            )
        for _ in more_files:  # what rank 0 did not need, as the step was there already, is still being sent
            pass

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
        if isinstance(self.margin, ShardedMargin):
            self.margin.load_rows(self.optimizer, read_identities(checkpoint, self.margin))
        self.progress = Progress(**state["progress"])
        self.progress.finished = is_finished(self.config, state)
        if other_data or changed_settings(state, self.config):
            self.progress.first_step, self.progress.epoch_loss = self.progress.step, 0.0
