"""Our ViT against other people's: transformers' DINOv2 and CLIP block by block, Meta's and Pillow's resampling.

Random models are saved by transformers, converted, loaded by us and compared in float64. Widths and depths are small,
but the native grids are the true ones: 518 px / 14 and 224 px / 16.
"""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import optional
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import images_like, randomise, sizes, tiny
from PIL import Image

from vitface.model.positions import resample_pos_embed
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.store.backbone import load_backbone
from vitface.weights.conversion import convert_file

transformers = optional("transformers")

NATIVE, RESAMPLED = 1e-9, 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("oracle")


def dinov2_oracle(config: ViTConfig, seed: int = 0) -> torch.nn.Module:
    return randomise(transformers.Dinov2Model(transformers.Dinov2Config(**sizes(config))), seed)


def clip_oracle(config: ViTConfig, seed: int = 0) -> torch.nn.Module:
    settings_ = transformers.CLIPVisionConfig(**sizes(config), intermediate_size=4 * config.embed_dim, projection_dim=8)
    return randomise(transformers.CLIPVisionModelWithProjection(settings_), seed)


def converted(oracle: torch.nn.Module, name: str, config: ViTConfig, side: int, folder) -> ViT:
    """The oracle's file as transformers writes it, through our converter and loader, in float64."""
    oracle.save_pretrained(folder)
    convert_file(name, config, folder / "model.safetensors", folder / "ours.safetensors")
    return load_backbone(name, folder / "ours.safetensors", side).double()


@torch.no_grad()
def hidden_states(vit: ViT, images: torch.Tensor) -> list[torch.Tensor]:
    """What enters the first block, then what leaves each block, each (B, N, D)."""
    states = [vit.tokens(images)]
    for block in vit.blocks:
        states.append(block(states[-1]))
    return states


def worst(ours: list[torch.Tensor], theirs) -> float:
    assert len(ours) == len(theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def compare(oracle, vit: ViT, images: torch.Tensor) -> float:
    """The largest difference over the tokens, every block and the final norm or, for CLIP, the projected CLS token."""
    clip = isinstance(oracle, transformers.CLIPVisionModelWithProjection)
    options = {"interpolate_pos_encoding": True} if clip else {}
    theirs = oracle.double()(images, output_hidden_states=True, **options)
    ours = hidden_states(vit, images)
    final = vit(images)
    if clip:
        # transformers' last_hidden_state has no final norm, its image embedding has
        ends = [(final[:, 0] @ oracle.visual_projection.weight.mT, theirs.image_embeds)]
    else:
        ends = [(final, theirs.last_hidden_state), (final[:, 0], theirs.pooler_output)]
    return max(worst(ours, theirs.hidden_states), *((a - b).abs().max().item() for a, b in ends))


ORACLES = {"dinov2_vits14": dinov2_oracle, "clip_vitb16": clip_oracle}


@pytest.mark.parametrize("name", ORACLES)
def test_every_block_at_the_native_grid(name, folder):
    config = tiny(name)
    oracle = ORACLES[name](config)
    vit = converted(oracle, name, config, config.native_size, folder)
    assert compare(oracle, vit, images_like(1, config.native_size)) <= NATIVE


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(ORACLES)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6, 16]),
    depth=st.integers(1, 3),
    grid=st.integers(1, 12),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_block_at_any_size(folder, name, heads, head_dim, depth, grid, batch, seed):
    # transformers resamples positions by the rule "size", in float32 for DINOv2
    config = tiny(name, heads * head_dim, depth, heads, pos_interp="size")
    side = grid * config.patch_size
    oracle = ORACLES[name](config, seed)
    vit = converted(oracle, name, config, side, folder)
    assert compare(oracle, vit, images_like(batch, side, seed)) <= RESAMPLED


@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(ORACLES)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 6, 16]),
    depth=st.integers(1, 3),
    grid=st.integers(1, 6),
    batch=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_block_of_any_model_at_its_own_grid(folder, name, heads, head_dim, depth, grid, batch, seed):
    side = grid * VIT_PRESETS[name].patch_size
    config = tiny(name, heads * head_dim, depth, heads, native_size=side)
    oracle = ORACLES[name](config, seed)
    vit = converted(oracle, name, config, side, folder)
    assert compare(oracle, vit, images_like(batch, side, seed)) <= NATIVE


