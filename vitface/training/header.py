"""The lines that a run prints before its first step."""

import dataclasses
import textwrap

from vitface.config import differences
from vitface.device import dtype_note
from vitface.model.counts import parameter_counts
from vitface.model.face import FaceModel
from vitface.training import setup
from vitface.training.estimate import duration, final_evaluation, seconds_per_image
from vitface.training.holdout import HOLDOUT_IMAGES
from vitface.training.loop import Trainer
from vitface.training.ranks.process_group import world_size
from vitface.training.runs.state import Margin


def header(trainer: Trainer, with_frozen: bool) -> str:
    """Settings, data, machine, parameters and estimated time; `with_frozen` as in `training.run.run`."""
    config, data = trainer.config, trainer.data
    split, benchmarks = data.split, [] if config.dry_run else setup.final_benchmarks(config)
    nothing = "nothing, it is a dry run" if config.dry_run else "nothing, there is no benchmark in --val-data"
    preset = f"preset {config.exp}" if config.exp else "defaults"
    changed = ", ".join(f"{name} {value}" for name, value in differences(dataclasses.asdict(config)).items())
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    face = trainer.model.config
    dtype = dtype_note(face.dtype, trainer.device, face.vit.embed_dim)
    parts = f" in passes of {data.micro_batch}" if config.grad_accum > 1 or ranks else ""
    return "\n".join(
        [
            textwrap.fill(f"config: {preset}{changed and f' with {changed}'}", width=110, subsequent_indent="        "),
            f"data: {len(split.indices):,} images of {split.num_people:,} people to train on, "
            f"{len(split.held_out):,} images of other people held out"
            f"{', with domain labels' if data.labelled else ''}",
            f"evaluated at the end on: {', '.join(benchmarks) or nothing}",
            f"device: {config.device}, {dtype}{ranks}{parts}",
            parameter_table(trainer.model, trainer.margin),
            *time_left(trainer, benchmarks, with_frozen),
        ]
    )


def time_left(trainer: Trainer, benchmarks: list[str], with_frozen: bool) -> list[str]:
    """The estimated time of steps and evaluations, and an alarm for each benchmark that will fail."""
    config, progress, held_out = trainer.config, trainer.state.progress, len(trainer.data.split.held_out)
    final = final_evaluation(trainer.model, benchmarks, config.val_data or "", with_frozen)
    images = 2 * final.images + min(held_out, HOLDOUT_IMAGES) * (config.epochs - progress.epoch + 2)
    judging = seconds_per_image(trainer.model) * images / world_size()
    phases, done = [], progress.epoch * trainer.data.steps_per_epoch + progress.steps_into_epoch
    for side, end in config.phases:
        steps, seconds = end * trainer.data.steps_per_epoch - done, trainer.seconds[side]
        if steps > 0:
            size = f" at {side} px" if len(config.phases) > 1 else ""
            rate = f"{config.batch_size / seconds:,.0f} img/s before reading and augmenting"
            phases.append(f"{duration(seconds * steps)} for {steps:,} steps{size} ({rate})")
            done += steps
    times = f"{', '.join(phases)} and {duration(judging)} for evaluating ({images:,} images)"
    return [*(f"ALARM {problem}" for problem in final.problems), f"estimated time: {times}"]


def parameter_table(model: FaceModel, margin: Margin) -> str:
    """A line for each part of the model, and one for the identity matrix."""
    rows = [f"{'parameters':<12}{'total':>14}{'trainable':>14}{'%':>9}"]
    for part, (total, trainable) in parameter_counts(model).items():
        if total:
            rows.append(f"{part:<12}{total:>14,}{trainable:>14,}{100 * trainable / total:>9.2f}")
    people = margin.num_identities
    rows.append(f"{'identities':<12}{people * margin.weight.shape[1]:>14,}  (training only, {people:,} people)")
    return "\n".join(rows)
