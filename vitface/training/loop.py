"""The training loop: samples -> batches -> steps -> judged epochs -> checkpoints.

The best epoch is chosen on held-out training people (AUC over their pairs), never on a benchmark. Everything random is
a function of (seed, epoch, index), so a run resumed from any step continues as if it had not stopped.
"""

import contextlib
import math
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from vitface.config import TrainConfig
from vitface.metrics import auc
from vitface.training import setup
from vitface.training.batches import Ahead, Batch, rank_batches
from vitface.training.estimate import seconds_per_step
from vitface.training.holdout import alarms, all_pairs, embed_held_out
from vitface.training.loss_scale import LossScale
from vitface.training.memory import plan_memory
from vitface.training.non_finite import error_after, may_skip
from vitface.training.ranks.identities import ShardedMargin
from vitface.training.ranks.parallel import accumulating, replicate, synchronise_batch_norms
from vitface.training.ranks.process_group import agree, check_same, print0, world_size
from vitface.training.runs.interrupt import stop_requests
from vitface.training.runs.log import RunLog, epoch_bar
from vitface.training.runs.resume import settings_of, side_of, state_to_resume
from vitface.training.runs.state import TrainingState, parameters
from vitface.training.start import start_from_recogniser
from vitface.training.step import compiled, make_optimizer, schedule, set_rates, total_loss, update

LOG_EVERY = 10


