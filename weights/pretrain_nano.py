"""The small backbone of the demo, pretrained by inverse graphics: from a rendered face back to the numbers it was drawn from.

    python -m vitface.weights.pretrain_nano --out weights/vit_nano.safetensors

Every image shows another person (of PRETRAIN_PEOPLE, whom no demo meets) under a random yaw, age and light; a linear layer
on CLS regresses all of the renderer's numbers, standardised: the identity's, the view's and the photo's alike. The
result is a general describer of faces and, like any foundation model, not yet a recogniser: pose and light fill its CLS
as much as identity does.
"""

import argparse
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vitface.config import VIT_PRESETS, ViTConfig
from vitface.data.preprocess import normalise, to_float
from vitface.data.render import FACTORS, MOMENTS, identity_factors, photo_moments, render_faces, uniform
from vitface.data.synthetic import PRETRAIN_PEOPLE, synthetic_pairs
from vitface.evaluation.verify import pair_distance, verify
from vitface.model.store import save_backbone
from vitface.model.vit import ViT, init_weights

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 64, 1e-3, 0.05, 0.05
VIEW = ("sin_yaw", "abs_sin_yaw", "age", "light")
TARGETS = (*FACTORS, *VIEW, *MOMENTS)
HELD_OUT = 10_000  # the last people of PRETRAIN_PEOPLE are kept for the report


def draw_batch(first_person: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """BATCH_SIZE people in a row, one photo each -> images uint8 (B, 112, 112, 3), standardised targets float32 (B, T)."""
    people = np.arange(first_person, first_person + BATCH_SIZE)
    view = np.array([uniform(4, 8, seed, person) for person in people.tolist()])
    yaw, age, light = 180 * view[:, 0] - 90, view[:, 1], 2 * view[:, 2] - 1
    seeds = (view[:, 3] * 2**53).astype(np.int64)
    turned = np.sin(np.radians(yaw))
    columns = np.column_stack([turned / 0.65, (abs(turned) - 0.62) / 0.33, (age - 0.5) * 12**0.5, light * 3**0.5])
    targets = np.concatenate([identity_factors(people) * 3**0.5, columns, photo_moments(seeds) * 3**0.5], axis=1)
    return render_faces(people, yaw, age, light, seeds), targets.astype(np.float32)


def batches(first_people: range, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches in order, drawn ahead by one other process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(draw_batch, first, seed) for first in first_people[:8]]
        for first in [*first_people[8:], *[None] * len(pending)]:
            images, targets = pending.pop(0).result()
            if first is not None:
                pending.append(pool.submit(draw_batch, first, seed))
            yield torch.from_numpy(images), torch.from_numpy(targets)


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; progress in [0, 1)."""
    if progress < WARMUP:
        return LEARNING_RATE * (progress + 1e-3) / WARMUP
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


def pretrain(config: ViTConfig, num_images: int, seed: int) -> tuple[ViT, nn.Linear]:
    """A ViT and its regression layer after one pass over `num_images` people."""
    torch.manual_seed(seed)
    vit, regress = ViT(config, config.native_size), nn.Linear(config.embed_dim, len(TARGETS))
    init_weights(vit, seed)
    parameters = [*vit.parameters(), *regress.parameters()]
    groups = [[p for p in parameters if (p.dim() > 1) == matrix] for matrix in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": WEIGHT_DECAY}, {"params": groups[1], "weight_decay": 0.0}]
    )
    steps = num_images // BATCH_SIZE
    bar = tqdm(batches(range(PRETRAIN_PEOPLE.start, steps * BATCH_SIZE, BATCH_SIZE), seed), total=steps, unit="batch")
    for step, (images, targets) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps)
        loss = F.mse_loss(regress(vit(normalise(to_float(images), config.mean, config.std))[:, 0]), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return vit.eval(), regress.eval()


@torch.no_grad()
def cls_tokens(vit: ViT, images: Tensor) -> Tensor:
    """uint8 (B, 112, 112, 3) -> CLS (B, D)."""
    parts = [vit(normalise(to_float(part), vit.config.mean, vit.config.std))[:, 0] for part in images.split(BATCH_SIZE)]
    return torch.cat(parts)


def frozen_accuracy(vit: ViT, kind: str) -> float:
    """10-fold verification accuracy of the raw CLS (sum of image and mirror image, cosine) on unseen people."""
    images, issame = synthetic_pairs(600, seed=1, kind=kind)
    pixels = torch.from_numpy(images)
    embedding = (cls_tokens(vit, pixels) + cls_tokens(vit, pixels.flip(2))).numpy()
    return verify(pair_distance(embedding[0::2], embedding[1::2]), issame).accuracy


def report(vit: ViT, regress: nn.Linear, seed: int) -> str:
    """How well held-out people's numbers are recovered (R²), and how well the raw CLS recognises people."""
    drawn = [draw_batch(PRETRAIN_PEOPLE.stop - HELD_OUT + i * BATCH_SIZE, seed) for i in range(16)]
    images, targets = (torch.from_numpy(np.concatenate(column)) for column in zip(*drawn, strict=True))
    with torch.no_grad():
        error = (regress(cls_tokens(vit, images)) - targets).square().mean(dim=0)
    explained = (1 - error / targets.var(dim=0)).tolist()
    lines = [f"{name:16s} R² {value:6.3f}" for name, value in zip(TARGETS, explained, strict=True)]
    lines += [f"mean R²: identity {np.mean(explained[: len(FACTORS)]):.3f}, all {np.mean(explained):.3f}"]
    for kind in ("mixed", "frontal-profile"):
        lines += [f"frozen CLS, {kind} pairs of unseen people: {100 * frozen_accuracy(vit, kind):.1f} %"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain the demo's vit_nano on procedural faces.")
    parser.add_argument("--out", type=Path, required=True, help="the backbone file to write")
    parser.add_argument("--images", type=int, default=100_000, help="training images, each of another person")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the photos")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; one more process draws the images")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = VIT_PRESETS["vit_nano"]
    vit, regress = pretrain(config, args.images, args.seed)
    print(report(vit, regress, args.seed))
    source = {
        "file": "procedural",
        "licence": "Apache-2.0",
        "command": f"python -m vitface.weights.pretrain_nano --images {args.images} --seed {args.seed}",
    }
    save_backbone(args.out, "vit_nano", config, {k: t.half() for k, t in vit.state_dict().items()}, source)


if __name__ == "__main__":
    main()