PLANTED = {
    "activation": ("clip_vitb16", {"act": "gelu"}, 1e-3),
    "eps": ("dinov2_vits14", {"norm_eps": 1e-5}, 1e-7),
    "positional rule": ("dinov2_vits14", {"pos_interp": "size_antialias"}, 1e-3),
    "heads": ("dinov2_vits14", {"num_heads": 4}, 1e-3),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_comparison_sees_a_wrong_setting(fault, folder):
    name, changes, at_least = PLANTED[fault]
    side = 8 * VIT_PRESETS[name].patch_size
    config = tiny(name, pos_interp="size")
    oracle = ORACLES[name](config)
    assert compare(oracle, converted(oracle, name, config, side, folder), images_like(2, side)) <= RESAMPLED
    vit = converted(oracle, name, dataclasses.replace(config, **changes), side, folder)
    assert compare(oracle, vit, images_like(2, side)) > at_least


@pytest.mark.parametrize(("one", "other"), [("q", "k"), ("q", "v"), ("k", "v")])
def test_the_comparison_sees_swapped_parts_of_qkv(one, other, folder):
    config = tiny("dinov2_vits14", native_size=56)
    oracle = dinov2_oracle(config)
    vit = converted(oracle, "dinov2_vits14", config, 56, folder)
    with torch.no_grad():
        for parameter in (vit.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.bias):
            parts = dict(zip("qkv", parameter.clone().chunk(3), strict=True))
            parts[one], parts[other] = parts[other], parts[one]
            parameter.copy_(torch.cat([parts[part] for part in "qkv"]))
    assert compare(oracle, vit, images_like(2, 56)) > 1e-3


def positions(native: int, width: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 1 + native * native, width, generator=torch.Generator().manual_seed(seed))


def split(pos_embed: torch.Tensor, grid: int) -> np.ndarray:
    """(1, 1 + g², D) -> its patch rows as (g, g, D)."""
    return pos_embed[0, 1:].numpy().reshape(grid, grid, -1)


def cubic_matrix(native: int, grid: int, scale: float) -> np.ndarray:
    """(grid, native): cubic convolution with a = -0.75 at (x + 0.5) / scale - 0.5, edges repeated, from the formula."""

    def kernel(t: float) -> float:
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    matrix = np.zeros((grid, native))
    for x in range(grid):
        centre = (x + 0.5) / scale - 0.5
        first = int(np.floor(centre)) - 1
        for tap in range(first, first + 4):
            matrix[x, min(max(tap, 0), native - 1)] += kernel(centre - tap)
    return matrix


@pytest.mark.parametrize("rule", ["scale_offset", "size", "size_antialias"])
@pytest.mark.parametrize("native", [14, 37])
def test_native_grid_is_left_untouched(rule, native):
    table = positions(native)
    assert torch.equal(resample_pos_embed(table, native, rule), table)


@settings(max_examples=30)
@given(native=st.sampled_from([7, 14, 37]), grid=st.integers(1, 48), rule=st.sampled_from(["scale_offset", "size"]))
def test_resampling_follows_the_published_formula(native, grid, rule):
    if grid == native:
        return
    # Meta's interpolate_offset is 0.1: the table is sampled as if it were to become a tenth of a patch larger
    scale = (grid + 0.1) / native if rule == "scale_offset" else grid / native
    table = positions(native, seed=grid).double()
    rows = cubic_matrix(native, grid, scale)
    expected = np.einsum("yh,xw,hwd->yxd", rows, rows, split(table, native))
    ours = resample_pos_embed(table, grid, rule)
    assert np.abs(split(ours, grid) - expected).max() <= NATIVE
    assert torch.equal(ours[:, 0], table[:, 0])


@pytest.mark.parametrize(("native", "grid"), [(37, 8), (37, 16), (14, 7), (14, 20)])
def test_antialiased_resampling_is_pillows(native, grid):
    table = positions(native)
    ours = split(resample_pos_embed(table, grid, "size_antialias"), grid)
    for channel in range(ours.shape[-1]):
        image = Image.fromarray(split(table, native)[..., channel])
        expected = np.asarray(image.resize((grid, grid), Image.Resampling.BICUBIC))
        assert np.abs(ours[..., channel] - expected).max() <= RESAMPLED


def test_the_three_rules_differ_where_it_matters():
    tables = [resample_pos_embed(positions(37), 8, rule) for rule in ("scale_offset", "size", "size_antialias")]
    for one in range(3):
        for other in range(one):
            assert (tables[one] - tables[other]).norm() / tables[one].norm() > 0.01
