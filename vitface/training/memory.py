"""How much memory a training step takes, and how many blocks to recompute so that it stays within a budget.

Backward needs what forward saved. A block that is recomputed (Chen et al. 2016, arXiv:1604.06174) saves its input alone
and runs a second time in the backward pass. The arithmetic, with n blocks recomputed and B images:

    constant   parameters, and for each trained one its gradient and AdamW's two moments
    saved      B · (what autograd saves for an image + n · a block's input)
    at work    B · 2 · what a block saves: the block being recomputed, and gradients of the same size

What autograd saves is not modelled but measured on two images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitface.errors import ConfigError
from vitface.model.face import FaceModel
from vitface.model.lora import Mix

GB = 10**9
PROBE = 2  # images; batch norm needs two


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted bytes of a step with `recomputed` of `depth` blocks recomputed."""

    recomputed: int
    depth: int
    constant: int
    per_image: int
    batch_size: int

    @property
    def total(self) -> int:
        return self.constant + self.batch_size * self.per_image

    def __str__(self) -> str:
        return f"about {self.total / GB:.2g} GB a step, {self.recomputed} of {self.depth} blocks recomputed"


def fit_memory(model: FaceModel, margin: nn.Module, batch_size: int, budget: float | None) -> MemoryPlan:
    """Has `model` recompute as many blocks as `plan_memory` finds necessary, and returns that plan."""
    plan = plan_memory(model, margin, batch_size, budget)
    model.vit.recompute(plan.recomputed)
    return plan


def plan_memory(model: FaceModel, margin: nn.Module, batch_size: int, budget: float | None) -> MemoryPlan:
    """The fewest recomputed blocks that keep a step within `budget` GB (None: any size). The model stays as it was.

    ConfigError, naming a batch size that would fit, if recomputing every block is not enough.
    """
    vit, plan = model.vit, None
    parameters = [*model.parameters(), *margin.parameters()]
    constant = sum(p.nbytes * (4 if p.requires_grad else 1) for p in parameters)
    constant += sum(buffer.nbytes for buffer in margin.buffers())  # a sampled identity matrix and its moments
    images = torch.zeros(PROBE, 3, vit.image_size, vit.image_size, device=vit.pos_embed.device)
    before, buffers = vit.recomputed, {name: buffer.clone() for name, buffer in model.named_buffers()}
    entry = vit.tokens(images).detach().requires_grad_()
    mix = Mix(entry.new_ones(PROBE, model.config.num_domains) if model.router is not None else None)
    block = saved_bytes(lambda: vit.blocks[0](entry, mix), model)
    try:
        for recomputed in range(len(vit.blocks) + 1):
            vit.recompute(recomputed)
            saved = saved_bytes(lambda: model(images), model) + recomputed * entry.nbytes + 2 * block
            plan = MemoryPlan(recomputed, len(vit.blocks), constant, saved // PROBE, batch_size)
            if budget is None or plan.total <= budget * GB:
                return plan
    finally:
        vit.recompute(before)
        for name, buffer in model.named_buffers():  # the batch norm must not remember the probe
            buffer.copy_(buffers[name])
    assert plan is not None and budget is not None
    fits = int((budget * GB - constant) / plan.per_image)
    advice = f"--batch-size {fits} would fit" if fits > 1 else "no batch size fits"
    raise ConfigError(f"--memory-budget {budget} is too little, a step needs {plan.total / GB:.2g} GB; {advice}")


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """The bytes that autograd keeps alive for the backward pass of what `run` computes, beside `model`'s parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run()  # noqa: F841  # while it lives, no two storages share an address
    return sum(size for address, size in kept.items() if address not in parameters)
