"""Conversion: every family's names, every tensor accounted for, nothing executed, nothing half written."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitface.__main__ import main
from vitface.errors import ConfigError, WeightsError
from vitface.files import sha256_file
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.store.backbone import expected_tensors, load_backbone, read_backbone, read_projection
from vitface.weights import conversion
from vitface.weights.conversion import convert_backbone, convert_file
from vitface.weights.keymaps import FAMILIES
from vitface.weights.sources import FACES_LICENCE, SOURCES

DATA = Path(os.environ.get("VITFACE_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def tiny(name: str, **changes) -> ViTConfig:
    sizes = {"native_size": 2 * VIT_PRESETS[name].patch_size, "embed_dim": 8, "depth": 2, "num_heads": 2}
    sizes["pool_heads"] = 2 if VIT_PRESETS[name].pool_heads else 0
    return dataclasses.replace(VIT_PRESETS[name], **(sizes | changes))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_state(config: ViTConfig) -> dict[str, Tensor]:
    """The tensors a conversion should give, every value different."""
    shapes = {key: tensor.shape for key, tensor in ViT(config, config.native_size).state_dict().items()}
    return {key: randn(*shape, seed=seed) for seed, (key, shape) in enumerate(shapes.items())}


# Each of these writes our tensors as another project does; the names are theirs, copied from their files' listings.


def as_meta(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**ours, "mask_token": randn(1, 8)}


def as_timm(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**ours, "head.weight": randn(5, 8), "head.bias": torch.zeros(5)}


def renamed(ours: dict[str, Tensor], table: list[tuple[str, str]], parts: str | None = None) -> dict[str, Tensor]:
    """`ours` with substrings replaced; `parts` has the split qkv's name with X for query, key and value."""
    theirs = {}
    for key, tensor in ours.items():
        for mine, other in table:
            key = key.replace(mine, other)
        if parts and "attn.qkv" in key:
            # written in the order k, v, q, as transformers' CLIP files are
            for part in (1, 2, 0):
                name = key.replace("attn.qkv", parts.replace("X", ("query", "key", "value")[part]))
                theirs[name] = tensor.chunk(3)[part].clone()
        else:
            theirs[key] = tensor
    return theirs


def as_transformers_dinov2(ours: dict[str, Tensor], version: int = 4, prefix: str = "") -> dict[str, Tensor]:
    table = [
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("ls1.gamma", "layer_scale1.lambda1"),
        ("ls2.gamma", "layer_scale2.lambda1"),
        ("attn.proj", "attention.output.dense" if version == 4 else "attention.o_proj"),
    ]
    theirs = renamed(ours, table, "attention.attention.X" if version == 4 else "attention.X")
    for part in ("query", "key", "value") if version == 5 else ():
        theirs = {key.replace(f"attention.{part}", f"attention.{part[0]}_proj"): t for key, t in theirs.items()}
    theirs = {f"encoder.layer{key[6:]}" if key.startswith("blocks.") else key: t for key, t in theirs.items()}
    theirs["embeddings.mask_token"] = randn(1, 8)
    theirs = {f"layernorm{key[4:]}" if key.startswith("norm.") else key: t for key, t in theirs.items()}
    if prefix:
        theirs = {prefix + key: tensor for key, tensor in theirs.items()}
        theirs |= {"classifier.weight": randn(5, 16), "classifier.bias": randn(5)}
    return theirs


def as_transformers_vit(ours: dict[str, Tensor], version: int = 4, prefix: str = "") -> dict[str, Tensor]:
    table = [
        ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
        ("pos_embed", "embeddings.position_embeddings"),
        ("cls_token", "embeddings.cls_token"),
        ("norm1", "layernorm_before"),
        ("norm2", "layernorm_after"),
        ("attn.proj", "attention.output.dense" if version == 4 else "attention.o_proj"),
        *([("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense")] if version == 4 else []),
    ]
    theirs = renamed(ours, table, "attention.attention.X" if version == 4 else "attention.X")
    for part in ("query", "key", "value") if version == 5 else ():
        theirs = {key.replace(f"attention.{part}", f"attention.{part[0]}_proj"): t for key, t in theirs.items()}
    blocks = "encoder.layer" if version == 4 else "layers"
    theirs = {f"{blocks}{key[6:]}" if key.startswith("blocks.") else key: t for key, t in theirs.items()}
    theirs = {f"layernorm{key[4:]}" if key.startswith("norm.") else key: t for key, t in theirs.items()}
    theirs = {**theirs, "pooler.dense.weight": randn(8, 8), "pooler.dense.bias": randn(8)}
    if prefix:
        theirs = {prefix + key: tensor for key, tensor in theirs.items()}
        theirs |= {"classifier.weight": randn(5, 8), "classifier.bias": randn(5)}
    return theirs


