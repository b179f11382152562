"""What users would otherwise run: timm or transformers with PEFT, and DA-LoRA written in plain PyTorch.

Every contestant is the same function of the same weights: the backbone comes from one state dict, the adapters are
copied from ours, and `train_step.py` and `embed.py` compare outputs and gradients before they time anything.
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitface.model.lora import adapted_linears
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.store.backbone import load_backbone
from vitface.weights.conversion import convert_file

TIMM = {
    "dinov2_vits14": "vit_small_patch14_dinov2",
    "dinov2_vitb14": "vit_base_patch14_dinov2",
    "dinov2_vitl14": "vit_large_patch14_dinov2",
    "clip_vitb16": "vit_base_patch16_clip_quickgelu_224",
    "clip_vitl14": "vit_large_patch14_clip_quickgelu_224",
    "vit_tiny_patch16": "vit_tiny_patch16_224",
}
TARGETS = {"timm": r".*\.attn\.(qkv|proj)", "transformers": r".*\.attention\.[qkvo]_proj"}


def timm_backbone(vit: ViT, name: str, fused_attention: bool) -> nn.Module:
    """timm's model with the weights of `vit`; (B, 3, S, S) -> CLS after the final norm (B, D)."""
    with _torchvision_without_operators():
        import timm

    model = timm.create_model(TIMM[name], img_size=vit.image_size, num_classes=0)
    model.load_state_dict(vit.state_dict())
    for block in model.blocks:
        block.attn.fused_attn = fused_attention
    return model


@contextmanager
def _torchvision_without_operators() -> Iterator[None]:
    """Lets a torchvision without its compiled operators, which timm and PEFT do not need, be imported."""
    register = torch.library.register_fake

    def skip_torchvision(name, *arguments, **options):
        if isinstance(name, str) and name.startswith("torchvision::"):
            return lambda function: function
        return register(name, *arguments, **options)

    torch.library.register_fake = skip_torchvision
    try:
        yield
    finally:
        torch.library.register_fake = register