class Trainer:
    """One run. `config` is resolved (see `setup.resolve_choices`); nothing is written without `run_dir`.

    `change` is what a study does to the model before it is trained.
    """

    def __init__(self, config: TrainConfig, run_dir: Path | None, change: setup.Change | None = None):
        self.config, self.run_dir, self.change = config, run_dir, change
        self.device = torch.device(config.device)
        self.data = setup.open_data(config)
        self.loss_scale = LossScale(config.dtype == "fp16", self.device)
        self.margin = setup.build_margin(config, self.data.split.num_people)
        self.margin_forward = self.margin if config.partial_fc is not None else replicate(self.margin, self.device)
        self.sampled = self.margin if isinstance(self.margin, ShardedMargin) and self.margin.sample_rate < 1 else None
        self.losses = compiled(total_loss, config)
        self.seconds: dict[int, float] = {}  # of a step, by the side of its images
        for phase in reversed(config.phases):
            self._build(phase.side)
            print0(f"memory at {phase.side} px: {self.memory}")
        self.alarmed: set[str] = set()

    def _build(self, side: int, before: TrainingState | None = None) -> None:
        """Makes the model for images of `side` pixels, and all that trains it, to continue from the state `before`."""
        config, micro_batch = self.config, self.data.micro_batch
        self.model = setup.build_model(config, side, self.change)
        self.memory = plan_memory(self.model, self.margin, micro_batch, config.memory_budget)
        self.model.vit.recompute(self.memory.recomputed)
        if world_size() > 1:
            synchronise_batch_norms(self.model)
        self.optimizer = make_optimizer(self.model, self.margin, config)
        self.trained = parameters(self.optimizer)
        self.state = TrainingState(self.model, self.margin, self.optimizer, self.loss_scale)
        if before is not None:
            self.state.take_over(before)
        self.forward = replicate(self.model, self.device)
        # on every rank, resumed or not: in its first pass DDP orders its buckets, and with them every later sum
        shape = side, micro_batch, self.data.labelled
        self.seconds[side] = seconds_per_step(self.forward, self.margin_forward, *shape, config)

    @property
    def total_steps(self) -> int:
        done = self.state.progress
        return done.first_step + self.data.steps_per_epoch * (self.config.epochs - done.epoch)

    def fit(self, log: RunLog | None) -> None:
        """Runs from the current step to the end, or until `patience` epochs brought no better held-out AUC.

        After Ctrl-C or SIGTERM it finishes the current step, saves, and raises KeyboardInterrupt.
        """
        progress = self.state.progress
        if world_size() > 1:
            facts = {**settings_of(self.config), **self.data.fingerprint(), "step": progress.step}
            backbone = {"backbone file": self.model.config.weights_sha256}
            check_same({**facts, "trained tensors": self.state.sha256(), **backbone})
        with stop_requests() as stop:
            if progress.step == 0 and self.config.head == "pretrained":
                start_from_recogniser(self, log)
            while not progress.finished:
                self._grow(next(phase.side for phase in self.config.phases if progress.epoch < phase.end))
                started, first = time.perf_counter(), progress.step
                self._epoch(log, stop)
                rate = (progress.step - first) * self.config.batch_size / (time.perf_counter() - started)
                # an epoch whose last step is done is judged before stopping: a step is saved once, in one state
                done = progress.steps_into_epoch == self.data.steps_per_epoch
                is_best, lines = self._judge(rate, log) if done else (False, [])
                if log is not None:
                    log.sync()
                self.save(is_best)
                if done:
                    print0("\n".join(lines))  # after saving: a closed pipe ends the run here
                if agree(stop.is_set(), [])[0]:
                    raise KeyboardInterrupt

    def _grow(self, side: int) -> None:
        """From now on images have `side` pixels, if they do not have them yet."""
        if side != self.model.config.image_size:
            self.optimizer.zero_grad(set_to_none=True)
            torch.compiler.reset()  # a graph for each size is faster than one for all
            self._build(side, self.state)

    def _epoch(self, log: RunLog | None, stop: threading.Event) -> None:
        """The rest of the current epoch, or as far as a step that is saved: at --save-every, or to stop there."""
        config, progress, steps = self.config, self.state.progress, self.data.steps_per_epoch
        batches = self._batches()
        self.model.train()
        with contextlib.closing(batches), epoch_bar(config, progress, steps) as bar:
            while progress.steps_into_epoch < steps:
                factor = schedule(progress.step, self.total_steps, steps)
                set_rates(self.optimizer, factor)
                norm, losses = self._step(batches)
                stopped, means = agree(stop.is_set(), list(losses.values()))
                losses = dict(zip(losses, means, strict=True))
                progress.step += 1
                progress.epoch_loss += losses["loss"]
                bar.set_postfix({name: f"{loss:.2f}" for name, loss in losses.items()}, refresh=False)
                bar.update()
                if log is not None and progress.step % LOG_EVERY == 0:
                    self._log_step(log, config.lr * factor, norm, losses)
                if stopped or (config.save_every and progress.step % config.save_every == 0):
                    return

    def _batches(self) -> Ahead:
        """The rest of the current epoch."""
        progress = self.state.progress
        steps = range(progress.steps_into_epoch, self.data.steps_per_epoch)
        return Ahead(rank_batches(self.config, self.data, self.model, progress.epoch, steps), self.device)

    def _step(self, batches: Ahead) -> tuple[float, dict[str, float]]:
        """One update from the next --grad-accum micro-batches: the gradient's norm, and the mean losses.

        It waits for the device once, when the next batch is on its way.
        """
        progress, count = self.state.progress, self.config.grad_accum
        results: dict[str, Tensor] = {}
        for part in range(count):
            batch = next(batches)
            if self.sampled is not None and part == 0:
                self.sampled.draw(progress.step, batch.people, self.optimizer)
            results = self._micro_step(batch, results, last=part == count - 1)
        if self.sampled is not None:
            self.sampled.put_back(self.optimizer)
        batches.prepare()
        losses = dict(zip(results, torch.stack([*results.values()]).tolist(), strict=True))
        norm, bad = losses.pop("grad_norm"), losses.pop("bad")
        if bad and not (self.loss_scale.enabled and may_skip(losses["loss"], progress.skipped_in_a_row)):
            raise error_after(self, batch.images, losses, norm)
        progress.skipped += int(bad)
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if bad else 0
        return norm, losses

    def _micro_step(self, batch: Batch, earlier: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        """A micro-batch's gradients, and after the `last` one the update; returns the losses, `earlier` ones added."""
        if not earlier:
            self.optimizer.zero_grad(set_to_none=True)
        with accumulating(last, self.forward, self.margin_forward):
            losses = self.losses(self.forward, self.margin_forward, batch, self.config)
            losses = {name: loss / self.config.grad_accum + earlier.get(name, 0.0) for name, loss in losses.items()}
            results = {name: loss.detach() for name, loss in losses.items()}
            if not last:
                self.loss_scale(losses["loss"]).backward()
                return results
            clip = self.config.clip_grad
            loss, norm, bad = update(self.optimizer, losses["loss"], self.trained, clip, self.loss_scale)
        return {**results, "loss": loss, "grad_norm": norm, "bad": bad}

    def _log_step(self, log: RunLog, rate: float, norm: float, losses: dict[str, float]) -> None:
        progress = self.state.progress
        shown = norm if math.isfinite(norm) else None  # of a step that was skipped; JSON has no infinity
        about = {"step": progress.step, "epoch": progress.epoch + 1, "lr": rate, "grad_norm": shown}
        log.step(**about, **losses, **self._skipped())

    def _skipped(self) -> dict[str, int]:
        return {"skipped": self.state.progress.skipped} if self.loss_scale.enabled else {}

    def _judge(self, rate: float, log: RunLog | None) -> tuple[bool, list[str]]:
        """Ends an epoch: computes its held-out AUC; returns whether it is the best so far, and what to print."""
        progress, config = self.state.progress, self.config
        loss, (score, found) = progress.epoch_loss / self.data.steps_per_epoch, self.judge_held_out()
        progress.epoch += 1
        progress.restart_epoch()
        is_best = score is None or score > progress.best_auc
        if is_best:
            progress.best_epoch, progress.best_auc = progress.epoch, -1.0 if score is None else score
        out_of_patience = 0 < config.patience <= progress.epoch - progress.best_epoch
        progress.finished = out_of_patience or progress.epoch == config.epochs
        judged = "" if score is None else f"  held-out AUC {score:.4f}{' (best)' if is_best else ''}"
        skipped = f"  {progress.skipped} steps skipped so far" if progress.skipped else ""
        lines = [f"epoch {progress.epoch}/{config.epochs}  loss {loss:.3f}{judged}  {rate:,.0f} img/s{skipped}"]
        lines += [f"ALARM {name}: {text}" for name, text in found.items() if name not in self.alarmed]
        self.alarmed |= found.keys()
        if log is not None:
            about = {"step": progress.step, "epoch": progress.epoch, "loss": loss, "holdout_auc": score}
            log.epoch(**about, alarms=", ".join(found), img_per_s=round(rate, 1), **self._skipped())
        return is_best, lines

    def judge_held_out(self) -> tuple[float | None, dict[str, str]]:
        """AUC over all pairs of the held-out people, and alarms, a sentence by name; (None, {}) where nobody is."""
        if not len(self.data.split.held_out):
            return None, {}
        self.model.eval()
        embeddings, weights, labels = embed_held_out(self.model, self.data.samples, self.data.split.held_out)
        score = auc(*all_pairs(embeddings, labels))
        return score, alarms(embeddings, score, weights if self.config.use_dalora else None)

    def save(self, is_best: bool) -> None:
        """Saves the current step in the run's folder; to be called on every rank."""
        if self.run_dir is not None:
            facts = {"settings": settings_of(self.config), "data": self.data.fingerprint()}
            self.state.save(self.run_dir, facts, is_best)

    def restore(self, checkpoint: Path) -> None:
        """Continues where a verified checkpoint stopped; CheckpointError if it is of another model or other data.

        With --allow-changed other settings and other data of as many people pass: the current epoch starts again.
        """
        self._grow(side_of(checkpoint, self.config))
        written, changed = state_to_resume(checkpoint, self.config, self.model.config, self.data.fingerprint())
        self.state.restore(checkpoint, written)
        self.state.progress.finished = False  # changed settings may ask for more epochs than it had
        if changed:
            self.state.progress.restart_epoch()
