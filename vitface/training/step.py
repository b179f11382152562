"""One training step: loss, gradients, clipping, update. And what the optimiser is given to work on."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitface.config import TrainConfig
from vitface.errors import VitfaceError
from vitface.model.router import load_balance_loss, router_z_loss
from vitface.training.distributed import lowest, rank, share, world_size
from vitface.training.parallel import clip_gradients, mean_over_ranks


class NonFiniteError(VitfaceError):
    """The loss or a gradient became NaN or infinite, first on rank `culprit`; the step was not taken."""

    def __init__(self, message: str, culprit: int = 0):
        super().__init__(message)
        self.culprit = culprit


def parameter_groups(model: nn.Module, margin: nn.Module, config: TrainConfig) -> list[dict]:
    """AdamW's groups: adapters, router and head at `lr`, the identity matrix at `head_lr`.

    Weight decay on matrices only, never on biases and norms.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "peak_lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "peak_lr": config.lr, "weight_decay": 0.0},
        {"params": list(margin.parameters()), "peak_lr": config.head_lr, "weight_decay": config.weight_decay},
    ]
    return [group for group in groups if group["params"]]


def schedule(step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor of the peak learning rate at step 0, 1, ...: linear warm-up, then a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1)))


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
        loss = loss + config.router_z_loss_weight * router_z_loss(logits)
        if domains is not None:
            parts["domain_loss"] = F.cross_entropy(logits, domains)
            loss = loss + config.domain_loss_weight * parts["domain_loss"]
    return {"loss": loss, **parts}


def update(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter], clip: float) -> float:
    """Backward pass, clipping to norm `clip`, one optimiser step, gradients to none; their norm before clipping.

    NonFiniteError, on every rank and with the parameters as they were, if a loss or the norm is not finite on any.
    """
    loss.backward()
    parameters = list(parameters)
    value, norm = loss.item(), clip_gradients(parameters, clip).item()
    bad_norm = not math.isfinite(norm)
    own = bad_norm and not all(p.grad.isfinite().all() for p in parameters if p.grad is not None)
    culprit = first_fault([not math.isfinite(value), own, bad_norm])
    if culprit is not None:
        found = share(f"loss {value}, gradient norm {norm}", culprit)
        where = f"rank {culprit}: " if world_size() > 1 else ""
        raise NonFiniteError(
            f"{where}{found}: stopped before the update; try a lower --lr, a smaller --margin, or --dtype fp32",
            culprit,
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def first_fault(faults: list[bool]) -> int | None:
    """The first rank that has the first of these faults that any has, None if none has any; the same on every rank."""
    worst = faults.index(True) if any(faults) else len(faults)
    found = lowest(worst * world_size() + rank())
    return found % world_size() if found < len(faults) * world_size() else None
