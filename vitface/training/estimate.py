"""How long a run will take: one step and one batch of embeddings are measured, the rest is arithmetic."""

import dataclasses
import time

import numpy as np
import torch
from torch import nn

from vitface.config import TrainConfig
from vitface.data.images import CROP_SIZE
from vitface.data.synthetic.worlds import SYNTHETIC
from vitface.errors import VitfaceError
from vitface.evaluation.benchmarks import BENCHMARKS, read_benchmark
from vitface.evaluation.judging import is_kept
from vitface.model.face import FaceModel
from vitface.model.inference import embed_crops, split
from vitface.store.faces import frozen_config
from vitface.training.batches import Batch
from vitface.training.memory import kept_buffers
from vitface.training.ranks.identities import ShardedMargin
from vitface.training.step import compiled, total_loss


def seconds_per_step(
    model: nn.Module, margin: nn.Module, side: int, micro_batch: int, labelled: bool, config: TrainConfig
) -> float:
    """Estimates a step's time from one forward and backward pass on blank images, after one to warm up.

    They have domains if the run's images are `labelled` with theirs, so that --compile makes the graph of the run. The
    model and the loss are left as they were.
    """
    images = torch.zeros(micro_batch, 3, side, side, device=config.device)
    labels = torch.zeros(micro_batch, dtype=torch.long, device=config.device)
    batch = Batch(images, labels, labels if labelled else None, np.zeros(1, int))
    seconds = 0.0
    with kept_buffers(model, margin):
        if isinstance(margin, ShardedMargin):
            margin.draw(0, batch.people)
        for _ in range(2):
            start = time.perf_counter()
            compiled(total_loss, config)(model, margin, batch, config)["loss"].backward()
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            seconds = time.perf_counter() - start
        if isinstance(margin, ShardedMargin):
            margin.put_back()
    for module in (model, margin):
        module.zero_grad(set_to_none=True)
    return config.grad_accum * seconds


def seconds_per_image(model: FaceModel) -> float:
    """Estimates the time of embedding one image, from one batch of blank ones after one to warm up.

    The model is left as it was.
    """
    blank = torch.zeros(128, CROP_SIZE, CROP_SIZE, 3, dtype=torch.uint8)
    batch, seconds, training = next(iter(split(model, blank))), 0.0, model.training
    model.eval()
    for _ in range(2):
        start = time.perf_counter()
        embed_crops(model, batch, flip=False)[0].cpu()
        seconds = time.perf_counter() - start
    model.train(training)
    return seconds / len(batch)


def duration(seconds: float) -> str:
    """As people say it: 40 s, 25 min, 3 h 20 min, 2 days 5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


@dataclasses.dataclass(frozen=True)
class FinalEvaluation:
    """What the end of a run will evaluate: `images` to embed, each twice, and why some benchmarks cannot be read."""

    images: int
    problems: list[str]


def final_evaluation(model: FaceModel, names: list[str], data_dir: str, with_frozen: bool) -> FinalEvaluation:
    """Of the adapted model, and of the frozen backbone where its results are not kept."""
    images, problems = 0, []
    for name in names:
        kept, count = False, 0
        if name in SYNTHETIC:
            count = 2 * BENCHMARKS[name].pairs
        else:
            try:
                pairs = read_benchmark(name, data_dir)
            except VitfaceError as error:
                problems.append(str(error))
                continue
            count = len(pairs.distinct()[0])
            kept = is_kept(
                dataclasses.replace(frozen_config(model.config), dtype="fp32"),
                model.vit.device,
                name,
                pairs.sha256(),
            )
        images += count * (1 + (with_frozen and not kept))
    return FinalEvaluation(images, problems)
