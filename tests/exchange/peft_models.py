"""What PEFT's folders are tried on: our adapted ViTs, transformers' models, and modules with timm's names."""

import dataclasses

import torch
from conftest import optional, randomise_adapters, tiny_config
from torch import nn

from vitface.config import FaceConfig
from vitface.model.lora import TARGETS, Mix, add_lora
from vitface.model.vit import ViT, init_weights
from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.weights.keymaps import transformers_family

transformers = optional("transformers")


def small(name: str, **changes) -> ViTConfig:
    sizes = dict(native_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    return dataclasses.replace(VIT_PRESETS[name], **{**sizes, **changes})


BACKBONES = {  # those that transformers has a model of
    "dinov2_vits14": tiny_config(),
    "clip_vitb16": small("clip_vitb16"),
    "vit_tiny_patch16": small("vit_tiny_patch16"),
    "dinov2_vits14_reg": small("dinov2_vits14_reg"),
    "dinov3_vits16": small("dinov3_vits16"),
    "dinov3_vits16plus": small("dinov3_vits16plus"),
    "siglip2_vitb16": small("siglip2_vitb16", pool_heads=2),
}
OTHERS = {"pe_core_t16": small("pe_core_t16", pool_heads=2), "lvface_t": small("lvface_t")}


def adapted_vit(config: FaceConfig) -> ViT:
    """A ViT in float32 whose weights and adapters are large enough that each of them moves the output."""
    vit = ViT(config.vit, 32)
    init_weights(vit, seed=0)
    with torch.no_grad():
        for parameter in (*vit.blocks.parameters(), *vit.pool.parameters()):
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    if config.lora_rank:
        add_lora(
            vit,
            TARGETS[config.lora_targets],
            config.lora_rank,
            config.lora_alpha,
            config.lora_scaling,
            config.num_domains,
        )
        randomise_adapters(vit)
    return vit.eval()


def settings(backbone: str, **changes) -> FaceConfig:
    return FaceConfig(
        backbone, "random", {**BACKBONES, **OTHERS}[backbone], 32, **{"lora_rank": 4, "lora_alpha": 8, **changes}
    )


def theirs(backbone: str, vit: ViT) -> nn.Module:
    """transformers' model with the frozen weights of `vit`."""
    sizes = dict(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        layer_norm_eps=vit.config.norm_eps,
    )
    registers = {"num_register_tokens": vit.config.registers}
    if backbone.endswith("reg"):
        model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes, **registers))
    elif backbone.startswith("dinov3"):
        gated = backbone.endswith("plus")
        act = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, **registers, **act))
    elif backbone.startswith("siglip"):
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    elif backbone.startswith("dinov2"):
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    elif backbone.startswith("clip"):
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    else:
        model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
    family, ours = transformers_family(backbone), vit.state_dict()
    marks = {"[q]": (0, 3), "[k]": (1, 3), "[v]": (2, 3), "[gate]": (0, 2), "[up]": (1, 2)}
    for key, tensor in model.state_dict().items():
        target = family.target(key)
        if target is not None:
            name, bracket, mark = target.partition("[")
            index, count = marks[bracket + mark] if mark else (0, 1)
            tensor.copy_(ours[name].chunk(count)[index].reshape(tensor.shape))
        elif "head.attention.in_proj" in key:
            kind = key.rpartition("_")[2]
            tensor.copy_(torch.cat([ours[f"pool.q.{kind}"], ours[f"pool.kv.{kind}"]]))
    return model.eval()


def cls(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model(pixel_values=images().to(next(model.parameters()).dtype))
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled


class TimmLike(nn.Module):
    """timm's module names around our frozen weights, with plain nn.Linear layers for PEFT to wrap."""

    def __init__(self, vit: ViT):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 16, 8, 8)  # what a target "proj" would catch
        self.blocks = nn.ModuleList(_Block() for _ in vit.blocks)
        self.load_state_dict({key: vit.state_dict()[key] for key in self.state_dict()})
        self.config = {}

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16, eps=1e-6), nn.LayerNorm(16, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
        self.ls1, self.ls2 = nn.Module(), nn.Module()
        self.ls1.gamma, self.ls2.gamma = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.mT * 8**-0.5, dim=-1) @ v
        x = x + self.ls1.gamma * self.attn.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.ls2.gamma * self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close_to(backbone: str) -> dict[str, float]:
    """How exact transformers is: it turns DINOv3's queries and keys by angles in float32."""
    return dict(rtol=1e-6, atol=1e-6) if backbone.startswith("dinov3") else dict(rtol=1e-9, atol=1e-9)


def ours(vit: ViT) -> torch.Tensor:
    with torch.no_grad():
        return vit.pool(vit(images().to(vit.dtype), Mix()))
