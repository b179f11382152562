"""One training step: loss, gradients, clipping, update. And what the optimiser is given to work on."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitface.config import TrainConfig
from vitface.errors import VitfaceError
from vitface.model.margin import MarginLoss
from vitface.model.router import load_balance_loss, router_z_loss


class NonFiniteError(VitfaceError):
    """The loss or a gradient became NaN or infinite; the step was not taken."""


def parameter_groups(model: nn.Module, margin: MarginLoss, config: TrainConfig) -> list[dict]:
    """AdamW's groups: adapters, router and head at `lr`, the identity matrix at `head_lr`.

    Weight decay on matrices only, never on biases and norms.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "peak_lr": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "peak_lr": config.lr, "weight_decay": 0.0},
        {"params": [margin.weight], "peak_lr": config.head_lr, "weight_decay": config.weight_decay},
    ]
    return [group for group in groups if group["params"]]


def schedule(step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor of the peak learning rate at step 0, 1, ...: linear warm-up, then a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(total_steps - warmup_steps, 1)))


def total_loss(
    model: nn.Module, margin: MarginLoss, images: Tensor, labels: Tensor, domains: Tensor | None, config: TrainConfig
) -> dict[str, Tensor]:
    """Normalised images (B, 3, S, S), labels (B,), domains (B,) or None -> {"loss", "margin_loss", ...}, scalars."""
    embedding, logits = model(images)
    parts = {"margin_loss": margin(embedding, labels)}
    loss = parts["margin_loss"]
    if logits is not None and logits.requires_grad:  # a fixed gate learns nothing
        parts["balance_loss"] = load_balance_loss(logits)
        loss = loss + config.balance_loss_weight * parts["balance_loss"]
        loss = loss + config.router_z_loss_weight * router_z_loss(logits)
        if domains is not None:
            parts["domain_loss"] = F.cross_entropy(logits, domains)
            loss = loss + config.domain_loss_weight * parts["domain_loss"]
    return {"loss": loss, **parts}


def update(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Iterable[nn.Parameter], clip: float) -> float:
    """Backward pass, clipping to norm `clip`, one optimiser step; the gradient's norm before clipping.

    NonFiniteError, with the parameters as they were, if the loss or the norm is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    if not (torch.isfinite(loss) and torch.isfinite(norm)):
        raise NonFiniteError(
            f"loss {loss.item()}, gradient norm {norm.item()}: stopped before the update; try a lower --lr, "
            f"a smaller --margin, or --dtype fp32"
        )
    optimizer.step()
    return norm.item()