def as_transformers_clip(ours: dict[str, Tensor], prefix: str = "vision_model.") -> dict[str, Tensor]:
    table = [
        ("norm_pre", "pre_layrnorm"),
        ("patch_embed.proj", "embeddings.patch_embedding"),
        ("pos_embed", "embeddings.position_embedding.weight"),
        ("cls_token", "embeddings.class_embedding"),
        ("norm1", "layer_norm1"),
        ("norm2", "layer_norm2"),
        ("attn.proj", "self_attn.out_proj"),
    ]
    theirs = renamed(ours, table, "self_attn.X")
    for part in ("query", "key", "value"):
        theirs = {key.replace(f"self_attn.{part}", f"self_attn.{part[0]}_proj"): t for key, t in theirs.items()}
    theirs = {f"encoder.layers{key[6:]}" if key.startswith("blocks.") else key: t for key, t in theirs.items()}
    theirs = {f"post_layernorm{key[4:]}" if key.startswith("norm.") else key: t for key, t in theirs.items()}
    theirs["embeddings.class_embedding"] = theirs["embeddings.class_embedding"].reshape(8)
    positions = theirs["embeddings.position_embedding.weight"]
    theirs["embeddings.position_embedding.weight"] = positions[0]
    theirs["embeddings.position_ids"] = torch.arange(positions.shape[1])[None]
    theirs = {prefix + key: tensor for key, tensor in theirs.items()}
    if prefix:
        theirs |= {
            "visual_projection.weight": randn(6, 8),
            "text_projection.weight": randn(6, 4),
            "logit_scale": torch.tensor(4.6),
            "text_model.embeddings.token_embedding.weight": randn(9, 4),
            "text_model.encoder.layers.0.mlp.fc1.weight": randn(4, 4),
        }
    return theirs


