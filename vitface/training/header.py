"""What is printed before the first step of a run."""

import dataclasses
import textwrap

from vitface.config import differences
from vitface.model.face import fastest_ops
from vitface.training import setup
from vitface.training.loop import Trainer
from vitface.training.ranks.process_group import world_size


def header(trainer: Trainer) -> str:
    """Config, data, machine, parameters, memory, estimated time."""
    config, data, progress = trainer.config, trainer.data, trainer.state.progress
    split, benchmarks = data.split, setup.final_benchmarks(config)
    preset = f"preset {config.exp}" if config.exp else "defaults"
    changed = ", ".join(f"{name} {value}" for name, value in differences(dataclasses.asdict(config)).items())
    seconds = trainer.seconds_per_step
    steps_left = trainer.total_steps - progress.step
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    layers = fastest_ops(trainer.device).__name__.rsplit(".", 1)[-1].replace("ops", "reference")
    parts = f" in passes of {data.micro_batch}" if config.grad_accum > 1 or ranks else ""
    return "\n".join(
        [
            textwrap.fill(f"config: {preset}{changed and f' with {changed}'}", width=110, subsequent_indent="        "),
            f"data: {len(split.indices):,} images of {split.num_people:,} people to train on, "
            f"{len(split.held_out):,} images of other people held out"
            f"{', with domain labels' if data.domains is not None else ''}",
            f"evaluated at the end on: {', '.join(benchmarks) or 'nothing, there is no benchmark in --val-data'}",
            f"device: {config.device}, {config.dtype}, layers: {layers}{ranks}{parts}",
            setup.parameter_table(trainer.model, trainer.margin),
            f"memory: {trainer.memory}",
            f"estimated time: {seconds * steps_left / 60:.1f} min for {steps_left:,} steps "
            f"({config.batch_size / seconds:,.0f} img/s before reading and augmenting)",
        ]
    )
