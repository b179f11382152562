"""`Linear` with an optional adapter, and the verbs that add, merge and extract adapters.

An adapted layer keeps its state-dict keys (`blocks.3.attn.qkv.weight`); `lora_a` (K·R, I) and `lora_b` (O, K·R) join
them. Nothing is replaced, hooked or patched.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitface.model.ops import REFERENCE, Ops

TARGETS = {
    "attn": ("attn.qkv", "attn.proj"),
    "attn+mlp": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
}


class Mix(NamedTuple):
    """The adapters are used: the K pairs of each layer weighted by `gate` (B, K), or all by one (plain LoRA).

    Layers that are given no Mix run frozen, without their adapters.
    """

    gate: Tensor | None = None


def lora_scaling(formula: str, alpha: float, rank: int) -> float:
    """alpha / R for "lora" (arXiv:2106.09685), alpha / sqrt(R) for "rslora" (arXiv:2312.03732)."""
    if formula not in ("lora", "rslora"):
        raise ValueError(f"unknown LoRA scaling {formula!r}; known: lora, rslora")
    return alpha / rank if formula == "lora" else alpha / math.sqrt(rank)


class Linear(nn.Linear):
    """nn.Linear with an optional low-rank adapter: (B, ..., I) -> (B, ..., O).

    The frozen weight may be bf16 while the adapter's parameters stay fp32; they are cast where they are used.
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.scaling, self.num_domains = 0.0, 1
        self.ops: Ops = REFERENCE

    @property
    def has_lora(self) -> bool:
        return self.lora_a is not None

    def add_lora(self, rank: int, scaling: float, num_domains: int, generator: torch.Generator | None):
        """Allocates K adapter pairs: A ~ U(-1/sqrt(I), 1/sqrt(I)) (kaiming-uniform with a = sqrt(5)), B = 0."""
        bound = self.in_features**-0.5
        a = torch.empty(num_domains * rank, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(self.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, num_domains * rank, device=self.weight.device))
        self.scaling, self.num_domains = scaling, num_domains

    def forward(self, x: Tensor, mix: Mix | None = None) -> Tensor:
        a, b = self.lora_a, self.lora_b
        if mix is None or a is None or b is None:
            return self.ops.linear(x, self.weight, self.bias)
        return self.ops.lora_linear(x, self.weight, self.bias, a, b, self.scaling, mix.gate)


def adapted_linears(model: nn.Module) -> dict[str, Linear]:
    """The layers of `model` that carry an adapter, by full path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.has_lora}


def add_lora(
    model: nn.Module,
    targets: tuple[str, ...],
    rank: int,
    alpha: float,
    scaling: str = "lora",
    num_domains: int = 1,
    generator: torch.Generator | None = None,
) -> None:
    """Adds adapters in place to every `blocks.{i}.{target}` of a ViT.

    `targets` are paths inside a block, compared whole ("attn.proj" never means "patch_embed.proj"). ValueError for a
    target that names no layer, or a rank or number of domains below one.
    """
    if rank < 1 or num_domains < 1:
        raise ValueError(f"LoRA needs rank >= 1 and num_domains >= 1, not {rank} and {num_domains}")
    factor = lora_scaling(scaling, alpha, rank)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for target in targets:
        layers = [module for name, module in linears.items() if name.split(".", 2)[2:] == [target]]
        if not layers:
            known = sorted({name.split(".", 2)[2] for name in linears if name.startswith("blocks.")})
            raise ValueError(f"LoRA target {target!r} names no layer; known: {', '.join(known)}")
        for layer in layers:
            layer.add_lora(rank, factor, num_domains, generator)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Folds W += scaling · B A into every adapted layer and drops the adapters, in place.

    ValueError for DA-LoRA: its weights differ from image to image, so no single W' equals it.
    """
    layers = adapted_linears(model)
    for name, layer in layers.items():
        if layer.num_domains > 1:
            raise ValueError(
                f"{name} has {layer.num_domains} domains: DA-LoRA's weights depend on the image, no merging"
            )
    for layer in layers.values():
        assert layer.lora_a is not None and layer.lora_b is not None
        merged = layer.weight.double() + layer.scaling * (layer.lora_b.double() @ layer.lora_a.double())
        layer.weight.copy_(merged.to(layer.weight.dtype))
        layer.lora_a = layer.lora_b = None


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters alone, `{path}.lora_a` and `{path}.lora_b`, detached."""
    return {
        f"{name}.{key}": tensor.detach()
        for name, layer in adapted_linears(model).items()
        for key, tensor in (("lora_a", layer.lora_a), ("lora_b", layer.lora_b))
        if tensor is not None
    }
