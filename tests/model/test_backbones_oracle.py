"""The backbones of today against other people's: transformers' DINOv2 with registers, DINOv3 and SigLIP, and SigLIP
under the names of big_vision's files.

Random models are saved, converted, loaded by us and compared in float64; transformers makes DINOv3's rotary positions
in float32. Widths and depths are small.
"""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import optional
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import images_like, in_float64, randomise, sizes, tiny

from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.store.backbone import load_backbone
from vitface.weights.conversion import convert_file

transformers = optional("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("oracle")


def dinov2_reg(config: ViTConfig, seed: int):
    settings_ = transformers.Dinov2WithRegistersConfig(**sizes(config), num_register_tokens=config.registers)
    return randomise(transformers.Dinov2WithRegistersModel(settings_), seed)


def dinov3(config: ViTConfig, seed: int):
    gated, hidden = config.act == "swiglu", int(config.mlp_ratio * config.embed_dim)
    settings_ = transformers.DINOv3ViTConfig(
        **sizes(config),
        num_register_tokens=config.registers,
        intermediate_size=hidden,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    return randomise(transformers.DINOv3ViTModel(settings_), seed)


def siglip(config: ViTConfig, seed: int):
    settings_ = transformers.SiglipVisionConfig(**sizes(config), intermediate_size=4 * config.embed_dim)
    assert settings_.hidden_act == "gelu_pytorch_tanh"
    return randomise(transformers.SiglipVisionModel(settings_), seed)


ORACLES = {
    "dinov2_vits14_reg": (dinov2_reg, 1e-9, 1e-5),  # name: (oracle, at the native grid, at another)
    "dinov3_vits16": (dinov3, 1e-5, 1e-5),
    "dinov3_vits16plus": (dinov3, 1e-5, 1e-5),
    "siglip2_vitb16": (siglip, 1e-9, 1e-5),
}


@torch.no_grad()
def worst(name: str, oracle, config: ViTConfig, side: int, images: torch.Tensor, folder) -> float:
    """The largest difference over the final-norm tokens and what the backbone makes of them."""
    oracle.save_pretrained(folder)
    convert_file(name, config, folder / "model.safetensors", folder / "ours.safetensors")
    vit = in_float64(load_backbone(name, folder / "ours.safetensors", side))
    options = {"interpolate_pos_encoding": True} if config.pool == "attention" else {}
    theirs = oracle.double()(images, **options)
    tokens = vit(images)
    return max(
        (tokens - theirs.last_hidden_state).abs().max().item(),
        (vit.pool(tokens) - theirs.pooler_output).abs().max().item(),
    )


@pytest.mark.parametrize("name", ORACLES)
def test_tokens_and_pool_at_the_native_grid(name, folder):
    config = tiny(name, depth=1)
    make, native, _ = ORACLES[name]
    images = images_like(1, config.native_size)
    assert worst(name, make(config, 0), config, config.native_size, images, folder) <= native


@settings(max_examples=16)
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
        images, oracle = images_like(2, 48), oracle.double()
        ours = vit.pool(vit(images))
        torch.testing.assert_close(ours, oracle(images).pooler_output, rtol=0, atol=1e-9)
