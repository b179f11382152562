"""The images of a rank in each step: read, augmented, and turned into the model's input.

A step's images are `batch_size` consecutive ones of the epoch's order, whatever the number of ranks. They are cut into
equal parts, rank after rank, and each rank's part into its micro-batches: two ranks see what one process sees in two
micro-batches. Letters: b images of a micro-batch, S input side.
"""

import functools
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitface.config import TrainConfig
from vitface.data.augment import augment, plan, uniforms
from vitface.data.degrade import Drawn, Sensors, degrade, draw
from vitface.data.formats.stored import Samples
from vitface.data.loader import Split, epoch_order, read_batches
from vitface.data.preprocess import to_float
from vitface.device import to_device
from vitface.errors import ConfigError
from vitface.files import sha256_bytes
from vitface.model.face import FaceModel
from vitface.training.ranks.process_group import rank, world_size


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run, their split into training and held-out people, and the sizes of its steps."""

    samples: Samples
    split: Split
    domains: np.ndarray | None  # (n,) of all samples, if the data labels as many domains as the model has
    steps_per_epoch: int
    micro_batch: int  # b
    sensors: Sensors = ()  # of --degrade
    sensor_domains: bool = False  # an image's domain is its sensor, 0 for none

    @property
    def labelled(self) -> bool:
        """Whether each image has a domain that is known."""
        return self.domains is not None or self.sensor_domains

    def fingerprint(self) -> dict[str, int | str | None]:
        """Identifies the data by its split, the people's names, the domain labels, and the pixels of packed images, or
        the names and sizes of files."""
        names = sha256_bytes("\0".join(self.samples.names).encode("utf-8", "surrogateescape"))
        domains = None if self.domains is None else sha256_bytes(self.domains.astype("<i8").tobytes())
        images = {"pixels": self.samples.pixels, "files": self.samples.files}
        return {**self.split.fingerprint(), "names": names, "domain labels": domains, **images}


class Batch(NamedTuple):
    """A micro-batch of one rank."""

    images: Tensor  # (b, 3, S, S), the input of the model
    labels: Tensor  # (b,)
    domains: Tensor | None  # (b,)
    people: np.ndarray  # (batch_size,) the labels of the whole step, of all ranks


def micro_batch_size(config: TrainConfig) -> int:
    """b; ConfigError unless the ranks and their micro-batches share a step's images evenly."""
    if config.batch_size % (world_size() * config.grad_accum):
        parts = f"{world_size()} ranks x --grad-accum {config.grad_accum}"
        raise ConfigError(f"--batch-size {config.batch_size} is no multiple of {parts}")
    return config.batch_size // (world_size() * config.grad_accum)


def rank_batches(
    config: TrainConfig, data: TrainingData, model: FaceModel, epoch: int, steps: range
) -> Generator[Batch]:
    """This rank's micro-batches of some steps of an epoch, in order."""
    device, split = torch.device(config.device), data.split
    order = epoch_order(len(split.labels), config.seed, epoch)
    whole = [order[step * config.batch_size : (step + 1) * config.batch_size] for step in steps]
    first = rank() * config.grad_accum
    parts = [step.reshape(-1, data.micro_batch)[first : first + config.grad_accum] for step in whole]
    positions = [part for step in parts for part in step]
    batches = read_batches(data.samples, split.indices, positions, config.num_workers, device.type == "cuda")
    for number, (where, crops) in enumerate(batches):
        indices = split.indices[where]
        planned = to_device(plan(uniforms(config.seed, epoch, indices)), device)
        drawn = draw(data.sensors, config.seed, epoch, indices) if data.sensors else None
        images = training_input(model, to_device(crops, device), planned, config.augment, drawn)
        labels = to_device(torch.from_numpy(split.labels[where]), device)
        kinds = drawn.kinds if drawn and data.sensor_domains else None
        known = kinds if data.domains is None else data.domains[indices]
        domains = None if known is None else to_device(torch.from_numpy(known), device)
        yield Batch(images, labels, domains, split.labels[whole[number // config.grad_accum]])


def training_input(model: FaceModel, crops: Tensor, planned: Tensor, policy: str, drawn: Drawn | None = None) -> Tensor:
    """Crops, uint8 (b, 112, 112, 3) -> input of the model: degraded as `drawn`, augmented by `policy` as `planned`,
    resized, normalised."""
    images = to_float(crops)
    return model.preprocess(augment(degrade(images, drawn) if drawn else images, planned, policy))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that batches are prepared on: the allocator keeps the freed memory of each stream apart."""
    return torch.cuda.Stream(device)


class Ahead(Iterator[Batch]):
    """Batches whose next one can be prepared while the device works: on a GPU on a stream of its own."""

    def __init__(self, batches: Generator[Batch], device: torch.device):
        self.batches = batches
        self.stream = _stream(device) if device.type == "cuda" else None
        self.prepared: list[Batch] = []

    def prepare(self) -> None:
        """Queues the work for the next batch, on a GPU; at the end there is none."""
        if self.stream is not None and not self.prepared:
            with torch.cuda.stream(self.stream):
                self.prepared = list(itertools.islice(self.batches, 1))

    def __next__(self) -> Batch:
        if self.stream is None:
            return next(self.batches)
        self.prepare()
        if not self.prepared:
            raise StopIteration
        batch, stream = self.prepared.pop(), torch.cuda.current_stream(self.stream.device)
        stream.wait_stream(self.stream)
        for tensor in (batch.images, batch.labels, batch.domains):
            if tensor is not None:
                tensor.record_stream(stream)
        return batch

    def close(self) -> None:
        self.batches.close()