def transformers_backbone(name: str, image_size: int, attention: str) -> tuple[nn.Module, ViT]:
    """A random model of transformers and the same weights in ours, through the converter.

    Both as if pretrained at `image_size`: transformers and Meta resample positions by different rules.
    """
    with _torchvision_without_operators():
        import transformers

    config = dataclasses.replace(VIT_PRESETS[name], native_size=image_size)
    kind, more = transformers_kind(name, config)
    settings = getattr(transformers, f"{kind}Config")(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.native_size,
        patch_size=config.patch_size,
        attn_implementation=attention,
        **more,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(settings)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        convert_file(name, config, Path(folder, "model.safetensors"), Path(folder, "ours.safetensors"))
        return model, load_backbone(name, Path(folder, "ours.safetensors"), image_size)


def transformers_kind(name: str, config: ViTConfig) -> tuple[str, dict[str, Any]]:
    """(What transformers calls the model of a preset, the settings that are more than sizes); ("", {}) without one."""
    hidden, gated = int(config.mlp_ratio * config.embed_dim), config.act == "swiglu"
    if name.startswith("dinov2"):
        registers = {"num_register_tokens": config.registers}
        return ("Dinov2WithRegisters", registers) if config.registers else ("Dinov2", {})
    if name.startswith(("dinov3", "eupe")):
        more = dict(num_register_tokens=config.registers, intermediate_size=hidden, use_gated_mlp=gated)
        return "DINOv3ViT", {**more, "hidden_act": "silu" if gated else "gelu"}
    if name.startswith("siglip2"):
        return "SiglipVision", {"intermediate_size": hidden}
    if name.startswith("clip"):
        return "CLIPVision", {"intermediate_size": hidden}
    return "", {}


class PooledCLS(nn.Module):
    """transformers' model as (B, 3, S, S) -> CLS after the final norm, or what its pool makes (B, D)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).pooler_output


def with_peft(
    model: nn.Module, kind: str, vit: ViT, rank: int, alpha: float, dtype: torch.dtype, cast: bool
) -> nn.Module:
    """PEFT's LoRA on qkv and proj, as its documentation does it, with our adapters' values.

    `cast` is PEFT's autocast_adapter_dtype: under a bf16 model it keeps the adapters, and their products, in float32.
    """
    with _torchvision_without_operators():
        from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[kind])
    model = get_peft_model(model.to(dtype), config, autocast_adapter_dtype=cast)
    modules = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for path, layer in adapted_linears(vit).items():
            for theirs, rows in peft_layers(path, kind, layer.out_features):
                modules[theirs].lora_A["default"].weight.copy_(layer.lora_a)
                modules[theirs].lora_B["default"].weight.copy_(layer.lora_b[rows])
    return model


def peft_layers(path: str, kind: str, outputs: int) -> list[tuple[str, slice]]:
    """Which of their layers hold which rows of our layer `path`: transformers (5.x) splits q, k and v."""
    if kind == "timm":
        return [(path, slice(None))]
    block = path.split(".")[1]
    prefix = f"model.encoder.layer.{block}.attention"
    if path.endswith("proj"):
        return [(f"{prefix}.o_proj", slice(None))]
    third = outputs // 3
    return [(f"{prefix}.{part}_proj", slice(n * third, (n + 1) * third)) for n, part in enumerate("qkv")]


class LoopedDomains(nn.Module):
    """DA-LoRA as PEFT's X-LoRA computes its mixture: for each domain, B_k A_k of the weighted input is added."""

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scaling: float, num_domains: int):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.a = nn.ParameterList(lora_a.chunk(num_domains))
        self.b = nn.ParameterList(lora_b.chunk(num_domains, dim=1))
        self.gate: Tensor | None = None  # (B, K), set before each forward

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.gate is None:
            return y
        for k, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            weighted = x * self.gate[:, k, None, None].to(x.dtype)
            y = y + F.linear(F.linear(weighted, a.to(x.dtype)), b.to(x.dtype)) * self.scaling
        return y


class ConcatenatedDomains(nn.Module):
    """DA-LoRA as an expert would write it: one wide pair, the gate on its bottleneck."""

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scaling: float, num_domains: int):
        super().__init__()
        self.base, self.scaling = base, scaling
        self.a, self.b = nn.Parameter(lora_a), nn.Parameter(lora_b)
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.gate is None:
            return y
        gate = self.gate.repeat_interleave(len(self.a) // self.gate.shape[1], dim=1)[:, None].to(x.dtype)
        return y + F.linear(F.linear(x, self.a.to(x.dtype)) * gate, self.b.to(x.dtype)) * self.scaling


class TimmDALoRA(nn.Module):
    """timm's ViT with DA-LoRA layers of one of the two kinds, and our router: (B, 3, S, S) -> CLS (B, D)."""

    def __init__(self, model: nn.Module, kind: type[nn.Module], vit: ViT, router: nn.Module, args):
        super().__init__()
        self.model, self.router = model.requires_grad_(False), router
        self.model.rotation = None  # which the router asks for
        self.layers = []
        for path, layer in adapted_linears(vit).items():
            parent = model.get_submodule(path.rpartition(".")[0])
            name = path.rpartition(".")[2]
            a, b = layer.lora_a.detach().clone(), layer.lora_b.detach().clone()
            adapted = kind(getattr(parent, name), a, b, layer.scaling, args.domains)
            setattr(parent, name, adapted)
            self.layers.append(adapted)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        tokens = self.model.norm_pre(tokens)
        self.set_gate(None)
        self.set_gate(self.router(tokens, self.model)[0])
        return self.model.norm(self.model.blocks(tokens))[:, 0]

    def set_gate(self, gate: Tensor | None) -> None:
        for layer in self.layers:
            layer.gate = gate
