"""Perception Encoder, DINOv3 and EUPE against modules that are written here, from the papers, with the names of Meta's
files; Perception Encoder against timm too. All in float64; widths and depths are small.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import optional
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import images_like, in_float64, randomise, tiny
from safetensors.torch import save_file

from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.store.backbone import load_backbone
from vitface.weights.conversion import convert_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("oracle")


def draw(names: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in names.items()}


def block_shapes(prefix: str, names: tuple[str, ...], width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Weights and biases of norm1, qkv, proj, norm2, fc1, fc2 under their `names`, with their own separator."""
    shapes = ((width,), (3 * width, width), (width, width), (width,), (hidden, width), (width, hidden))
    found = {}
    for name, shape in zip(names, shapes, strict=True):
        found |= {f"{prefix}{name}weight": shape, f"{prefix}{name}bias": shape[:1]}
    return found


def norm(x, state, name, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q, k, v):
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


PE_NAMES = ("ln_1.", "attn.in_proj_", "attn.out_proj.", "ln_2.", "mlp.c_fc.", "mlp.c_proj.")


def pe_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    width, patch = config.embed_dim, config.patch_size
    shapes = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + config.grid(config.native_size) ** 2, width),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.proj": (width, 8),
        "visual.attn_pool.probe": (1, 1, width),
    }
    for name in ("ln_pre", "ln_post", "attn_pool.layernorm"):
        shapes |= {f"visual.{name}.weight": (width,), f"visual.{name}.bias": (width,)}
    for index in range(config.depth):
        shapes |= block_shapes(f"visual.transformer.resblocks.{index}.", PE_NAMES, width, 4 * width)
    pool = block_shapes("visual.attn_pool.", ("drop.", *PE_NAMES[1:3], "drop.", *PE_NAMES[4:]), width, 4 * width)
    return shapes | {name: shape for name, shape in pool.items() if "drop" not in name}


