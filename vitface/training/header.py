"""The lines that a run prints before its first step."""

import dataclasses
import textwrap

from vitface.config import differences
from vitface.device import dtype_note
from vitface.model.counts import parameter_counts
from vitface.model.face import FaceModel
from vitface.training import setup
from vitface.training.loop import Trainer
from vitface.training.ranks.process_group import world_size
from vitface.training.runs.state import Margin


def header(trainer: Trainer) -> str:
    """Settings, data, machine, parameters, memory and estimated time."""
    config, data, progress = trainer.config, trainer.data, trainer.state.progress
    split, benchmarks = data.split, setup.final_benchmarks(config)
    preset = f"preset {config.exp}" if config.exp else "defaults"
    changed = ", ".join(f"{name} {value}" for name, value in differences(dataclasses.asdict(config)).items())
    seconds = trainer.seconds_per_step
    steps_left = trainer.total_steps - progress.step
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    face = trainer.model.config
    dtype = dtype_note(face.dtype, trainer.device, face.vit.embed_dim)
    parts = f" in passes of {data.micro_batch}" if config.grad_accum > 1 or ranks else ""
    return "\n".join(
        [
            textwrap.fill(f"config: {preset}{changed and f' with {changed}'}", width=110, subsequent_indent="        "),
            f"data: {len(split.indices):,} images of {split.num_people:,} people to train on, "
            f"{len(split.held_out):,} images of other people held out"
            f"{', with domain labels' if data.domains is not None else ''}",
            f"evaluated at the end on: {', '.join(benchmarks) or 'nothing, there is no benchmark in --val-data'}",
            f"device: {config.device}, {dtype}{ranks}{parts}",
            parameter_table(trainer.model, trainer.margin),
            f"memory: {trainer.memory}",
            f"estimated time: {seconds * steps_left / 60:.1f} min for {steps_left:,} steps "
            f"({config.batch_size / seconds:,.0f} img/s before reading and augmenting)",
        ]
    )


def parameter_table(model: FaceModel, margin: Margin) -> str:
    """A line for each part of the model, and one for the identity matrix."""
    rows = [f"{'parameters':<12}{'total':>14}{'trainable':>14}{'%':>9}"]
    for part, (total, trainable) in parameter_counts(model).items():
        if total:
            rows.append(f"{part:<12}{total:>14,}{trainable:>14,}{100 * trainable / total:>9.2f}")
    people = margin.num_identities
    rows.append(f"{'identities':<12}{people * margin.weight.shape[1]:>14,}  (training only, {people:,} people)")
    return "\n".join(rows)
