"""The training loop: samples -> batches -> steps -> judged epochs -> checkpoints.

The best epoch is chosen on held-out training people (AUC over their pairs), never on a benchmark. Everything random is
a function of (seed, epoch, index), so a run resumed from any step continues as if it had not stopped.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vitface.config import TrainConfig
from vitface.data.loader import split_people
from vitface.errors import ConfigError
from vitface.metrics import auc
from vitface.store.faces import load_trained, trained_tensors
from vitface.store.tensors import tensor_bytes
from vitface.training import setup
from vitface.training.batches import Batch, micro_batch_size, rank_batches
from vitface.training.collapse import alarms
from vitface.training.diagnose import diagnose, keep_diagnosis
from vitface.training.holdout import all_pairs, embed_held_out
from vitface.training.loss_scale import LossScale
from vitface.training.memory import plan_memory
from vitface.training.ranks.identities import ShardedMargin
from vitface.training.ranks.identity_files import identity_files, read_identities
from vitface.training.ranks.parallel import accumulating, gather_rows, replicate, synchronise_batch_norms
from vitface.training.ranks.process_group import agree, check_same, rank, wait_for_all, world_size
from vitface.training.runs.checkpoint import save_checkpoint
from vitface.training.runs.interrupt import StopRequest, stop_requests
from vitface.training.runs.log import RunLog
from vitface.training.runs.resume import changed_settings, check_same_data, is_finished, settings_of, state_to_resume
from vitface.training.runs.state import load_training, read_training, training_tensors
from vitface.training.step import make_optimizer, refusal, schedule, set_rates, total_loss, update

LOG_EVERY = 10
MOST_SKIPPED = 20  # steps in a row


@dataclasses.dataclass
class Progress:
    """What a checkpoint counts. `epoch` epochs are done and judged; `step` may be in the middle of the next one."""

    step: int = 0
    epoch: int = 0
    first_step: int = 0  # of the epoch under way
    epoch_loss: float = 0.0  # summed over the steps of the epoch under way
    best_epoch: int = 0
    best_auc: float = -1.0
    skipped: int = 0  # steps of fp16 whose gradients overflowed
    skipped_in_a_row: int = 0
    finished: bool = False


class Trainer:
    """One run. `config` is resolved (see `setup.resolve_choices`); `run_dir` None writes nothing."""

    def __init__(self, config: TrainConfig, run_dir: Path | None):
        self.config, self.run_dir = config, run_dir
        self.device = torch.device(config.device)
        self.samples = setup.open_inputs(config)
        self.split = split_people(self.samples, config.holdout_people, config.max_samples, config.seed)
        wait_for_all("inputs")  # packing takes one rank hours, and the others wait
        self.micro_batch = micro_batch_size(config)
        if len(self.split.indices) < config.batch_size:
            raise ConfigError(
                f"{len(self.split.indices)} training images do not fill one --batch-size {config.batch_size}; lower it"
            )
        self.steps_per_epoch = len(self.split.indices) // config.batch_size
        self.model, self.margin = setup.build_model(config, self.split.num_people)
        self.memory = plan_memory(self.model, self.margin, self.micro_batch, config.memory_budget)
        self.model.vit.recomputed = self.memory.recomputed
        if world_size() > 1:
            synchronise_batch_norms(self.model)
        self.optimizer = make_optimizer(self.model, self.margin, config)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.loss_scale = LossScale(config.dtype == "fp16", self.device)
        compiled: torch.nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore
        self.forward = replicate(compiled, self.device)
        self.margin_forward = self.margin
        if config.partial_fc is None:
            self.margin_forward = replicate(self.margin, self.device)
            self.margin.whole_batch = gather_rows
        domains = self.samples.domains if config.use_dalora and config.domain_labels != "none" else None
        self.has_domain_labels = domains is not None and domains.max() + 1 == config.num_domains
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
            skipped = f"  {progress.skipped} steps skipped so far" if progress.skipped else ""
            tqdm.write(f"epoch {progress.epoch}/{config.epochs}  loss {loss:.3f}{judged}  {rate:,.0f} img/s{skipped}")
        if log is not None:
            log.epoch(
                step=progress.step, epoch=progress.epoch, loss=loss, holdout_auc=score, alarms=", ".join(found),
                img_per_s=round(rate, 1), **self._skipped(),
            )  # fmt: skip
        for name, text in found.items():
            if name not in self.alarmed and rank() == 0:
                tqdm.write(f"ALARM {name}: {text}")
        self.alarmed |= found.keys()
        return is_best

    def _skipped(self) -> dict[str, int]:
        return {"skipped": self.progress.skipped} if self.loss_scale.enabled else {}

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
                factor = schedule(progress.step, self.total_steps, self.steps_per_epoch)
                set_rates(self.optimizer, factor)
                norm, values = self._step(batches)
                stopped, means = agree(stop.requested, list(values.values()))
                values = dict(zip(values, means, strict=True))
                progress.step += 1
                progress.epoch_loss += values["loss"]
                bar.update()
                bar.set_postfix(loss=f"{values['loss']:.2f}")
                if log is not None and progress.step % LOG_EVERY == 0:
                    shown = norm if math.isfinite(norm) else None  # of a step that was skipped; JSON has no infinity
                    about = {"step": progress.step, "epoch": epoch + 1, "lr": config.lr * factor, "grad_norm": shown}
                    log.step(**about, **values, **self._skipped())
                if stopped or (config.save_every and progress.step % config.save_every == 0):
                    return

    def _step(self, batches: Generator[Batch]) -> tuple[float, dict[str, float]]:
        """One update from the next --grad-accum micro-batches: the gradient's norm, and the mean loss by its parts.

        The device is waited for once, at the end.
        """
        told: dict[str, Tensor] = {}
        for part in range(self.config.grad_accum):
            images, labels, domains, people = next(batches)
            if self.sampled is not None and part == 0:
                self.sampled.draw(self.progress.step, people, self.optimizer)
            told = self._micro_step(images, labels, domains, told, part == self.config.grad_accum - 1)
        if self.sampled is not None:
            self.sampled.put_back(self.optimizer)
        values = dict(zip(told, torch.stack([*told.values()]).tolist(), strict=True))
        norm, bad = values.pop("grad_norm"), values.pop("bad")
        if bad:
            self._not_taken(values, norm, images)
        self.progress.skipped += int(bad)
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if bad else 0
        return norm, values

    def _micro_step(
        self, images: Tensor, labels: Tensor, domains: Tensor | None, earlier: dict[str, Tensor], last: bool
    ) -> dict[str, Tensor]:
        """A micro-batch's gradients, and after the `last` one the update: what there is to tell, with the `earlier`."""
        if not earlier:
            self.optimizer.zero_grad(set_to_none=True)
        with accumulating(last, self.forward, self.margin_forward):
            parts = total_loss(self.forward, self.margin_forward, images, labels, domains, self.config)
            parts = {name: part / self.config.grad_accum + earlier.get(name, 0.0) for name, part in parts.items()}
            told = {name: part.detach() for name, part in parts.items()}
            if not last:
                self.loss_scale(parts["loss"]).backward()
                return told
            loss, norm, bad = update(
                self.optimizer, parts["loss"], self.trained, self.config.clip_grad, self.loss_scale
            )
        return {**told, "loss": loss, "grad_norm": norm, "bad": bad}

    def _not_taken(self, values: dict[str, float], norm: float, images: Tensor) -> None:
        """After a bad outcome: an overflow of fp16's gradients is left at that, anything else raises NonFiniteError."""
        progress, reason = self.progress, ""
        if (
            self.loss_scale.enabled and not agree(not math.isfinite(values["loss"]), [])[0]
        ):  # a lower scale mends no loss
            if progress.skipped_in_a_row + 1 < MOST_SKIPPED:
                return
            reason = f"the last {MOST_SKIPPED} steps were skipped, each with a lower loss scale than the one before; "
        error = refusal(reason, values["loss"], norm, self.trained)
        if self.run_dir is None:
            raise error
        rate = float(self.optimizer.param_groups[0]["lr"])
        where = {"step": progress.step + 1, "epoch": progress.epoch + 1, "seed": self.config.seed, "lr": rate}
        modules = torch.nn.ModuleDict({"model": self.model, "margin": self.margin})
        found = diagnose({**where, "reason": str(error)}, images, values, modules)
        raise keep_diagnosis(self.run_dir / "non_finite.json", error, found)

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
                    "loss_scale": self.loss_scale.state(),
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
        state = state_to_resume(checkpoint, self.model.config)
        other_data = check_same_data(checkpoint, state, self.split.fingerprint(), self.config)
        tensors = read_training(checkpoint / "training.safetensors", self.margin, self.optimizer)
        load_trained(self.model, checkpoint / "model.safetensors")
        load_training(tensors, self.margin, self.optimizer)
        if isinstance(self.margin, ShardedMargin):
            self.margin.load_rows(self.optimizer, read_identities(checkpoint, self.margin))
        self.loss_scale.load(state.get("loss_scale", {}))  # older checkpoints have none
        self.progress = Progress(**state["progress"])
        self.progress.finished = is_finished(self.config, state)
        if other_data or changed_settings(state, self.config):
            self.progress.first_step, self.progress.epoch_loss = self.progress.step, 0.0
