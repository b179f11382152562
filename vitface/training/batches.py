"""Which images a rank sees in a step, read and augmented.

A step's images are `batch_size` consecutive ones of the epoch's order, whatever the number of ranks. They are cut into
equal parts, rank after rank, and each rank's part into its micro-batches: two ranks see what one process sees in two
micro-batches. Letters: b images of a micro-batch.
"""

from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from vitface.config import TrainConfig
from vitface.data.augment import augment, uniforms
from vitface.data.formats.samples import Samples
from vitface.data.loader import Split, epoch_order, read_batches
from vitface.data.preprocess import to_float
from vitface.errors import ConfigError
from vitface.training.ranks.process_group import rank, world_size

Batch = tuple[Tensor, Tensor, Tensor | None, np.ndarray]  # images, labels, domains, people of the whole step


def micro_batch_size(config: TrainConfig) -> int:
    """b; ConfigError unless the ranks and their micro-batches share a step's images evenly."""
    if config.batch_size % (world_size() * config.grad_accum):
        parts = f"{world_size()} ranks x --grad-accum {config.grad_accum}"
        raise ConfigError(f"--batch-size {config.batch_size} is no multiple of {parts}")
    return config.batch_size // (world_size() * config.grad_accum)


def rank_batches(
    config: TrainConfig, samples: Samples, split: Split, epoch: int, steps: range, domains: np.ndarray | None
) -> Generator[Batch]:
    """This rank's micro-batches of some steps of an epoch, in order: augmented float images (b, 3, 112, 112) in [0, 1],
    labels (b,), of `domains` (n,) of all samples theirs (b,), and the labels of the whole step (batch_size,)."""
    device, size = torch.device(config.device), micro_batch_size(config)
    order = epoch_order(len(split.labels), config.seed, epoch)
    whole = [order[step * config.batch_size : (step + 1) * config.batch_size] for step in steps]
    first = rank() * config.grad_accum
    parts = [step.reshape(-1, size)[first : first + config.grad_accum] for step in whole]
    positions = [part for step in parts for part in step]
    pinned = device.type == "cuda"
    batches = read_batches(samples, split.indices, positions, config.num_workers, pinned)
    for number, (where, images) in enumerate(batches):
        u = uniforms(config.seed, epoch, split.indices[where])
        pixels = augment(to_float(images.to(device, non_blocking=True)), u, config.augment)
        labels = torch.from_numpy(split.labels[where]).to(device)
        known = None if domains is None else torch.from_numpy(domains[split.indices[where]]).to(device)
        yield pixels, labels, known, split.labels[whole[number // config.grad_accum]]
