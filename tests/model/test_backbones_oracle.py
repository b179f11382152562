"""The backbones of today against other people's: transformers' DINOv2 with registers, DINOv3 and SigLIP, and modules
that are written here, from the papers, with the names of Meta's and big_vision's files.

Random models are saved, converted, loaded by us and compared in float64; transformers makes DINOv3's rotary positions
in float32. Widths and depths are small.
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
from safetensors.torch import save_file

from vitface.model.positions import rotations
from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.store.backbone import load_backbone
from vitface.weights.conversion import convert_file

transformers = optional("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("oracle")


def tiny(name: str, width: int = 32, depth: int = 2, heads: int = 2, **changes) -> ViTConfig:
    pool_heads = 2 if VIT_PRESETS[name].pool == "attention" else 0
    sizes = dict(embed_dim=width, depth=depth, num_heads=heads, pool_heads=pool_heads)
    return dataclasses.replace(VIT_PRESETS[name], **{**sizes, **changes})


def images_like(batch: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def from_transformers(model, settings_, seed: int) -> torch.nn.Module:
    """The model with every parameter away from its initial value."""
    oracle, generator = model(settings_), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return oracle.eval().double()


def sizes(config: ViTConfig) -> dict:
    return dict(
        hidden_size=config.embed_dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.native_size,
        patch_size=config.patch_size,
        attn_implementation="sdpa",  # their eager softmax is in float32
    )


def dinov2_reg(config: ViTConfig, seed: int):
    settings_ = transformers.Dinov2WithRegistersConfig(**sizes(config), num_register_tokens=config.registers)
    return from_transformers(transformers.Dinov2WithRegistersModel, settings_, seed)


def dinov3(config: ViTConfig, seed: int):
    gated, hidden = config.act == "swiglu", int(config.mlp_ratio * config.embed_dim)
    settings_ = transformers.DINOv3ViTConfig(
        **sizes(config),
        num_register_tokens=config.registers,
        intermediate_size=hidden,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    return from_transformers(transformers.DINOv3ViTModel, settings_, seed)


def siglip(config: ViTConfig, seed: int):
    settings_ = transformers.SiglipVisionConfig(**sizes(config), intermediate_size=4 * config.embed_dim)
    assert settings_.hidden_act == "gelu_pytorch_tanh"
    return from_transformers(transformers.SiglipVisionModel, settings_, seed)


ORACLES = {
    "dinov2_vits14_reg": (dinov2_reg, 1e-9, 1e-5),  # name: (oracle, at the native grid, at another)
    "dinov3_vits16": (dinov3, 1e-5, 1e-5),
    "dinov3_vits16plus": (dinov3, 1e-5, 1e-5),
    "siglip2_vitb16": (siglip, 1e-9, 1e-5),
}


@torch.no_grad()
def worst(name: str, oracle, config: ViTConfig, side: int, images: torch.Tensor, folder) -> float:
    """The largest difference over the final-norm tokens and what the backbone makes of them."""
    oracle.float().save_pretrained(folder)
    convert_file(name, config, folder / "model.safetensors", folder / "ours.safetensors")
    vit = in_float64(load_backbone(name, folder / "ours.safetensors", side))
    options = {"interpolate_pos_encoding": True} if config.pool == "attention" else {}
    theirs = oracle.double()(images, **options)
    tokens = vit(images)
    return max(
        (tokens - theirs.last_hidden_state).abs().max().item(),
        (vit.pool(tokens) - theirs.pooler_output).abs().max().item(),
    )


def in_float64(vit):
    torch.set_default_dtype(torch.float64)
    try:
        vit.rotation = rotations(vit.config, vit.image_size)
    finally:
        torch.set_default_dtype(torch.float32)
    return vit.double()


@pytest.mark.parametrize("name", ORACLES)
def test_tokens_and_pool_at_the_native_grid(name, folder):
    config = tiny(name, depth=1)
    make, native, _ = ORACLES[name]
    images = images_like(1, config.native_size)
    assert worst(name, make(config, 0), config, config.native_size, images, folder) <= native


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(ORACLES)),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 16]),
    depth=st.integers(1, 3),
    registers=st.integers(1, 5),
    grid=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_tokens_and_pool_at_any_size(folder, name, heads, head_dim, depth, registers, grid, seed):
    make, _, other = ORACLES[name]
    config = tiny(name, heads * head_dim, depth, heads, native_size=4 * VIT_PRESETS[name].patch_size)
    if config.registers:
        config = dataclasses.replace(config, registers=registers)
    if config.pool == "attention":
        config = dataclasses.replace(config, pool_heads=heads)  # as SigLIP
    side = grid * config.patch_size
    assert worst(name, make(config, seed), config, side, images_like(2, side, seed), folder) <= other


PLANTED = {
    "the approximation of GELU": ("siglip2_vitb16", {"act": "gelu"}, 1e-5),
    "heads of the pool": ("siglip2_vitb16", {"pool_heads": 4}, 1e-3),
    "eps": ("dinov2_vits14_reg", {"norm_eps": 1e-5}, 1e-7),
    "rotary positions of another rule": ("dinov3_vits16", {"rope": "index"}, 1e-3),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_comparison_sees_a_wrong_setting(fault, folder):
    name, changes, at_least = PLANTED[fault]
    make, native, _ = ORACLES[name]
    config = tiny(name, native_size=4 * VIT_PRESETS[name].patch_size)
    images = images_like(2, config.native_size)
    assert worst(name, make(config, 0), config, config.native_size, images, folder) <= native
    assert worst(name, make(config, 0), dataclasses.replace(config, **changes), config.native_size, images, folder) > (
        at_least
    )


# Meta's layouts, written from the papers: names of the files, float64.


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


@settings(max_examples=20, deadline=None, derandomize=True)
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


@pytest.mark.parametrize("stacked", [True, False])
def test_big_visions_archive_is_the_same_model(stacked, folder):
    """A transformers model under big_vision's names: kernels map from the left and have an axis of heads."""
    config = tiny("siglip2_vitb16", native_size=48, depth=3)
    oracle = siglip(config, 5)
    heads, theirs = config.num_heads, {k: v.float().numpy() for k, v in oracle.state_dict().items()}

    def dense(name):
        return {"kernel": theirs[f"{name}.weight"].T, "bias": theirs[f"{name}.bias"]}

    def attention(q, k, v, out):
        parts = {"query": q, "key": k, "value": v}
        split = {
            part: {
                "kernel": p["kernel"].reshape(len(p["kernel"]), heads, -1),
                "bias": p["bias"].reshape(heads, -1),
            }
            for part, p in parts.items()
        }
        return split | {
            "out": {"kernel": out["kernel"].reshape(heads, -1, out["kernel"].shape[1]), "bias": out["bias"]}
        }

    def layer_norm(name):
        return {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}

    def block(i):
        at = f"encoder.layers.{i}"
        names = (f"{at}.self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
        return {
            "LayerNorm_0": layer_norm(f"{at}.layer_norm1"),
            "MultiHeadDotProductAttention_0": attention(*map(dense, names)),
            "LayerNorm_1": layer_norm(f"{at}.layer_norm2"),
            "MlpBlock_0": {"Dense_0": dense(f"{at}.mlp.fc1"), "Dense_1": dense(f"{at}.mlp.fc2")},
        }

    width = config.embed_dim
    fused = theirs["head.attention.in_proj_weight"], theirs["head.attention.in_proj_bias"]
    parts = [{"kernel": fused[0][i : i + width].T, "bias": fused[1][i : i + width]} for i in (0, width, 2 * width)]
    blocks = [block(i) for i in range(config.depth)]
    tree = {
        "embedding": {
            "kernel": theirs["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
            "bias": theirs["embeddings.patch_embedding.bias"],
        },
        "pos_embedding": theirs["embeddings.position_embedding.weight"][None],
        "Transformer": {"encoder_norm": layer_norm("post_layernorm")},
        "MAPHead_0": {
            "probe": theirs["head.probe"],
            "MultiHeadDotProductAttention_0": attention(*parts, dense("head.attention.out_proj")),
            "LayerNorm_0": layer_norm("head.layernorm"),
            "MlpBlock_0": {"Dense_0": dense("head.mlp.fc1"), "Dense_1": dense("head.mlp.fc2")},
        },
    }

    def flat(tree, prefix):
        if not isinstance(tree, dict):
            return {prefix: tree}
        return {k: v for name, part in tree.items() for k, v in flat(part, f"{prefix}/{name}").items()}

    arrays = flat(tree, "params/img") | {"params/txt/head/bias": np.zeros(3, np.float32), "params/t": np.zeros(1, "f")}
    each = [flat(b, "") for b in blocks]
    for name in each[0]:
        if stacked:
            arrays[f"params/img/Transformer/encoderblock{name}"] = np.stack([b[name] for b in each])
        else:
            arrays |= {f"params/img/Transformer/encoderblock_{i}{name}": b[name] for i, b in enumerate(each)}
    np.savez(folder / "siglip2.npz", **arrays)
    convert_file("siglip2_vitb16", config, folder / "siglip2.npz", folder / "ours.safetensors")
    vit = load_backbone("siglip2_vitb16", folder / "ours.safetensors", 48).double()
    with torch.no_grad():
        images, oracle = images_like(2, 48), oracle.float().double()
        ours = vit.pool(vit(images))
        torch.testing.assert_close(ours, oracle(images).pooler_output, rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", [64, 384])
def test_pe_core_is_timms(side, folder):
    """timm makes rotary positions in float32. The largest difference was 1.6e-7 on 2026-11-26, of timm 1.0.31."""
    timm = optional("timm")
    grid = side // 16
    name, sizes = "vit_pe_core_tiny_patch16_384", dict(depth=2, img_size=side, ref_feat_shape=(grid, grid))
    theirs, generator = timm.create_model(name, **sizes, num_classes=0), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_file(theirs.state_dict(), folder / "timm.safetensors")
    config = dataclasses.replace(VIT_PRESETS["pe_core_t16"], depth=2, native_size=side)
    convert_file("pe_core_t16", config, folder / "timm.safetensors", folder / "ours.safetensors")
    vit, images = in_float64(load_backbone("pe_core_t16", folder / "ours.safetensors", side)), images_like(2, side)
    with torch.no_grad():
        features = theirs.eval().double().forward_features(images)
        torch.testing.assert_close(vit(images), features, rtol=0, atol=1e-5)
        torch.testing.assert_close(vit.pool(vit(images)), theirs.forward_head(features), rtol=0, atol=1e-5)
