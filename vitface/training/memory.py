"""The memory of a training step, and the number of blocks to recompute so that it stays within a budget.

The backward pass needs the tensors that the forward pass saved. A recomputed block (Chen et al. 2016, arXiv:1604.06174)
saves its input alone and runs again in the backward pass. The arithmetic, with n recomputed blocks and B images:

    constant   parameters, and for each trained one its gradient and AdamW's two moments; the unit prototypes
    saved      B · (what autograd saves for an image, in the model and in the margin's logits + n · a block's input)
    at work    B · 2 · what a block saves: the block being recomputed, and gradients of the same size; or as much of
               the margin, where that is more

The bytes that autograd saves are measured on two images, not modelled.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitface.errors import ConfigError
from vitface.model.face import FaceModel
from vitface.model.lora import Mix
from vitface.model.margin import MarginLoss

GB = 10**9
PROBE = 2  # images; batch norm needs two


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes that a step is predicted to take if `recomputed` of `depth` blocks are recomputed."""

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


def plan_memory(model: FaceModel, margin: nn.Module, batch_size: int, budget: float | None) -> MemoryPlan:
    """Finds the fewest recomputed blocks that keep a step within `budget` GB (None: any size). The model is unchanged.

    ConfigError, naming a batch size that would fit, if recomputing every block is not enough.
    """
    vit, plan = model.vit, None
    parameters = [*model.parameters(), *margin.parameters()]
    constant = sum(p.nbytes * (4 if p.requires_grad else 1) for p in parameters)
    constant += sum(buffer.nbytes for buffer in margin.buffers())  # a sampled identity matrix and its moments
    fixed, per_row = _saved_by_margin(margin, model.config.embedding_dim, vit.device)
    images = torch.zeros(PROBE, 3, vit.image_size, vit.image_size, device=vit.device)
    before = vit.recomputed
    entry = vit.tokens(images).detach().requires_grad_()
    mix = Mix(entry.new_ones(PROBE, model.config.num_domains) if model.router is not None else None)
    block = saved_bytes(lambda: vit.blocks[0](entry, mix, vit.rotation), model)
    try:
        for recomputed in range(len(vit.blocks) + 1):
            vit.recompute(recomputed)
            with kept_buffers(model):
                saved = saved_bytes(lambda: model(images), model) + recomputed * entry.nbytes
            per_image = (saved + 2 * max(block, PROBE * per_row)) // PROBE + per_row
            plan = MemoryPlan(recomputed, len(vit.blocks), constant + fixed, per_image, batch_size)
            if budget is None or plan.total <= budget * GB:
                return plan
    finally:
        vit.recompute(before)
    assert plan is not None and budget is not None
    fits = int((budget * GB - plan.constant) / plan.per_image)
    advice = f"--batch-size {fits} would fit" if fits > 1 else "no batch size fits"
    raise ConfigError(f"--memory-budget {budget} is too little, a step needs {plan.total / GB:.2g} GB; {advice}")


def _saved_by_margin(margin: nn.Module, embedding_dim: int, device: torch.device) -> tuple[int, int]:
    """(bytes for any batch, bytes for each image) that autograd saves; a sharded margin keeps no logits, (0, 0)."""
    if not isinstance(margin, MarginLoss):
        return 0, 0

    def saved(count: int) -> int:
        embedding = torch.zeros(count, embedding_dim, device=device, requires_grad=True)
        with kept_buffers(margin):
            return saved_bytes(lambda: margin(embedding, torch.zeros(count, dtype=torch.long, device=device)), margin)

    once, twice = saved(PROBE), saved(2 * PROBE)
    return 2 * once - twice, (twice - once) // PROBE


def bytes_of_a_person(embedding_dim: int, micro_batch: int, sharded: bool) -> int:
    """What an identity adds to a step: prototype, gradient and two moments; if its logits are kept, that of each image
    and two of their size at work, and the unit prototype with its length."""
    kept = 0 if sharded else embedding_dim + 1 + 3 * micro_batch
    return 4 * (4 * embedding_dim + kept)


def peak_memory(device: torch.device) -> str:
    """The most memory that was in use so far, in words; on a CPU that of the whole process, libraries included."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / GB:.2g} GB on {device}"
    if sys.platform == "win32":
        return "not known on Windows"
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak * (1 if sys.platform == 'darwin' else 1024) / GB:.2g} GB, Python and its libraries included"


def saved_bytes(run: Callable[[], object], model: nn.Module) -> int:
    """The bytes that autograd saves for the backward pass of `run()`, without the parameters of `model`."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run()  # noqa: F841  # while it lives, no two storages share an address
    return sum(size for address, size in kept.items() if address not in parameters)


@contextmanager
def kept_buffers(*modules: nn.Module) -> Iterator[None]:
    """Inside, a pass in train mode may change buffers (batch norm); at the end they get their values back.

    These are the buffers of the state dicts, without those that `ShardedMargin.draw` draws from.
    """
    buffers = [buffer for module in modules for name, buffer in module.named_buffers() if name in module.state_dict()]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
