"""Every family's names and shapes: each tensor of a layout has its place, is dropped by name, or is an error."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import TEST_DATA
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, as_meta, as_openai, as_transformers_dinov2, assert_same, randn, random_state, tiny, write
from safetensors.torch import load_file
from torch import Tensor, nn

from vitface.errors import WeightsError
from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.store.backbone import expected_tensors, load_backbone, read_backbone, read_projection
from vitface.weights import conversion
from vitface.weights.conversion import convert_backbone, convert_file
from vitface.weights.keymaps import FAMILIES


def convert_state(state: dict[str, Tensor], name: str, config: ViTConfig, folder: Path) -> dict[str, Tensor]:
    convert_file(name, config, write(folder / "source.safetensors", state), folder / "out.safetensors")
    return read_backbone(folder / "out.safetensors")[2]


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


def test_the_key_maps_name_only_our_tensors():
    configs = [tiny(name, depth=1) for name in VIT_PRESETS]
    ours = {key.replace("blocks.0.", "blocks.{i}.") for config in configs for key in expected_tensors(config)}
    marks = ("[q]", "[k]", "[v]", "[gate]", "[up]")
    for family in FAMILIES:
        targets = [target.split("[")[0] for target in family.keys.values()]
        assert set(targets) <= ours
        assert all(target.endswith(marks) == ("[" in target) for target in family.keys.values())


@pytest.mark.skipif(not (TEST_DATA / "vit_tiny_patch16_224_augreg.pth").exists(), reason="needs VITFACE_TEST_DATA")
def test_the_real_vit_tiny_converts(tmp_path):
    src, out = TEST_DATA / "vit_tiny_patch16_224_augreg.pth", tmp_path / "out.safetensors"
    done = convert_backbone("vit_tiny_patch16", src, out)
    source = torch.load(src, weights_only=True)  # noqa: TID251
    assert done.dropped == {"head.weight": 1, "head.bias": 1} and done.used == 150
    assert_same(load_file(out), {key: tensor for key, tensor in source.items() if not key.startswith("head.")})
    assert load_backbone("vit_tiny_patch16", out, 224).config == VIT_PRESETS["vit_tiny_patch16"]