def as_openai(ours: dict[str, Tensor], prefix: str = "visual.") -> dict[str, Tensor]:
    table = [
        ("norm_pre", "ln_pre"),
        ("patch_embed.proj", "conv1"),
        ("pos_embed", "positional_embedding"),
        ("cls_token", "class_embedding"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("attn.proj", "attn.out_proj"),
        ("attn.qkv.", "attn.in_proj_"),
    ]
    theirs = renamed(ours, table)
    theirs = {f"transformer.resblocks{key[6:]}" if key.startswith("blocks.") else key: t for key, t in theirs.items()}
    theirs = {f"ln_post{key[4:]}" if key.startswith("norm.") else key: t for key, t in theirs.items()}
    theirs["class_embedding"] = theirs["class_embedding"].reshape(8)
    theirs["positional_embedding"] = theirs["positional_embedding"][0]
    theirs = {prefix + key: tensor for key, tensor in (theirs | {"proj": randn(8, 6)}).items()}
    if prefix:
        theirs |= {
            "positional_embedding": randn(7, 4),
            "text_projection": randn(4, 6),
            "logit_scale": torch.tensor(4.6),
            "token_embedding.weight": randn(9, 4),
            "ln_final.weight": randn(4),
            "ln_final.bias": randn(4),
            "transformer.resblocks.0.attn.in_proj_weight": randn(12, 4),
            "transformer.resblocks.1.mlp.c_fc.bias": randn(16),
        }
    return theirs


LAYOUTS = {
    "meta dinov2": ("dinov2_vits14", as_meta),
    "timm dinov2": ("dinov2_vits14", lambda ours: dict(ours)),
    "timm clip": ("clip_vitb16", as_timm),
    "timm vit": ("vit_tiny_patch16", as_timm),
    "transformers dinov2, v4": ("dinov2_vits14", as_transformers_dinov2),
    "transformers dinov2, v5": ("dinov2_vits14", lambda ours: as_transformers_dinov2(ours, 5)),
    "transformers dinov2, classifier": ("dinov2_vits14", lambda ours: as_transformers_dinov2(ours, 4, "dinov2.")),
    "transformers vit, v4": ("vit_tiny_patch16", as_transformers_vit),
    "transformers vit, v5": ("vit_tiny_patch16", lambda ours: as_transformers_vit(ours, 5)),
    "transformers vit, classifier": ("vit_tiny_patch16", lambda ours: as_transformers_vit(ours, 4, "vit.")),
    "transformers clip, v4": ("clip_vitb16", as_transformers_clip),
    "transformers clip, v5": ("clip_vitb16", lambda ours: as_transformers_clip(ours, "")),
    "transformers clip, nested": ("clip_vitb16", lambda ours: as_transformers_clip(ours, "vision_model.vision_model.")),
    "open_clip": ("clip_vitb16", as_openai),
    "open_clip, tower alone": ("clip_vitb16", lambda ours: as_openai(ours, "")),
}


def write(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    return path


def convert_state(state: dict[str, Tensor], name: str, config: ViTConfig, folder: Path) -> dict[str, Tensor]:
    convert_file(name, config, write(folder / "source.safetensors", state), folder / "out.safetensors")
    return read_backbone(folder / "out.safetensors")[2]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_our_tensors_bitwise(layout, tmp_path):
    name, write_as = LAYOUTS[layout]
    config = tiny(name)
    ours = random_state(config)
    theirs = write_as(ours)
    src = write(tmp_path / "source.safetensors", theirs)
    done = convert_file(name, config, src, tmp_path / "out.safetensors")
    assert_same(read_backbone(tmp_path / "out.safetensors")[2], ours)
    assert done.used + sum(done.dropped.values()) == len(theirs)
    split = 4 * config.depth if "transformers" in layout else 0  # q, k and v are three tensors instead of one
    assert done.used == len(ours) + split + (read_projection(tmp_path / "out.safetensors") is not None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_tensor_is_needed_or_listed(layout, tmp_path):
    name, write_as = LAYOUTS[layout]
    config = tiny(name, depth=1)
    theirs = write_as(random_state(config))
    path = tmp_path / "source.safetensors"
    dropped = {"mask", "head.", "pooler", "classifier", "position_ids", "proj", "text", "logit", "token_", "ln_final"}
    for key in theirs:
        rest = {other: tensor for other, tensor in theirs.items() if other != key}
        try:
            conversion.map_tensors(path, rest, name, config)
        except WeightsError as error:
            assert key in str(error) or "known layouts" in str(error)
        else:
            assert any(part in key for part in dropped) or (key, layout) in {
                ("positional_embedding", "open_clip"),
                ("transformer.resblocks.0.attn.in_proj_weight", "open_clip"),
                ("transformer.resblocks.1.mlp.c_fc.bias", "open_clip"),
            }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["extra.weight", "blocks.0.extra", "visual.blocks.0.norm3.weight", "norm3.bias"])
def test_an_unknown_tensor_is_named(layout, key, tmp_path):
    name, write_as = LAYOUTS[layout]
    config = tiny(name)
    with pytest.raises(WeightsError, match=key.replace(".", r"\.")):
        convert_state(write_as(random_state(config)) | {key: randn(8)}, name, config, tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_too_many_or_too_few_is_named(layout, tmp_path):
    name, write_as = LAYOUTS[layout]
    theirs = write_as(random_state(tiny(name)))
    with pytest.raises(WeightsError, match=r"no place for .*\.1\."):
        convert_state(theirs, name, tiny(name, depth=1), tmp_path)
    with pytest.raises(WeightsError, match=r"\.2\..* is missing"):
        convert_state(theirs, name, tiny(name, depth=3), tmp_path)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(layout=st.sampled_from(sorted(LAYOUTS)), order=st.randoms(use_true_random=False), depth=st.integers(1, 3))
def test_the_order_in_the_file_means_nothing(layout, order, depth):
    name, write_as = LAYOUTS[layout]
    config = tiny(name, depth=depth)
    ours = random_state(config)
    items = list(write_as(ours).items())
    order.shuffle(items)
    assert_same(conversion.map_tensors(Path("f"), dict(items), name, config)[2], ours)


def test_two_names_of_one_tensor_are_both_named(tmp_path):
    config = tiny("dinov2_vits14")
    theirs = as_transformers_dinov2(random_state(config))
    theirs["encoder.layer.1.attention.q_proj.weight"] = randn(8, 8)
    with pytest.raises(WeightsError, match=r"layer.1.attention.attention.query.weight and .*layer.1.attention.q_proj"):
        convert_state(theirs, "dinov2_vits14", config, tmp_path)


@pytest.mark.parametrize("key", ["register_tokens", "reg_token", "storage_tokens", "embeddings.register_tokens"])
def test_register_tokens_make_it_another_preset(key, monkeypatch, tmp_path):
    for name in ("dinov2_vits14", "dinov2_vits14_reg"):
        monkeypatch.setitem(VIT_PRESETS, name, tiny(name))
    ours = random_state(tiny("dinov2_vits14"))
    theirs = as_transformers_dinov2(ours) if key.startswith("embeddings") else as_meta(ours)
    with pytest.raises(WeightsError, match="4 registers; convert it as dinov2_vits14_reg"):
        convert_state(theirs | {key: randn(1, 4, 8)}, "dinov2_vits14", tiny("dinov2_vits14"), tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(bad, tmp_path):
    config = tiny("clip_vitb16")
    theirs = as_openai(random_state(config))
    theirs["visual.ln_post.bias"][3] = bad
    with pytest.raises(WeightsError, match=r"visual\.ln_post\.bias has NaN or infinite"):
        convert_state(theirs, "clip_vitb16", config, tmp_path)


def test_a_dropped_tensor_may_hold_anything(tmp_path):
    config = tiny("dinov2_vits14")
    ours = random_state(config)
    theirs = {**ours, "mask_token": torch.full((1, 8), float("nan"))}
    assert_same(convert_state(theirs, "dinov2_vits14", config, tmp_path), ours)


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("encoder.layer.0.attention.attention.key.weight", randn(4, 8)),
        ("encoder.layer.0.attention.attention.key.bias", torch.zeros(8, dtype=torch.int64)),
        ("encoder.layer.1.mlp.fc1.weight", randn(8, 32)),
        ("embeddings.position_embeddings", randn(1, 11, 8)),
        ("embeddings.position_embeddings", randn(5, 1, 8)),
        ("embeddings.cls_token", torch.tensor(1.0)),
        ("layernorm.weight", randn(1, 8)),
    ],
)
def test_a_wrong_shape_or_type_is_named(key, tensor, tmp_path):
    config = tiny("dinov2_vits14")
    theirs = as_transformers_dinov2(random_state(config))
    assert key in theirs
    with pytest.raises(WeightsError, match=key.replace(".", r"\.") + ".* expected"):
        convert_state(theirs | {key: tensor}, "dinov2_vits14", config, tmp_path)


def test_another_presets_file_is_told_by_its_sizes(monkeypatch, tmp_path):
    monkeypatch.setitem(VIT_PRESETS, "dinov2_vits14", tiny("dinov2_vits14"))
    monkeypatch.setitem(VIT_PRESETS, "dinov2_vitb14", tiny("dinov2_vitb14", embed_dim=16))
    src = write(tmp_path / "source.safetensors", as_meta(random_state(VIT_PRESETS["dinov2_vitb14"])))
    for name in ("dinov2_vits14", "clip_vitb16", "vit_tiny_patch16"):
        with pytest.raises(WeightsError, match="2 blocks of width 16; convert it as dinov2_vitb14"):
            convert_backbone(name, src, tmp_path / "out.safetensors")
    convert_backbone("dinov2_vitb14", src, tmp_path / "out.safetensors")


def test_a_layout_that_lacks_a_layer_says_so(tmp_path):
    theirs = as_openai(random_state(tiny("clip_vitb16")))
    config = tiny("dinov2_vits14", patch_size=16, native_size=32)
    with pytest.raises(WeightsError, match=r"needs patch_embed.proj.bias, which OpenAI or open_clip files do not have"):
        convert_state(theirs, "dinov2_vits14", config, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_becomes_float32(dtype, tmp_path):
    config = tiny("clip_vitb16")
    theirs = {key: tensor.to(dtype) for key, tensor in as_openai(random_state(config)).items()}
    expected = {key: tensor.to(dtype).float() for key, tensor in random_state(config).items()}
    assert_same(convert_state(theirs, "clip_vitb16", config, tmp_path), expected)


class OpenAIBlock(nn.Module):
    """A residual block as openai/CLIP writes it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict([("c_fc", nn.Linear(width, 4 * width)), ("c_proj", nn.Linear(4 * width, width))])
        )

    def forward(self, x):  # (N, B, D)
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))


class OpenAIVision(nn.Module):
    """The vision tower as openai/CLIP writes it, up to its unprojected tokens."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, patch = config.embed_dim, config.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.grid(config.native_size) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        blocks = [OpenAIBlock(width, config.num_heads) for _ in range(config.depth)]
        self.transformer.resblocks = nn.Sequential(*blocks)
        self.proj = nn.Parameter(torch.empty(width, 6))

    def forward(self, images):
        x = self.conv1(images).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer.resblocks(self.ln_pre(x).transpose(0, 1))
        return self.ln_post(x.transpose(0, 1))


@torch.no_grad()
def test_openai_layout_computes_what_openai_computes(tmp_path):
    config = tiny("clip_vitb16", native_size=64, embed_dim=32, num_heads=4)
    tower = OpenAIVision(config)
    for seed, parameter in enumerate(tower.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=seed) * 0.3)
    src = write(tmp_path / "s.safetensors", {f"visual.{key}": tensor for key, tensor in tower.state_dict().items()})
    convert_file("clip_vitb16", config, src, tmp_path / "out.safetensors")
    images = randn(3, 3, 64, 64).double()
    ours = load_backbone("clip_vitb16", tmp_path / "out.safetensors", 64).double()(images)
    assert (ours - tower.double()(images)).abs().max() <= 1e-9


# Reading files


def save_zip(path: Path, state) -> Path:
    torch.save(state, path)
    return path


def save_legacy(path: Path, state) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def as_training_checkpoint(path: Path, state) -> Path:
    wrapped = {"epoch": 32, "name": "run", "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
    return save_zip(path, wrapped)


def as_model_entry(path: Path, state) -> Path:
    return save_zip(path, {"model": state})


@pytest.mark.parametrize("save", [write, save_zip, save_legacy, as_training_checkpoint, as_model_entry])
@pytest.mark.parametrize("layout", ["meta dinov2", "open_clip"])
def test_a_file_is_read_by_what_is_inside_it(save, layout, tmp_path):
    name, write_as = LAYOUTS[layout]
    config = tiny(name)
    ours = random_state(config)
    src = save(tmp_path / "pytorch_model.bin", write_as(ours))
    convert_file(name, config, src, tmp_path / "out.safetensors")
    assert_same(read_backbone(tmp_path / "out.safetensors")[2], ours)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [save_zip, save_legacy, lambda path, state: path.write_bytes(pickle.dumps(state))])
def test_a_pickle_with_code_is_refused_and_not_run(save, tmp_path):
    src, trace = tmp_path / "evil.pth", tmp_path / "executed"
    save(src, {"cls_token": Hostile(trace)})
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), src, tmp_path / "out.safetensors")
    assert not trace.exists()


