"""Adapters that others trained: of another base, behind wrappers, with a classifier or a text tower beside them."""

import json
import re

import pytest
import torch
from cases import case
from conftest import tiny_config, tiny_vit
from safetensors.torch import save_file

from vitface.config import VIT_PRESETS
from vitface.errors import ExchangeError, WeightsError
from vitface.exchange.from_peft import read_peft
from vitface.exchange.peft import CONFIG, TENSORS
from vitface.store.backbone import load_backbone, save_backbone

KIND = "PEFT"
TIMM = {"attn.qkv": (16, 48), "attn.proj": (16, 16)}
CLIP = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (16, 16)}
SMALL = "facebook/dinov2-small"


def lora(prefix, layers, blocks=2, seed=0):
    """The tensors of an adapter of rank 4 on `layers` {name: (in, out)} of each block, random."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for block in range(blocks):
        for name, (inputs, outputs) in layers.items():
            module = f"base_model.model.{prefix}{block}.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator)
    return tensors


def read(folder, tensors, backbone="dinov2_vits14", own_base=False, **settings):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}))
    return read_peft(folder, backbone, tiny_config(), own_base)


def same(one, two):
    return one.tensors.keys() == two.tensors.keys() and all(
        torch.equal(one.tensors[k], two.tensors[k]) for k in two.tensors
    )


@pytest.mark.parametrize(
    ("base", "backbone", "known"),
    [
        pytest.param(
            "facebook/dinov2-with-registers-small",
            "dinov2_vits14",
            SMALL,
            marks=case(
                "an adapter of `facebook/dinov2-with-registers-small` for `dinov2`",
                "refused: the embeddings would mean nothing",
            ),
        ),
        pytest.param(
            "timm/vit_small_patch14_reg4_dinov2.lvd142m",
            "dinov2_vits14",
            SMALL,
            marks=case("of timm's `vit_small_patch14_reg4_dinov2`", "refused"),
        ),
        pytest.param(
            "vit_base_patch16_224.augreg_in21k",
            "clip_vitb16",
            "openai/clip-vit-base-patch16",
            marks=case("of timm's `vit_base_patch16_224` for `clip`: equal names and shapes", "refused"),
        ),
        pytest.param("facebook/dinov2-base", "dinov2_vits14", SMALL),
    ],
)
def test_another_base(tmp_path, base, backbone, known):
    tensors = lora("blocks.", TIMM)
    with pytest.raises(ExchangeError, match=f"trained on '{base}', and not on {known}.*--weights FILE"):
        read(tmp_path, tensors, backbone, base_model_name_or_path=base)
    (note,) = read(tmp_path, tensors, backbone, own_base=True, base_model_name_or_path=base).notes
    assert note.startswith("warning: ") and base in note


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(
            "facebook/dinov2-small",
            marks=case("an adapter of the preset's own base, or a copy of its folder", "read without a word"),
        ),
        pytest.param("timm/vit_small_patch14_dinov2.lvd142m"),
        pytest.param("hf-hub:timm/vit_small_patch14_dinov2.lvd142m"),
        pytest.param("vit_small_patch14_dinov2"),
        pytest.param("/home/me/models/dinov2-small"),
        pytest.param("C:\\models\\dinov2-small"),
        pytest.param("me/dinov2-small"),
        pytest.param("dinov2_vits14"),
        pytest.param(None, marks=case("an adapter that names no base", "read")),
    ],
)
def test_the_right_base_under_its_names(tmp_path, base):
    assert read(tmp_path, lora("blocks.", TIMM), base_model_name_or_path=base).notes == []


@case("a base in a local folder of another name", "read, with a warning")
def test_a_local_base(tmp_path):
    (note,) = read(tmp_path, lora("blocks.", TIMM), base_model_name_or_path="./checkpoint-500").notes
    assert (
        note.startswith("warning: ")
        and "'./checkpoint-500', and not on facebook/dinov2-small or timm/vit_small" in note
    )


@case("`timm`'s name of CLIP with `quickgelu`", "known as CLIP's")
def test_timms_clip(tmp_path):
    base = "timm/vit_base_patch16_clip_quickgelu_224.openai"
    assert read(tmp_path, lora("blocks.", TIMM), "clip_vitb16", base_model_name_or_path=base).notes == []


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param("_orig_mod.blocks.", marks=case("keys with `_orig_mod.`, from torch.compile", "read")),
        pytest.param("module.blocks.", marks=case("keys with `module.`, from DistributedDataParallel", "read")),
        pytest.param("backbone.blocks.", marks=case("a model that holds the backbone as `self.backbone`", "read")),
        pytest.param("net.visual.trunk._orig_mod.blocks.", marks=case("several wrappers in each other", "read")),
        pytest.param("base_model.model.blocks.", marks=case("an adapter within an adapter's model", "read")),
    ],
)
def test_wrappers(tmp_path, prefix):
    plain = read(tmp_path, lora("blocks.", TIMM))
    found = read(tmp_path, lora(prefix, TIMM), target_modules=[f"{prefix}{i}.{name}" for i in (0, 1) for name in TIMM])
    assert same(found, plain) and found.notes == []


@case("the same layer with `_orig_mod.` and without", "refused")
def test_a_layer_twice(tmp_path):
    with pytest.raises(ExchangeError, match="twice, with wrappers and without"):
        read(tmp_path, {**lora("blocks.", TIMM), **lora("_orig_mod.blocks.", TIMM, seed=1)})


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(
            {"exclude_modules": ["patch_embed.proj"]},
            marks=case("`exclude_modules`", "read: what is excluded is not in the file"),
        ),
        pytest.param({"exclude_modules": ["pooler.dense"], "target_modules": ["qkv", "proj", "pooler.dense"]}),
        pytest.param({"exclude_modules": r".*pooler.*", "target_modules": ["qkv", "proj", "pooler.dense"]}),
        pytest.param(
            {"modules_to_save": ["classifier"], "target_modules": ["qkv", "proj", "classifier"]},
            marks=case(
                '`target_modules: "all-linear"` with a saved classifier, which PEFT lists as a target too', "read"
            ),
        ),
    ],
)
def test_excluded_modules(tmp_path, settings):
    found = read(tmp_path, lora("blocks.", TIMM), **{"target_modules": ["qkv", "proj"], **settings})
    assert same(found, read(tmp_path, lora("blocks.", TIMM)))


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(
            "classifier",
            marks=case(
                '`modules_to_save: ["classifier"]`', "the adapter is read, the classifier is left out, and said"
            ),
        ),
        pytest.param("classifier.modules_to_save.default"),
        pytest.param("dinov2_head.classifier", marks=case("a classifier behind a wrapper", "left out, and said")),
    ],
)
def test_a_classifier_that_was_trained_too(tmp_path, key):
    head = {f"base_model.model.{key}.{name}": torch.zeros(3) for name in ("weight", "bias")}
    found = read(tmp_path, {**lora("blocks.", TIMM), **head}, modules_to_save=["classifier", "score"])
    assert found.notes == [f"left out, as no part of the vision tower: {key}.bias, {key}.weight"]
    assert same(found, read(tmp_path, lora("blocks.", TIMM)))


@pytest.mark.parametrize(
    ("saved", "tensor"),
    [
        pytest.param(
            "norm", "norm.weight", marks=case('`modules_to_save: ["norm"]`, a part of the backbone', "refused")
        ),
        pytest.param("patch_embed", "patch_embed.proj.weight"),
        pytest.param(
            "body", "body.norm.weight", marks=case("a wrapper that was saved whole, with the backbone in it", "refused")
        ),
    ],
)
def test_a_part_of_the_backbone_that_was_trained_too(tmp_path, saved, tensor):
    prefix = "body.blocks." if saved == "body" else "blocks."
    tensors = {**lora(prefix, TIMM), f"base_model.model.{tensor}": torch.zeros(16)}
    with pytest.raises(ExchangeError, match="part of the backbone"):
        read(tmp_path, tensors, modules_to_save=[saved])


@pytest.mark.parametrize(
    ("tower", "text"),
    [
        pytest.param(
            "vision_model.encoder.layers.",
            "text_model.encoder.layers.",
            marks=case(
                "CLIPModel: its text tower has adapters too",
                "the vision tower is read, the text tower is left out, and said",
            ),
        ),
        pytest.param("clip.vision_model.encoder.layers.", "clip.text_model.encoder.layers."),
        pytest.param(
            "visual.encoder.layers.",
            "text.encoder.layer.",
            marks=case("a text tower of another kind beside it", "left out, and said"),
        ),
    ],
)
def test_a_text_tower(tmp_path, tower, text):
    vision = lora(tower, CLIP)
    found = read(tmp_path, {**vision, **lora(text, CLIP, seed=1)}, "clip_vitb16", target_modules=["q_proj", "v_proj"])
    assert same(found, read(tmp_path, vision, "clip_vitb16"))
    (note,) = found.notes
    assert f"{text}0.self_attn.q_proj" in note and note.endswith("and 1 more") and "vision_model" not in note


@case("adapters of two vision towers, as of a student and a teacher", "refused, with both names")
def test_two_towers(tmp_path):
    with pytest.raises(ExchangeError, match="two towers, under student. and teacher."):
        read(tmp_path, {**lora("student.blocks.", TIMM), **lora("teacher.blocks.", TIMM, seed=1)})


@pytest.mark.parametrize(
    ("prefix", "layers", "patch", "targets"),
    [
        pytest.param(
            "blocks.",
            TIMM,
            "patch_embed.proj",
            ["qkv", "proj"],
            marks=case(
                '`target_modules: ["qkv", "proj"]`, which also hits the patch convolution',
                "refused; the error names the convolution, the target, and what to train with",
            ),
        ),
        pytest.param("model.blocks.", TIMM, "model.patch_embed.proj", ["qkv", "proj"]),
    ],
)
def test_an_adapter_on_the_patch_convolution(tmp_path, prefix, layers, patch, targets):
    conv = {
        f"base_model.model.{patch}.lora_A.weight": torch.zeros(4, 3, 8, 8),
        f"base_model.model.{patch}.lora_B.weight": torch.zeros(16, 4, 1, 1),
    }
    said = f"{patch}, the convolution that makes the patches.*'proj' matched it.*['attn.qkv', 'attn.proj']"
    with pytest.raises(ExchangeError, match=said.replace("[", re.escape("["))):
        read(tmp_path, {**lora(prefix, layers), **conv}, target_modules=targets)


@case(
    'LoRA on `["query", "value", "dense"]` of transformers, which also hits the pooler',
    "read; the pooler is left out, and said",
)
def test_the_pooler(tmp_path):
    names = {
        "attention.attention.query": (16, 16),
        "attention.attention.value": (16, 16),
        "attention.output.dense": (16, 16),
    }
    plain = read(tmp_path, lora("encoder.layer.", names), "vit_tiny_patch16")
    pooler = {
        f"base_model.model.pooler.dense.lora_{side}.weight": torch.zeros(4, 16).T if side == "B" else torch.zeros(4, 16)
        for side in "AB"
    }
    pooler = {key: tensor.contiguous() for key, tensor in pooler.items()}
    found = read(
        tmp_path,
        {**lora("encoder.layer.", names), **pooler},
        "vit_tiny_patch16",
        target_modules=["query", "value", "dense"],
    )
    assert same(found, plain) and found.notes == ["left out, as no part of the vision tower: pooler.dense"]


@case("an adapter of a text model alone", "refused: it holds no adapter of the backbone")
def test_a_text_tower_alone(tmp_path):
    with pytest.raises(ExchangeError, match="holds no adapter of a clip_vitb16: text_model.encoder.layers.0"):
        read(tmp_path, lora("text_model.encoder.layers.", CLIP), "clip_vitb16")


@case("the folder above the adapter, as PEFT saves a named one", "refused; the error names the folder below")
def test_the_folder_above(tmp_path):
    read(tmp_path / "faces", lora("blocks.", TIMM))
    with pytest.raises(ExchangeError, match=f"has no {CONFIG}, but {re.escape(str(tmp_path / 'faces'))} has"):
        read_peft(tmp_path, "dinov2_vits14", tiny_config())


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@case("an adapter in float8 or int8", "an error that names the tensor and its type")
def test_bytes_are_no_numbers(tmp_path, kind, monkeypatch):
    monkeypatch.setitem(VIT_PRESETS, "tiny", tiny_config())
    tensors = {key: tensor.to(kind) for key, tensor in lora("blocks.", TIMM).items()}
    with pytest.raises(ExchangeError, match=f"lora_A of .* is {kind} .*, expected finite floats"):
        read(tmp_path, tensors)
    vit = tiny_vit()
    state = {key: tensor.to(kind) for key, tensor in vit.state_dict().items()}
    save_backbone(tmp_path / "a.safetensors", "tiny", vit.config, state, {})
    with pytest.raises(WeightsError, match=f"{kind}"):
        load_backbone("tiny", tmp_path / "a.safetensors", 28)
