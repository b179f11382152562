"""Every preset: tokens, parameters and adapters, counted by hand, are those of the model, its plan and the table."""

import dataclasses

import pytest
import torch

from vitface.__main__ import main
from vitface.config import resolve
from vitface.presets import VIT_PRESETS
from vitface.store.backbone import expected_tensors
from vitface.training.header import parameter_table
from vitface.training.memory import plan_memory
from vitface.training.setup import build_margin, build_model

# the number of tokens at the usual size, and the millions of parameters where its authors or timm say them
PUBLISHED = {
    **{"dinov2_vits14": (257, 22.06), "dinov2_vitb14": (257, 86.58), "dinov2_vitl14": (257, 304.37)},
    **{"dinov2_vits14_reg": (261, 22.06), "dinov2_vitb14_reg": (261, 86.58), "dinov2_vitl14_reg": (261, 304.37)},
    **{"dinov3_vits16": (201, 21.59), "dinov3_vits16plus": (201, 28.68), "dinov3_vitb16": (201, 85.66)},
    **{"dinov3_vitl16": (201, 303.13), "eupe_vitt16": (201, None), "clip_vitb16": (197, 85.8)},
    **{"clip_vitb32": (50, 87.46), "clip_vitl14": (257, 303.18), "clip_vitl14_336": (257, 303.51)},
    **{"siglip2_vitb16": (196, 92.88), "pe_core_t16": (197, None), "pe_core_s16": (197, None)},
    **{"pe_core_b16": (197, None), "lvface_t": (144, None), "lvface_s": (144, None), "lvface_b": (144, None)},
    **{"lvface_l": (144, None), "adaface_vit_s": (196, None), "adaface_vit_b": (196, None)},
    **{"vit_tiny_patch16": (197, 5.53), "vit_nano": (50, None)},
}


def counted(c) -> int:
    """The parameters and the statistics of batch norms, layer by layer."""
    width, hidden, norm = c.embed_dim, int(c.mlp_ratio * c.embed_dim), 2 * c.embed_dim
    places = (c.native_size // c.patch_size) ** 2 + c.class_token
    first = 3 * c.patch_size**2 * width + c.patch_bias * width + (c.class_token + c.registers) * width
    first += c.pos_embed * places * width + c.norm_pre * norm
    mlp = (2 if c.act == "swiglu" else 1) * hidden * (width + 1) + (hidden + 1) * width
    attention = 3 * width * (width + c.qkv_bias) + (width + 1) * width
    pool = 0
    if c.pool == "attention":  # the query, its projection, keys and values, the output; a norm and an MLP
        pool = width + 4 * (width + 1) * width + norm + 8 * width**2 + 5 * width
    if c.pool == "tokens":  # two layers without bias, a batch norm behind each: weight, bias, mean, variance
        pool = (places * width + 4) * width + (width + 4) * c.pool_dim
    return first + c.depth * (2 * norm + attention + mlp + 2 * c.layer_scale * width) + norm + pool


@pytest.mark.parametrize("name", VIT_PRESETS)
def test_tokens_and_parameters_are_the_published_ones(name):
    config, (tokens, millions) = VIT_PRESETS[name], PUBLISHED[name]
    assert config.num_tokens(config.usual_size) == tokens
    total = sum(tensor.numel() for tensor in expected_tensors(config).values())
    assert total == counted(config)
    assert millions is None or round(total / 1e6, 2) == pytest.approx(millions, abs=0.021)


@pytest.mark.parametrize("name", VIT_PRESETS)
def test_the_plan_of_a_step(name, monkeypatch):
    """Of a narrow model of two blocks, whose images, patches and prefix are those of the preset."""
    full = VIT_PRESETS[name]
    small = dataclasses.replace(full, depth=2, embed_dim=8 * full.num_heads, pool_dim=min(full.pool_dim, 16))
    monkeypatch.setitem(VIT_PRESETS, name, small)
    flags = dict(backbone=name, weights="random", use_dalora=True, num_domains=3, router_depth=1, lora_rank=2)
    config = dataclasses.replace(resolve(flags), device="cpu", dtype="fp32")
    model, margin = build_model(config), build_margin(config, 7)
    tokens = model.vit.tokens(torch.zeros(1, 3, config.side, config.side))
    assert tokens.shape == (1, PUBLISHED[name][0], small.embed_dim)
    adapters = 2 * 3 * 2 * 6 * small.embed_dim  # blocks, domains, rank 2; A and B of qkv, A and B of proj
    assert f"{'adapters':<12}{adapters:>14,}{adapters:>14,}" in parameter_table(model, margin)
    parts = (model.router, model.head, margin)
    others = sum(parameter.numel() for part in parts for parameter in part.parameters())
    plan = plan_memory(model, margin, 4, None)
    frozen = counted(dataclasses.replace(small, native_size=config.side))
    prototypes = 7 * (margin.weight.shape[1] + 1)  # as unit vectors, and their lengths
    expected = 4 * (frozen + 4 * (adapters + others) + prototypes)  # with a gradient and two moments
    assert plan.constant == pytest.approx(expected, abs=100)
    assert plan.depth == 2 and plan.per_image > 4 * tokens[0].numel()


def test_the_table_of_backbones_has_them_all(capsys):
    assert main(["backbones"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    for name, config in VIT_PRESETS.items():
        millions, tokens = counted(config) / 1e6, PUBLISHED[name][0]
        assert f"{millions:.1f} M" in lines[name] and f"{config.usual_size} px" in lines[name]
        assert f"  {tokens} " in lines[name] and f"  {16 * 6 * config.depth * config.embed_dim:,} " in lines[name]