def pe(state: dict[str, torch.Tensor], config: ViTConfig, images: torch.Tensor):
    """Perception Encoder: tokens after ln_post and the pooled vector. Each row and column turns pairs of neighbours."""
    s = {name.removeprefix("visual."): tensor.double() for name, tensor in state.items()}
    grid, heads, hd = config.grid(images.shape[-1]), config.num_heads, config.embed_dim // config.num_heads
    x = F.conv2d(images, s["conv1.weight"], stride=config.patch_size).flatten(2).transpose(1, 2)
    x = torch.cat([s["class_embedding"].expand(len(x), 1, -1), x], 1) + s["positional_embedding"]
    x = norm(x, s, "ln_pre")
    frequencies = 10_000.0 ** -(torch.arange(0, hd // 2, 2).double() / (hd // 2))
    turns = torch.zeros(1 + grid * grid, hd // 2, dtype=torch.complex128)
    turns[0] = 1
    for row in range(grid):
        for column in range(grid):
            angles = torch.cat([(column + 1) * frequencies, (row + 1) * frequencies])
            turns[1 + row * grid + column] = torch.polar(torch.ones_like(angles), angles)

    def turn(t):
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

    for index in range(config.depth):
        at = f"transformer.resblocks.{index}."
        b = {name.removeprefix(at): tensor for name, tensor in s.items() if name.startswith(at)}
        qkv = norm(x, b, "ln_1") @ b["attn.in_proj_weight"].T + b["attn.in_proj_bias"]
        q, k, v = (part.unflatten(-1, (heads, hd)).transpose(1, 2) for part in qkv.chunk(3, -1))
        x = x + attend(turn(q), turn(k), v) @ b["attn.out_proj.weight"].T + b["attn.out_proj.bias"]
        h = F.gelu(norm(x, b, "ln_2") @ b["mlp.c_fc.weight"].T + b["mlp.c_fc.bias"])
        x = x + h @ b["mlp.c_proj.weight"].T + b["mlp.c_proj.bias"]
    x = norm(x, s, "ln_post")
    p = {name.removeprefix("attn_pool."): tensor for name, tensor in s.items() if name.startswith("attn_pool.")}
    wq, wk, wv = p["attn.in_proj_weight"].chunk(3)
    bq, bk, bv = p["attn.in_proj_bias"].chunk(3)
    q, k, v = (
        (t @ w.T + b).unflatten(-1, (config.pool_heads, -1)).transpose(1, 2)
        for t, w, b in ((p["probe"].expand(len(x), -1, -1), wq, bq), (x, wk, bk), (x, wv, bv))
    )
    y = attend(q, k, v) @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
    h = F.gelu(norm(y, p, "layernorm") @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"])
    return x, (y + h @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"])[:, 0]


DINOV3_NAMES = ("norm1.", "attn.qkv.", "attn.proj.", "norm2.", "mlp.fc1.", "mlp.fc2.")


def dinov3_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    width, patch = config.embed_dim, config.patch_size
    shapes = {
        "cls_token": (1, 1, width),
        "storage_tokens": (1, config.registers, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "rope_embed.periods": (width // config.num_heads // 4,),
    }
    hidden = int(config.mlp_ratio * width)
    for index in range(config.depth):
        block = block_shapes(f"blocks.{index}.", DINOV3_NAMES, width, hidden)
        if config.act == "swiglu":
            up = {name.replace("fc1", "w2"): shape for name, shape in block.items() if "fc1" in name}
            block = up | {name.replace("fc1", "w1").replace("fc2", "w3"): shape for name, shape in block.items()}
        shapes |= block | {f"blocks.{index}.ls{i}.gamma": (width,) for i in (1, 2)}
        shapes[f"blocks.{index}.attn.qkv.bias_mask"] = (3 * width,)
    return shapes


def meta_dinov3(state: dict[str, torch.Tensor], config: ViTConfig, images: torch.Tensor):
    """DINOv3 with the names of Meta's files: final-norm tokens and CLS."""
    s = {name: tensor.double() for name, tensor in state.items()}
    grid, heads, hd = config.grid(images.shape[-1]), config.num_heads, config.embed_dim // config.num_heads
    x = F.conv2d(images, s["patch_embed.proj.weight"], s["patch_embed.proj.bias"], stride=config.patch_size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([s["cls_token"].expand(len(x), -1, -1), s["storage_tokens"].expand(len(x), -1, -1), x], 1)
    periods = 100.0 ** (2 * torch.arange(hd // 4).double() / (hd // 2))
    centres = 2 * (torch.arange(grid).double() + 0.5) / grid - 1
    angles = torch.stack(
        [
            torch.cat([2 * math.pi * centres[i] / periods, 2 * math.pi * centres[j] / periods])
            for i, j in np.ndindex(grid, grid)
        ]
    )
    cos, sin = (f(angles).tile(2) for f in (torch.cos, torch.sin))

    def turn(t):
        first, patches = t[:, :, : 1 + config.registers], t[:, :, 1 + config.registers :]
        a, b = patches.chunk(2, -1)
        return torch.cat([first, patches * cos + torch.cat([-b, a], -1) * sin], 2)

    for index in range(config.depth):
        at = f"blocks.{index}."
        b = {name.removeprefix(at): tensor for name, tensor in s.items() if name.startswith(at)}
        width = config.embed_dim
        bias = torch.cat([b["attn.qkv.bias"][:width], torch.zeros(width), b["attn.qkv.bias"][2 * width :]])
        qkv = norm(x, b, "norm1") @ b["attn.qkv.weight"].T + bias
        q, k, v = (part.unflatten(-1, (heads, hd)).transpose(1, 2) for part in qkv.chunk(3, -1))
        out = attend(turn(q), turn(k), v) @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        x = x + b["ls1.gamma"] * out
        h = norm(x, b, "norm2")
        if config.act == "swiglu":
            h = F.silu(h @ b["mlp.w1.weight"].T + b["mlp.w1.bias"]) * (h @ b["mlp.w2.weight"].T + b["mlp.w2.bias"])
            out = h @ b["mlp.w3.weight"].T + b["mlp.w3.bias"]
        else:
            h = F.gelu(h @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
            out = h @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
        x = x + b["ls2.gamma"] * out
    x = norm(x, s, "norm")
    return x, x[:, 0]


WRITTEN = {
    "pe_core_t16": (pe_shapes, pe),
    "pe_core_b16": (pe_shapes, pe),
    "dinov3_vits16": (dinov3_shapes, meta_dinov3),
    "dinov3_vits16plus": (dinov3_shapes, meta_dinov3),
    "eupe_vitt16": (dinov3_shapes, meta_dinov3),
}


@settings(max_examples=20)
@given(
    name=st.sampled_from(sorted(WRITTEN)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 16]),
    depth=st.integers(1, 3),
    grid=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_metas_files_compute_what_the_papers_say(folder, name, heads, head_dim, depth, grid, seed):
    side = grid * VIT_PRESETS[name].patch_size
    config = tiny(name, heads * head_dim, depth, heads, native_size=side)
    shapes, oracle = WRITTEN[name]
    state = draw(shapes(config), seed)
    for key in [key for key in state if key.endswith("bias_mask")]:
        state[key.removesuffix("_mask")][config.embed_dim : 2 * config.embed_dim] = torch.nan  # as in Meta's files
    if name.startswith("eupe"):
        state["projectors.0.weight"] = torch.zeros(2)
    save_file(state, folder / "meta.safetensors")
    convert_file(name, config, folder / "meta.safetensors", folder / "ours.safetensors")
    vit, images = in_float64(load_backbone(name, folder / "ours.safetensors", side)), images_like(2, side, seed)
    with torch.no_grad():
        tokens, pooled = oracle({k: t for k, t in state.items() if "projectors" not in k}, config, images)
        ours = vit(images)
        torch.testing.assert_close(ours, tokens, rtol=0, atol=1e-9)
        torch.testing.assert_close(vit.pool(ours), pooled, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", [64, 384])
def test_pe_core_is_timms(side, folder):
    """timm makes rotary positions in float32. The largest difference was 1.6e-7 on 2026-11-26, of timm 1.0.31."""
    timm = optional("timm")
    grid = side // 16
    name, sizes = "vit_pe_core_tiny_patch16_384", dict(depth=2, img_size=side, ref_feat_shape=(grid, grid))
    theirs = randomise(timm.create_model(name, **sizes, num_classes=0), 3)
    save_file(theirs.state_dict(), folder / "timm.safetensors")
    config = dataclasses.replace(VIT_PRESETS["pe_core_t16"], depth=2, native_size=side)
    convert_file("pe_core_t16", config, folder / "timm.safetensors", folder / "ours.safetensors")
    vit, images = in_float64(load_backbone("pe_core_t16", folder / "ours.safetensors", side)), images_like(2, side)
    with torch.no_grad():
        features = theirs.double().forward_features(images)
        torch.testing.assert_close(vit(images), features, rtol=0, atol=1e-5)
        torch.testing.assert_close(vit.pool(vit(images)), theirs.forward_head(features), rtol=0, atol=1e-5)
