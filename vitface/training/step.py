"""One training step: loss, gradients, clipping, update. And what the optimiser is given to work on."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitface.config import TrainConfig
from vitface.model.router import load_balance_loss
from vitface.training.batches import Batch
from vitface.training.loss_scale import LossScale
from vitface.training.ranks.parallel import clip_gradients, mean_over_ranks, on_any_rank

DOMAIN_LOSS_WEIGHT = 0.1


def parameter_groups(model: nn.Module, margin: nn.Module, config: TrainConfig) -> list[dict]:
    """AdamW's groups: adapters, router and head at `lr`, the identity matrix at `identity_lr`.

    Weight decay on matrices only, never on biases and norms.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "peak_lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "peak_lr": config.lr, "weight_decay": 0.0},
        {"params": list(margin.parameters()), "peak_lr": config.identity_lr, "weight_decay": config.weight_decay},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, margin: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW on all that is trained."""
    groups = parameter_groups(model, margin, config)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets each group's learning rate to `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def schedule(step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The factor of the peak learning rate at step 0, 1, ...: linear warm-up, then a cosine down to zero.

    The warm-up takes an epoch, but at most a tenth of the run.
    """
    warmup = min(steps_per_epoch, round(total_steps / 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1)))


def total_loss(model: nn.Module, margin: nn.Module, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """The losses of a micro-batch, scalars by name: "loss", which is minimised, and its parts "margin_loss", ..."""
    embedding, weights, logits = model(batch.images, batch.domains)
    losses = {"margin_loss": margin(embedding, batch.labels)}
    loss = losses["margin_loss"]
    if weights is not None and weights.requires_grad:  # a router that is not trained learns nothing
        losses["balance_loss"] = load_balance_loss(weights, mean_over_ranks)
        loss = loss + config.balance_loss_weight * losses["balance_loss"]
        if batch.domains is not None:
            losses["domain_loss"] = F.cross_entropy(logits, batch.domains)
            loss = loss + DOMAIN_LOSS_WEIGHT * losses["domain_loss"]
    return {"loss": loss, **losses}


def compiled(losses: Callable, config: TrainConfig) -> Callable:
    """`losses`, such as `total_loss`; with --compile by torch.compile, which makes one graph of model and margin."""
    return torch.compile(losses) if config.compile else losses


class Outcome(NamedTuple):
    """What became of a step, as scalars on the device that nobody has waited for."""

    loss: Tensor
    norm: Tensor  # of the gradient, before clipping
    bad: Tensor  # 1.0 if a loss or the norm is not finite on any rank: then nothing was updated; else 0.0


def update(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter], clip: float, scale: LossScale
) -> Outcome:
    """Backward pass, clipping to norm `clip`, one step of a fused optimiser; without waiting for the device.

    Parameters and moments stay bit for bit as they were if the outcome is bad; what a forward pass averages, the
    statistics of batch norm and AdaFace, has moved. The gradients are left, for a diagnosis.
    """
    scale(loss).backward()
    parameters, loss = list(parameters), loss.detach()
    scale.unscale(parameters)
    norm = clip_gradients(parameters, clip)
    bad = on_any_rank(1 - (loss.isfinite() & norm.isfinite()).float())
    optimizer.found_inf = bad  # type: ignore[attr-defined]  # a fused one reads it on the device, as from GradScaler
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    scale.update(bad)
    return Outcome(loss, norm, bad)
