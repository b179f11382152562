"""PEFT's folders that are no adapter of ours: names, shapes, settings and domains that do not fit are told by name."""

import json

import pytest
import torch
from conftest import optional, tiny_config, tiny_vit
from peft_models import TimmLike, adapted_vit, settings
from safetensors.torch import load_file, save_file

from vitface.errors import ExchangeError
from vitface.exchange.bundle import write_folder
from vitface.exchange.from_peft import read_domains, read_peft
from vitface.exchange.peft import CONFIG, TENSORS, TIMM, peft_files
from vitface.model.lora import adapter_state_dict

peft = optional("peft")


def written(tmp_path):
    """A good folder with timm's names: (folder, its tensors, its settings)."""
    config = settings("dinov2_vits14")
    write_folder(tmp_path / "a", {"": peft_files(adapter_state_dict(adapted_vit(config)), config, TIMM)})
    return tmp_path / "a", load_file(tmp_path / "a" / TENSORS), json.loads((tmp_path / "a" / CONFIG).read_text())


BASE = "base_model.model."
FIRST = f"{BASE}blocks.0.attn.qkv"


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def plus(**added):
    return lambda tensors: {**tensors, **{f"{BASE}{key.replace('__', '.')}": t for key, t in added.items()}}


def first(side, tensor):
    return lambda tensors: {**tensors, f"{FIRST}.lora_{side}.weight": tensor}


def without(start):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.startswith(start)}


def block_more(tensors):
    return {**tensors, **{key.replace(".1.", ".2."): tensor.clone() for key, tensor in tensors.items()}}


KEYS = {
    "unknown": (plus(blocks__0__attn__q__lora_A__weight=torch.zeros(4, 16)), "blocks.0.attn.q has lora_A alone"),
    "renamed": (renamed("blocks", "layers"), "layers.0.attn.proj is no layer to adapt in a dinov2_vits14"),
    "no prefix": (renamed(BASE, ""), "blocks.0.attn.proj.lora_A.weight is unknown in a LoRA"),
    "adapter's name": (renamed(".weight", ".default.weight"), "lora_A.default.weight is unknown in a LoRA"),
    "half": (without(f"{FIRST}.lora_B"), "blocks.0.attn.qkv has lora_A alone"),
    "a block missing": (without(FIRST), "block 0 has no adapter on attn.qkv"),
    "a block more": (block_more, "blocks.2.attn.proj is no layer to adapt in a dinov2_vits14"),
    "a head": (plus(head__weight=torch.zeros(3)), "head.weight is unknown"),
    "DoRA": (plus(blocks__0__attn__qkv__lora_magnitude_vector=torch.zeros(3)), "magnitude_vector is unknown"),
    "norm": (
        plus(blocks__0__norm1__lora_A__weight=torch.zeros(4, 16), blocks__0__norm1__lora_B__weight=torch.zeros(16, 4)),
        "norm1 is none of the targets",
    ),
    "patch": (
        plus(patch_embed__proj__lora_A__weight=torch.zeros(4, 3), patch_embed__proj__lora_B__weight=torch.zeros(16, 4)),
        "patch_embed.proj is none of the targets",
    ),
    "shape": (first("B", torch.zeros(16, 4)), r"\(16, 4\), expected .*\(48, 4\)"),
    "rank": (first("A", torch.zeros(5, 16)), r"\(5, 16\), expected .*\(4, 16\)"),
    "NaN": (first("A", torch.full((4, 16), float("nan"))), "finite"),
    "integers": (first("A", torch.zeros(4, 16, dtype=torch.int32)), "int32"),
    "nothing": (lambda tensors: {}, "holds no adapter"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_do_not_fit_are_refused(tmp_path, name):
    folder, tensors, _ = written(tmp_path)
    change, message = KEYS[name]
    save_file(change(tensors), folder / TENSORS)
    with pytest.raises(ExchangeError, match=message):
        read_peft(folder, "dinov2_vits14", tiny_config())


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["norm"]},
        {"rank_pattern": {"qkv": 8}},
        {"alpha_pattern": {"qkv": 8}},
        {"layers_to_transform": [0]},
        {"fan_in_fan_out": True},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": ["x"]},
        {"r": 0},
        {"r": 1 << 40},
        {"r": "4"},
        {"r": 8},
        {"lora_alpha": float("nan")},
        {"lora_alpha": -1},
        {"lora_alpha": 10**400},
        {"lora_alpha": None},
        {"lora_alpha": True},
        {"use_rslora": "yes"},
        {"target_modules": ["attn.qkv"]},
        {"target_modules": ["attn.qkv", "attn.proj", "fc1"]},
        {"a_setting_of_the_future": 1},
    ],
    ids=str,
)
def test_settings_that_change_the_formula_are_refused(tmp_path, change):
    folder, _, config = written(tmp_path)
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(ExchangeError):
        read_peft(folder, "dinov2_vits14", tiny_config())


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 200_000, b"\xff\xfe", b'{"peft_type": "LORA"}'])
def test_damaged_settings_are_named(tmp_path, data):
    folder, _, _ = written(tmp_path)
    (folder / CONFIG).write_bytes(data)
    with pytest.raises(ExchangeError, match=CONFIG):
        read_peft(folder, "dinov2_vits14", tiny_config())


def test_peft_itself_only_warns_of_what_is_refused_here(tmp_path):
    folder, tensors, _ = written(tmp_path)
    save_file({key.replace("blocks", "layers"): tensor for key, tensor in tensors.items()}, folder / TENSORS)
    vit = tiny_vit()
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(TimmLike(vit), folder)


def test_two_names_of_one_layer_are_refused(tmp_path):
    tensors = {}
    for name in ("q_proj", "attention.query"):
        for block in (0, 1):
            module = f"{BASE}encoder.layer.{block}.attention.{name}"
            tensors |= {f"{module}.lora_A.weight": torch.zeros(4, 16), f"{module}.lora_B.weight": torch.zeros(16, 4)}
    save_file(tensors, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    with pytest.raises(ExchangeError, match="as transformers 4 and as transformers 5 does"):
        read_peft(tmp_path, "dinov2_vits14", tiny_config())


def test_folders_of_other_things_are_named(tmp_path):
    with pytest.raises(ExchangeError, match="no PEFT folder"):
        read_peft(tmp_path, "dinov2_vits14", tiny_config())
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ExchangeError, match="save it with PEFT's save_pretrained, as safetensors"):
        read_peft(tmp_path, "dinov2_vits14", tiny_config())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "domain-1").rename(path / "domain-5"), "numbered from 0 on"),
        (lambda path: _change(path / "domain-1", lora_alpha=9), "domain-1 has lora_alpha 9.*domain-0 8"),
        (lambda path: _change(path / "domain-1", use_rslora=True), "domain-1 has lora_scaling rslora"),
    ],
)
def test_domains_that_do_not_belong_together_are_refused(tmp_path, change, message):
    config = settings("dinov2_vits14", num_domains=2)
    adapters = adapter_state_dict(adapted_vit(config))
    write_folder(tmp_path / "a", {f"domain-{k}": peft_files(adapters, config, TIMM, k) for k in range(2)})
    change(tmp_path / "a")
    with pytest.raises(ExchangeError, match=message):
        read_domains(tmp_path / "a", "dinov2_vits14", config.vit)


def _change(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
