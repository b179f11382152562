"""One training step: loss, gradients, clipping, update. And what the optimiser is given to work on."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitface.config import TrainConfig
from vitface.errors import VitfaceError
from vitface.model.router import load_balance_loss
from vitface.training.loss_scale import LossScale
from vitface.training.ranks.parallel import clip_gradients, mean_over_ranks, on_any_rank
from vitface.training.ranks.process_group import lowest, rank, share, world_size

DOMAIN_LOSS_WEIGHT = 0.1


class NonFiniteError(VitfaceError):
    """The loss or a gradient became NaN or infinite, first on rank `culprit`; the step was not taken."""

    def __init__(self, message: str, culprit: int = 0):
        super().__init__(message)
        self.culprit = culprit


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
    return torch.optim.AdamW(groups, lr=config.lr, fused=config.device.startswith(("cpu", "cuda")))


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


def total_loss(
    model: nn.Module, margin: nn.Module, images: Tensor, labels: Tensor, domains: Tensor | None, config: TrainConfig
) -> dict[str, Tensor]:
    """Normalised images (B, 3, S, S), labels (B,), domains (B,) or None -> {"loss", "margin_loss", ...}, scalars."""
    embedding, logits = model(images)
    parts = {"margin_loss": margin(embedding, labels)}
    loss = parts["margin_loss"]
    if logits is not None and logits.requires_grad:  # a fixed gate learns nothing
        parts["balance_loss"] = load_balance_loss(logits / config.gate_temperature, mean_over_ranks)
        loss = loss + config.balance_loss_weight * parts["balance_loss"]
        if domains is not None:
            parts["domain_loss"] = F.cross_entropy(logits, domains)
            loss = loss + DOMAIN_LOSS_WEIGHT * parts["domain_loss"]
    return {"loss": loss, **parts}


class Outcome(NamedTuple):
    """What became of a step, as scalars on the device that nobody has waited for."""

    loss: Tensor
    norm: Tensor  # of the gradient, before clipping
    bad: Tensor  # 1.0 if a loss or the norm is not finite on any rank: then nothing was updated; else 0.0


def update(
    optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter], clip: float, scale: LossScale
) -> Outcome:
    """Backward pass, clipping to norm `clip`, one optimiser step; without waiting for the device.

    Parameters and moments stay bit for bit as they were if the outcome is bad. The gradients are left, for a diagnosis.
    """
    scale(loss).backward()
    parameters, loss = list(parameters), loss.detach()
    scale.unscale(parameters)
    norm = clip_gradients(parameters, clip)
    bad = on_any_rank(1 - (loss.isfinite() & norm.isfinite()).float())
    if optimizer.defaults.get("fused"):  # its kernel reads the verdict on the device, as GradScaler passes it
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not bad:
        optimizer.step()
    scale.update(bad)
    return Outcome(loss, norm, bad)


def refusal(reason: str, loss: float, norm: float, parameters: Iterable[nn.Parameter]) -> NonFiniteError:
    """The error after a bad outcome, begun by a `reason`; the same on every rank, and to be called on all of them."""
    own = not all(p.grad.isfinite().all() for p in parameters if p.grad is not None)
    culprit = first_fault([not math.isfinite(loss), own, not math.isfinite(norm)]) or 0
    found = share(f"loss {loss}, gradient norm {norm}", culprit)
    where = f"rank {culprit}: " if world_size() > 1 else ""
    return NonFiniteError(
        f"{reason}{where}{found}: stopped before the update; try a lower --lr, a smaller --margin, or --dtype fp32",
        culprit,
    )


def first_fault(faults: list[bool]) -> int | None:
    """The first rank that has the first of these faults that any has, None if none has any; the same on every rank."""
    worst = faults.index(True) if any(faults) else len(faults)
    found = lowest(worst * world_size() + rank())
    return found % world_size() if found < len(faults) * world_size() else None
