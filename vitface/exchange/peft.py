"""Our adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors. from_peft.py reads such folders.

PEFT's LoRA is y = x Wᵀ + b + s · x Aᵀ Bᵀ with s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora: our formula
for one domain. Its names differ, and transformers' models split our fused qkv (O = 3 D) into three layers: each gets A
of qkv and its third of B's rows, which is exact. Letters: I in, O out, K domains, R rank.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vitface.config import FaceConfig
from vitface.errors import ExchangeError
from vitface.store.sources import SOURCES
from vitface.store.tensors import tensor_bytes
from vitface.weights.keymaps import MARKS, META_TIMM, Family, transformers_family
from vitface.weights.layouts import neighbour_turns

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Layout:
    """The module names of timm and Meta, or of transformers in version 4 or 5, behind a prefix."""

    family: Family
    version: int = 5
    prefix: str = ""

    def modules(self, path: str, gated: bool) -> list[str]:
        """The module that stands for our layer `path`, or those of its q, k and v, or of the parts of a `gated` MLP."""
        for marks in MARKS:
            names = [self.family.source_names(f"{path}.weight{mark}") for mark in marks]
            if all(names) and (gated or marks != MARKS[1]):
                break
        return [self.prefix + found[0 if self.version == 4 else -1].removesuffix(".weight") for found in names]

    def pool_layers(self) -> list[str]:
        """The modules of an attention pool's MLP, whose names end as those of a block's."""
        names = [name for layer in ("pool.fc1", "pool.fc2") for name in self.family.source_names(f"{layer}.weight")]
        return [self.prefix + name.removesuffix(".weight") for name in names]


TIMM = Layout(META_TIMM)


def transformers_layout(backbone: str, version: int = 5) -> Layout:
    """The layout of Dinov2Model, DINOv3ViTModel, ViTModel, CLIPVisionModel or SiglipVisionModel.

    Version 5 has dropped the prefix "vision_model." of the last two. ExchangeError where transformers has no model.
    """
    family = transformers_family(backbone)
    if family is None:
        raise ExchangeError(f"transformers has no model of {backbone}; --format peft has the names of timm")
    prefix = "vision_model." if version == 4 and backbone.startswith(("clip", "siglip")) else ""
    return Layout(family, version, prefix)


def peft_files(adapters: Mapping[str, Tensor], config: FaceConfig, layout: Layout, domain: int = 0) -> dict[str, bytes]:
    """One PEFT folder, file name -> contents.

    `adapters` are `{path}.lora_a` (K·R, I) and `{path}.lora_b` (O, K·R), as `adapter_state_dict` of a ViT gives them.
    """
    columns = slice(domain * config.lora_rank, (domain + 1) * config.lora_rank)
    tensors, targets = {}, set()
    for path in (key.removesuffix(".lora_a") for key in adapters if key.endswith(".lora_a")):
        modules = layout.modules(path, config.vit.act == "swiglu")
        a, b = adapters[f"{path}.lora_a"][columns], adapters[f"{path}.lora_b"][:, columns]
        if config.vit.rope == "index" and path.endswith("attn.qkv"):
            b = neighbour_turns(b, config.vit.num_heads)
        for module, rows in zip(modules, b.chunk(len(modules)), strict=True):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.clone()  # tensors of a file share no memory
            tensors[f"{PREFIX}{module}.lora_B.weight"] = rows.clone()
            targets.add(module.split(f".{path.split('.')[1]}.", 1)[1])  # what follows the block's number
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model(config.backbone, layout),
        "r": config.lora_rank,
        "lora_alpha": int(config.lora_alpha) if float(config.lora_alpha).is_integer() else config.lora_alpha,
        "use_rslora": config.lora_scaling == "rslora",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }  # what is left out has PEFT's default
    excluded = layout.pool_layers() if config.vit.pool == "attention" else []
    if any(layer.endswith(f".{target}") for layer in excluded for target in targets):
        settings["exclude_modules"] = excluded
    return {CONFIG: json.dumps(settings, indent=2).encode(), TENSORS: tensor_bytes(tensors, {"format": "pt"})}


def base_model(backbone: str, layout: Layout) -> str | None:
    """The repository on the Hub of the preset's weights for timm, or for transformers; None if there is none."""
    source = SOURCES.get(backbone)
    return source and (source.timm if layout.family is META_TIMM else source.transformers)