@pytest.mark.parametrize("save", [save_zip, save_legacy, write])
@pytest.mark.parametrize("part", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_ends_too_early_is_said_to_be_damaged(save, part, tmp_path):
    config = tiny("dinov2_vits14")
    src = save(tmp_path / "file", random_state(config))
    src.write_bytes(src.read_bytes()[: int(part * src.stat().st_size)])
    with pytest.raises(WeightsError, match=r"file.*(damaged|not a file of plain tensors)"):
        convert_file("dinov2_vits14", config, src, tmp_path / "out.safetensors")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(save=st.sampled_from([save_zip, save_legacy, write]), data=st.data())
def test_a_file_with_wrong_bytes_converts_or_says_so(folder, save, data):
    config = tiny("dinov2_vits14", embed_dim=2, depth=1, patch_size=2, native_size=4)
    src = save(folder / "file", random_state(config))
    content = bytearray(src.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    src.write_bytes(content)
    try:
        convert_file("dinov2_vits14", config, src, folder / "out.safetensors")
    except WeightsError as error:
        assert str(src) in str(error)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"<html>not found</html>", "holds no tensors by name but is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        (b"", "ends too early"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_said_to_be_none(content, says, tmp_path):
    (tmp_path / "f.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=says):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), tmp_path / "f.pth", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"optimizer": {}, "epoch": 3}, "optimizer is a dict, not a tensor"),
        ([torch.zeros(3)], "holds no tensors by name"),
        (torch.zeros(3), "holds no tensors by name"),
        ({}, "holds no tensors by name"),
        ({3: torch.zeros(3)}, "3 is a Tensor"),
        ({"visual.trunk.cls_token": torch.zeros(3)}, "none of the known layouts.*visual.trunk.cls_token"),
    ],
)
def test_files_of_something_else_are_named(content, says, tmp_path):
    src = save_zip(tmp_path / "f.pth", content)
    with pytest.raises(WeightsError, match=says):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), src, tmp_path / "out.safetensors")


