"""Pretrains vit_nano, the small backbone of the demo, by inverse graphics: from a face back to what it was drawn from.

    python docs/pretrain_nano.py --out weights/vit_nano.safetensors

Every image shows another person (of PRETRAIN_PEOPLE, whom no demo meets) under a random yaw, age and light. A linear
layer on CLS regresses the renderer's numbers; a linear layer on every patch token regresses the unlit colour and the
head-frame position of what its patch shows. The result describes faces, but like any foundation model it is not a
recogniser yet: pose, age and light fill its CLS as much as identity does.
"""

import argparse
import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import tqdm

from vitface.data.background import in_processes
from vitface.data.counter import uniform
from vitface.data.preprocess import normalise, to_float
from vitface.data.synthetic.render import FACTORS, MOMENTS, identity_factors, photo_moments, render_scenes
from vitface.data.synthetic.worlds import PRETRAIN_PEOPLE
from vitface.model.vit import ViT, init_weights
from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.store.backbone import save_backbone

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 32, 2e-3, 0.05, 0.05
VIEW = ("sin_yaw", "abs_sin_yaw", "age", "light")
TARGETS = (*FACTORS, *VIEW, *MOMENTS)
WEIGHTS = torch.tensor([1.0] * len(FACTORS) + [3.0] * len(VIEW) + [0.2] * len(MOMENTS))
TRUTH, TRUTH_VARIANCE = 28 * 28 * 7, 0.12
HELD_OUT = 10_000  # the last people of PRETRAIN_PEOPLE, who are kept for the report


def draw_batch(seed: int, first_person: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BATCH_SIZE people in a row, one photo each.

    Returns images uint8 (B, 112, 112, 3), numbers float32 (B, T) of unit variance, truth float16 (B, 28, 28, 7).
    """
    people = np.arange(first_person, first_person + BATCH_SIZE)
    view = np.array([uniform(4, 8, seed, person) for person in people.tolist()])
    yaw, age, light = 180 * view[:, 0] - 90, view[:, 1], 2 * view[:, 2] - 1
    seeds = (view[:, 3] * 2**53).astype(np.int64)
    turned = np.sin(np.radians(yaw))
    angles = np.column_stack([turned * 2**0.5, (abs(turned) - 2 / np.pi) / 0.308])
    even = np.column_stack([2 * age - 1, light, photo_moments(seeds)])
    numbers = np.concatenate([identity_factors(people) * 3**0.5, angles, even * 3**0.5], axis=1)
    images, truth = render_scenes(people, yaw, age, light, seeds)
    return images, numbers.astype(np.float32), truth


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to zero; progress in [0, 1)."""
    if progress < WARMUP:
        return LEARNING_RATE * (progress + 1e-3) / WARMUP
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))


@torch.no_grad()
def init_for_regression(vit: ViT, seed: int) -> None:
    """Glorot-uniform matrices, sine-cosine positions: a narrow ViT in a short run needs the larger scale."""
    torch.manual_seed(seed)
    init_weights(vit, seed)
    for parameter in vit.blocks.parameters():
        if parameter.dim() == 2:
            nn.init.xavier_uniform_(parameter)
    kernel = vit.patch_embed.proj.weight
    nn.init.normal_(kernel, std=kernel[0].numel() ** -0.5)
    side, quarter = vit.config.grid(vit.image_size), vit.config.embed_dim // 4
    waves = torch.outer(torch.arange(side), 100.0 ** (-torch.arange(quarter) / quarter))
    table = torch.cat([waves.sin(), waves.cos()], dim=1)  # (side, D / 2)
    grid = [table[:, None].expand(side, side, -1), table[None].expand(side, side, -1)]
    vit.pos_embed[0, 1:] = 0.5 * rearrange(torch.cat(grid, dim=2), "h w d -> (h w) d")


def pretrain(config: ViTConfig, num_images: int, seed: int) -> tuple[ViT, nn.Linear]:
    """A ViT and its regression layer after one pass over `num_images` people."""
    vit, side = ViT(config, config.native_size), config.grid(config.native_size)
    init_for_regression(vit, seed)
    numbers_of, truth_of = nn.Linear(config.embed_dim, len(TARGETS)), nn.Linear(config.embed_dim, TRUTH // side**2)
    parameters = [*vit.parameters(), *numbers_of.parameters(), *truth_of.parameters()]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, (0.9, 0.98), weight_decay=WEIGHT_DECAY)
    steps = num_images // BATCH_SIZE
    first_people = range(PRETRAIN_PEOPLE.start, PRETRAIN_PEOPLE.start + steps * BATCH_SIZE, BATCH_SIZE)
    batches = in_processes(functools.partial(draw_batch, seed), first_people, num_workers=1)
    bar = tqdm(batches, total=steps, unit="batch", mininterval=1)
    for step, batch in enumerate(bar):
        images, numbers, truth = map(torch.from_numpy, batch)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps)
        tokens = vit(normalise(to_float(images), config.mean, config.std))
        error = (numbers_of(tokens[:, 0]) - numbers).square().mean(dim=0)
        cells = rearrange(truth.float(), "b (h p) (w q) c -> b (h w) (p q c)", h=side, w=side)
        dense = F.mse_loss(truth_of(tokens[:, 1:]), cells) / TRUTH_VARIANCE
        loss = (error * WEIGHTS).sum() / WEIGHTS.sum() + dense
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(identity=f"{error[: len(FACTORS)].mean():.3f}", dense=f"{dense:.3f}")
    return vit.eval(), numbers_of.eval()


@torch.inference_mode()
def report(vit: ViT, regress: nn.Linear, seed: int) -> str:
    """The share of variance (R²) of held-out people's numbers that CLS explains."""
    errors, targets = [], []
    for i in range(32):
        images, numbers, _ = draw_batch(seed, PRETRAIN_PEOPLE.stop - HELD_OUT + i * BATCH_SIZE)
        cls = vit(normalise(to_float(torch.from_numpy(images)), vit.config.mean, vit.config.std))[:, 0]
        targets.append(torch.from_numpy(numbers))
        errors.append(regress(cls) - targets[-1])
    explained = (1 - torch.cat(errors).square().mean(dim=0) / torch.cat(targets).var(dim=0)).tolist()
    return f"mean R²: identity {np.mean(explained[: len(FACTORS)]):.3f}, all {np.mean(explained):.3f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pretrain the demo's vit_nano on procedural faces.")
    parser.add_argument("--out", type=Path, required=True, help="the backbone file to write")
    parser.add_argument("--images", type=int, default=120_000, help="training images, each of another person")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the photos")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; another process draws the images")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    config = VIT_PRESETS["vit_nano"]
    vit, regress = pretrain(config, args.images, args.seed)
    print(report(vit, regress, args.seed))
    source = {
        "file": "procedural",
        "licence": "Apache-2.0",
        "command": f"python docs/pretrain_nano.py --images {args.images} --seed {args.seed}",
    }
    save_backbone(args.out, "vit_nano", config, {k: t.half() for k, t in vit.state_dict().items()}, source)


if __name__ == "__main__":
    main()