def scripted(path: Path, state: dict[str, Tensor]) -> Path:
    """A TorchScript archive of `state`, in the precisions and with the three scalars of OpenAI's."""

    class Holder(nn.Module):
        def forward(self, x):
            return x

    root = Holder()
    for key, tensor in state.items():
        *parents, leaf = key.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, Holder())
            module = module._modules[parent]
        kept = "ln_" in key or "embedding" in key
        module.register_parameter(leaf, nn.Parameter(tensor if kept else tensor.half()))
    for scalar, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
        root.register_buffer(scalar, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
        torch.jit.save(torch.jit.script(root), path)
    return path


def test_openais_archive_is_read_if_it_is_the_published_one(monkeypatch, tmp_path):
    config = tiny("clip_vitb16")
    src = scripted(tmp_path / "ViT-B-16.pt", as_openai(random_state(config)))
    pinned = dataclasses.replace(SOURCES["clip_vitb16"], sha256=sha256_file(src))
    monkeypatch.setitem(SOURCES, "clip_vitb16", pinned)
    done = convert_file("clip_vitb16", config, src, tmp_path / "out.safetensors")
    expected = {
        key: tensor if "norm" in key or key in ("cls_token", "pos_embed") else tensor.half().float()
        for key, tensor in random_state(config).items()
    }
    _, _, tensors, source = read_backbone(tmp_path / "out.safetensors")
    assert_same(tensors, expected)
    assert done.published and source["licence"] == "MIT (OpenAI's CLIP)"
    assert {"input_resolution", "context_length", "vocab_size"} <= done.dropped.keys()


def test_any_other_archive_is_refused(monkeypatch, tmp_path):
    def never(*args, **kwargs):
        raise AssertionError("an archive that is not the published one was opened")

    config = tiny("clip_vitb16")
    src = scripted(tmp_path / "ViT-B-16.pt", as_openai(random_state(config)))
    monkeypatch.setattr(torch.jit, "load", never)
    with pytest.raises(WeightsError, match=rf"TorchScript archive.*{sha256_file(src)}") as caught:
        convert_file("clip_vitb16", config, src, tmp_path / "out.safetensors")
    assert "vitface fetch clip" in str(caught.value)


# Writing files


def test_settings_and_origin_are_in_the_file(tmp_path):
    config = tiny("clip_vitb16", act="gelu")
    src = write(tmp_path / "source.safetensors", as_openai(random_state(config)))
    convert_file("clip_vitb16", config, src, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    stored = json.loads(metadata["config"])
    assert (stored["act"], stored["norm_eps"], stored["pos_interp"]) == ("gelu", 1e-5, "size")
    assert stored["mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert stored["std"] == [0.26862954, 0.26130258, 0.27577711]
    source = json.loads(metadata["source"])
    assert source["sha256"] == sha256_file(src) and source["file"] == "source.safetensors"
    assert source["licence"].startswith("MIT") and "not a pinned one" in source["licence"]
    assert read_backbone(tmp_path / "out.safetensors")[1] == config


@pytest.mark.parametrize("layout", ["transformers dinov2, v4", "open_clip", "timm vit"])
def test_round_trip_through_load_backbone_is_bitwise(layout, tmp_path):
    name, write_as = LAYOUTS[layout]
    config = tiny(name)
    ours = random_state(config)
    convert_state(write_as(ours), name, config, tmp_path)
    vit = load_backbone(name, tmp_path / "out.safetensors", config.native_size)
    assert vit.config == config
    assert_same(dict(vit.state_dict()), ours)


@pytest.mark.parametrize(
    ("save", "file"), [(write, "model.safetensors"), (save_zip, "dinov2.pth"), (scripted, "clip.pt")]
)
def test_a_source_file_is_answered_with_the_command(save, file, tmp_path):
    src = save(tmp_path / file, as_openai(random_state(tiny("clip_vitb16"))))
    with pytest.raises(WeightsError) as caught:
        load_backbone("clip", src, 32)
    assert f"vitface convert NAME --src {src}" in str(caught.value)


def test_an_existing_file_is_replaced_only_by_a_complete_one(monkeypatch, tmp_path):
    config = tiny("dinov2_vits14")
    ours = random_state(config)
    out = tmp_path / "out.safetensors"
    good = write(tmp_path / "good.safetensors", as_meta(ours))
    bad = write(tmp_path / "bad.safetensors", as_meta(ours) | {"norm.bias": torch.full((8,), float("nan"))})
    out.write_bytes(b"what was there")
    with pytest.raises(WeightsError):
        convert_file("dinov2_vits14", config, bad, out)
    assert out.read_bytes() == b"what was there"

    def full_disk(path, data, private):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("vitface.files.write_synced", full_disk)
        with pytest.raises(WeightsError, match=r"cannot write .*No space left"):
            convert_file("dinov2_vits14", config, good, out)
    assert out.read_bytes() == b"what was there"
    convert_file("dinov2_vits14", config, good, out)
    assert_same(read_backbone(out)[2], ours)
    assert set(tmp_path.iterdir()) == {bad, good, out}


def test_paths_that_cannot_be_meant(tmp_path):
    config = tiny("dinov2_vits14")
    src = write(tmp_path / "source.safetensors", as_meta(random_state(config)))
    content = src.read_bytes()
    for bad, out, says in (
        (tmp_path / "absent.pth", tmp_path / "o", "no such file"),
        (tmp_path, tmp_path / "o", "name the file inside"),
        (src, tmp_path, "is a folder"),
        (src, tmp_path / "." / "source.safetensors", "is the source itself"),
        (src, src / "out.safetensors", "cannot write"),
    ):
        with pytest.raises(WeightsError, match=says):
            convert_file("dinov2_vits14", config, bad, out)
    assert src.read_bytes() == content
    convert_file("dinov2_vits14", config, src, tmp_path / "new" / "folder" / "out.safetensors")
    with pytest.raises(WeightsError, match="converted file already"):
        convert_file("dinov2_vits14", config, tmp_path / "new/folder/out.safetensors", tmp_path / "o.safetensors")


# The command


@pytest.fixture
def tiny_clip(monkeypatch, tmp_path):
    """A tiny clip_vitb16, an open_clip file of it, and an empty working folder."""
    monkeypatch.setitem(VIT_PRESETS, "clip_vitb16", tiny("clip_vitb16"))
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "open_clip.safetensors", as_openai(random_state(VIT_PRESETS["clip_vitb16"])))


def test_the_command_reports_and_names_the_next_one(tiny_clip, tmp_path, capsys):
    assert main(["convert", "clip", "--src", str(tiny_clip)]) == 0
    printed = capsys.readouterr().out
    # 7 outside the blocks, 12 in each of the two, proj; 6 names of the text side, 2 of its blocks
    assert "used      32 of 40 tensors" in printed
    dropped = next(line for line in printed.splitlines() if line.startswith("dropped   "))
    assert set(dropped.removeprefix("dropped   ").split(", ")) == {
        "positional_embedding",
        "text_projection",
        "token_embedding.weight",
        "ln_final.* (2)",
        "logit_scale",
        "transformer.resblocks.* (2)",
    }
    assert "assumed as the preset's; --act, --mean and --std if the weights were trained with others" in printed
    assert "wrote     weights/clip_vitb16.safetensors" in printed
    assert printed.endswith("next      vitface train --backbone clip_vitb16\n")
    assert load_backbone("clip", image_size=32).config.act == "quick_gelu"


def test_act_overrides_the_presets(tiny_clip, capsys):
    assert main(["convert", "clip", "--src", str(tiny_clip), "--out", "mine.safetensors", "--act", "gelu"]) == 0
    printed = capsys.readouterr().out
    assert "activation gelu," in printed
    assert printed.endswith("next      vitface train --backbone clip_vitb16 --weights mine.safetensors\n")
    exact = load_backbone("clip", "mine.safetensors", 32)
    assert exact.config == dataclasses.replace(VIT_PRESETS["clip_vitb16"], act="gelu")
    assert exact.blocks[0].mlp.act == "gelu"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["clip", "--src", "absent.pt"], "absent.pt: no such file"),
        (["resnet50", "--src", "absent.pt"], "unknown backbone 'resnet50'; known: dinov2, dinov3, clip"),
        (["vit_nano", "--src", "absent.pt"], "ships with the package"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(argv, says, capsys):
    assert main(["convert", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and says in captured.err and captured.out == ""


def test_flags_that_argparse_refuses_exit_2(capsys):
    for argv in ([], ["clip"], ["clip", "--src", "f", "--act", "relu"]):
        with pytest.raises(SystemExit) as caught:
            main(["convert", *argv])
        assert caught.value.code == 2
    assert "see vitface convert --help" in capsys.readouterr().err


def test_the_module_runs_as_documented():
    command = [sys.executable, "-m", "vitface", "convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "examples:" in done.stdout and "--src FILE" in done.stdout


def test_unknown_names_are_config_errors(tmp_path):
    with pytest.raises(ConfigError):
        convert_backbone("resnet50", tmp_path / "f", tmp_path / "o")


# The tables


def test_the_key_maps_name_only_our_tensors():
    configs = [tiny(name, depth=1) for name in VIT_PRESETS]
    ours = {key.replace("blocks.0.", "blocks.{i}.") for config in configs for key in expected_tensors(config)}
    marks = ("[q]", "[k]", "[v]", "[gate]", "[up]")
    for family in FAMILIES:
        targets = [target.split("[")[0] for target in family.keys.values()]
        assert set(targets) <= ours
        assert all(target.endswith(marks) == ("[" in target) for target in family.keys.values())


LICENCES = ("Apache-2.0", "MIT", "DINOv3 License", "FAIR Noncommercial Research License", FACES_LICENCE)


def test_the_pinned_sources_are_complete():
    for name, source in SOURCES.items():
        assert name in VIT_PRESETS and source.licence in LICENCES
        if source.url is not None:
            assert source.url.startswith("https://") and len(bytes.fromhex(source.sha256)) == 32
        if name.startswith("clip"):
            assert source.sha256 in source.url


@pytest.mark.skipif(not (DATA / "vit_tiny_patch16_224_augreg.pth").exists(), reason="needs VITFACE_TEST_DATA")
def test_the_real_vit_tiny_converts(tmp_path):
    src, out = DATA / "vit_tiny_patch16_224_augreg.pth", tmp_path / "out.safetensors"
    done = convert_backbone("vit_tiny_patch16", src, out)
    source = torch.load(src, weights_only=True)  # noqa: TID251
    assert done.dropped == {"head.weight": 1, "head.bias": 1} and done.used == 150
    assert_same(load_file(out), {key: tensor for key, tensor in source.items() if not key.startswith("head.")})
    assert load_backbone("vit_tiny_patch16", out, 224).config == VIT_PRESETS["vit_tiny_patch16"]


class _OfAnySize:
    def __reduce__(self):
        return bytearray, (1 << 40,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_any_memory_is_not_opened(tmp_path, zipped):
    path = tmp_path / "bomb.pth"
    torch.save({"weight": _OfAnySize()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="makes a bytearray"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), path, tmp_path / "out")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(_OfAnySize()))
    with pytest.raises(WeightsError, match="makes a bytearray"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), tmp_path / "bare.pth", tmp_path / "out")


def test_an_archive_that_is_compressed_is_not_opened(tmp_path):
    torch.save({"weight": torch.zeros(1 << 16)}, tmp_path / "plain.pth")
    small = zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, small:
        for entry in plain.namelist():
            small.writestr(entry, plain.read(entry))
    with pytest.raises(WeightsError, match="it is compressed"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), tmp_path / "small.pth", tmp_path / "out")


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.eye(8).to_sparse(),
        lambda: torch.eye(8).to_sparse_csr(),
        lambda: torch.empty(8, device="meta"),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.empty(0),
    ],
    ids=["sparse", "csr", "meta", "nested", "empty"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tensors_that_are_no_plain_ones_are_named(tmp_path, odd):
    config = tiny("dinov2_vits14")
    torch.save({**as_meta(random_state(config)), "cls_token": odd()}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=r"odd\.pth: (cls_token|damaged)"):
        convert_file("dinov2_vits14", config, tmp_path / "odd.pth", tmp_path / "out")


def test_a_header_without_end_is_not_read(tmp_path):
    (tmp_path / "long.safetensors").write_bytes((1 << 26).to_bytes(8, "little") + b"{" + bytes(100))
    with pytest.raises(WeightsError, match="its header claims 67,108,864 bytes"):
        convert_file("dinov2_vits14", tiny("dinov2_vits14"), tmp_path / "long.safetensors", tmp_path / "out")
