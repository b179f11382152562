"""PEFT's folders both ways, against PEFT itself on models of transformers and on modules with timm's names."""

import itertools
import json

import pytest
import torch
from conftest import optional, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from peft_models import BACKBONES, OTHERS, TimmLike, adapted_vit, close_to, cls, images, ours, settings, theirs
from safetensors.torch import load_file, save_file
from torch import nn

from vitface.errors import ExchangeError
from vitface.exchange.bundle import write_folder
from vitface.exchange.from_peft import read_domains, read_peft
from vitface.exchange.peft import CONFIG, TENSORS, TIMM, peft_files, transformers_layout
from vitface.model.lora import TARGETS, Mix, adapter_state_dict, add_lora
from vitface.model.vit import ViT

peft = optional("peft")
# what transformers says of itself; PEFT's warnings of missing keys stay errors
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


VARIANTS = [
    {},
    {"lora_scaling": "rslora", "lora_alpha": 2.5},
    {"lora_targets": "attn+mlp", "lora_rank": 3},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_peft_on_transformers_computes_the_same(backbone, changes, tmp_path):
    config = settings(backbone, **changes)
    vit = adapted_vit(config)
    base = theirs(backbone, vit)
    files = peft_files(adapter_state_dict(vit), config, transformers_layout(backbone))
    write_folder(tmp_path / "adapter", {"": files})
    before = cls(base)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(cls(adapted.double()), ours(vit.double()), **close_to(backbone))
    assert (before - ours(vit)).abs().max() > 0.03  # the adapters matter


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_peft_on_timm_computes_the_same(changes, tmp_path):
    config = settings("dinov2_vits14", **changes)
    vit = adapted_vit(config)
    write_folder(tmp_path / "adapter", {"": peft_files(adapter_state_dict(vit), config, TIMM)})
    adapted = peft.PeftModel.from_pretrained(TimmLike(vit), tmp_path / "adapter").eval()
    assert not any("patch_embed" in name for name, _ in adapted.named_parameters() if "lora" in name)
    with torch.no_grad():
        x = vit.tokens(images())
        expected = vit.blocks[1](vit.blocks[0](x, Mix()), Mix())
        torch.testing.assert_close(adapted(x), expected, atol=1e-6, rtol=1e-6)
        assert (TimmLike(vit)(x) - expected).abs().max() > 0.03


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_domain_is_an_adapter_that_peft_can_route_to(backbone, tmp_path):
    config = settings(backbone, num_domains=3)
    vit = adapted_vit(config)
    layout, adapters = transformers_layout(backbone), adapter_state_dict(vit)
    write_folder(tmp_path / "a", {f"domain-{k}": peft_files(adapters, config, layout, k) for k in range(3)})
    adapted = peft.PeftModel.from_pretrained(theirs(backbone, vit), tmp_path / "a" / "domain-0", "d0")
    for k in (1, 2):
        adapted.load_adapter(tmp_path / "a" / f"domain-{k}", f"d{k}")
    adapted.eval()
    for k in range(3):
        adapted.set_adapter(f"d{k}")
        gate = torch.eye(3)[[k] * 3]
        with torch.no_grad():
            expected = vit.double().pool(vit(images().double(), Mix(gate.double())))
        torch.testing.assert_close(cls(adapted.double()), expected, **close_to(backbone))
    read, domains = read_domains(tmp_path / "a", backbone, config.vit)
    assert domains == 3 and all(torch.equal(read.tensors[key], tensor.float()) for key, tensor in adapters.items())


KINDS = [*itertools.product(BACKBONES, ["timm", 4, 5]), *((name, "timm") for name in OTHERS)]


@pytest.mark.parametrize(("backbone", "version"), KINDS)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_what_is_written_is_read_back_bitwise(backbone, changes, version, tmp_path):
    config = settings(backbone, **changes)
    vit = adapted_vit(config)
    layout = TIMM if version == "timm" else transformers_layout(backbone, version)
    write_folder(tmp_path / "a", {"": peft_files(adapter_state_dict(vit), config, layout)})
    read = read_peft(tmp_path / "a", backbone, config.vit)
    assert read.settings == {key: getattr(config, key) for key in read.settings}
    expected = adapter_state_dict(vit)
    assert read.tensors.keys() == expected.keys()
    assert all(torch.equal(read.tensors[key], tensor) for key, tensor in expected.items())


NAMES_OF_FOUR = {  # transformers 4's names, written by hand: version 5 is what is installed here
    "dinov2_vits14": {
        "encoder.layer.0.attention.attention.query",
        "encoder.layer.0.attention.attention.key",
        "encoder.layer.0.attention.attention.value",
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.mlp.fc1",
        "encoder.layer.0.mlp.fc2",
    },
    "clip_vitb16": {
        "vision_model.encoder.layers.0.self_attn.q_proj",
        "vision_model.encoder.layers.0.self_attn.k_proj",
        "vision_model.encoder.layers.0.self_attn.v_proj",
        "vision_model.encoder.layers.0.self_attn.out_proj",
        "vision_model.encoder.layers.0.mlp.fc1",
        "vision_model.encoder.layers.0.mlp.fc2",
    },
    "dinov3_vits16plus": {
        "layer.0.attention.q_proj",
        "layer.0.attention.k_proj",
        "layer.0.attention.v_proj",
        "layer.0.attention.o_proj",
        "layer.0.mlp.gate_proj",
        "layer.0.mlp.up_proj",
        "layer.0.mlp.down_proj",
    },
    "siglip2_vitb16": {
        "vision_model.encoder.layers.0.self_attn.q_proj",
        "vision_model.encoder.layers.0.self_attn.k_proj",
        "vision_model.encoder.layers.0.self_attn.v_proj",
        "vision_model.encoder.layers.0.self_attn.out_proj",
        "vision_model.encoder.layers.0.mlp.fc1",
        "vision_model.encoder.layers.0.mlp.fc2",
    },
    "vit_tiny_patch16": {
        "encoder.layer.0.attention.attention.query",
        "encoder.layer.0.attention.attention.key",
        "encoder.layer.0.attention.attention.value",
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.0.output.dense",
    },
}


@pytest.mark.parametrize("backbone", NAMES_OF_FOUR)
def test_the_names_of_transformers_4(backbone, tmp_path):
    config = settings(backbone, lora_targets="attn+mlp")
    adapters = adapter_state_dict(adapted_vit(config))
    write_folder(tmp_path / "a", {"": peft_files(adapters, config, transformers_layout(backbone, 4))})
    found = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in load_file(tmp_path / "a" / TENSORS)}
    assert {name for name in found if ".0." in name} == NAMES_OF_FOUR[backbone]
    targets = json.loads((tmp_path / "a" / CONFIG).read_text())["target_modules"]
    assert all(any(f".{name}".endswith(f".{target}") for target in targets) for name in found)


@pytest.mark.parametrize("backbone", OTHERS)
def test_what_transformers_has_no_model_of_is_said(backbone):
    with pytest.raises(ExchangeError, match=f"no model of {backbone}; --format peft has the names of timm"):
        transformers_layout(backbone)


def test_pes_adapters_turn_as_its_own_heads_do(tmp_path):
    """B of q and k is written in the order of PE's numbers, in which neighbours are turned, x before y."""
    config = settings("pe_core_t16")
    adapters = adapter_state_dict(adapted_vit(config))
    write_folder(tmp_path / "a", {"": peft_files(adapters, config, TIMM)})
    written = load_file(tmp_path / "a" / TENSORS)["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    b = adapters["blocks.0.attn.qkv.lora_b"]
    # a head of 8 numbers: ours are y0 y1 x0 x1 and their partners, PE's x0 x0' x1 x1' y0 y0' y1 y1'
    places = [2, 6, 3, 7, 0, 4, 1, 5]
    rows = [part * 16 + head * 8 + place for part in (0, 1) for head in (0, 1) for place in places]
    assert torch.equal(written, b[[*rows, *range(32, 48)]])


def trained_by_peft(backbone: str, folder, targets: list[str], **changes) -> tuple[ViT, nn.Module]:
    """A model of transformers with an adapter as PEFT makes and saves it, with random values; and our frozen ViT."""
    torch.manual_seed(5)
    vit = adapted_vit(settings(backbone, lora_rank=0))
    model = peft.get_peft_model(
        theirs(backbone, vit), peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **changes)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return vit, model.eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("backbone", "targets", "rank", "kind"),
    [
        ("dinov2_vits14", ["q_proj", "v_proj"], 8, "attn"),
        ("dinov2_vits14", ["q_proj", "k_proj", "v_proj", "o_proj"], 12, "attn"),
        ("dinov2_vits14", ["o_proj", "fc1"], 4, "attn+mlp"),
        ("clip_vitb16", ["k_proj", "v_proj", "out_proj"], 8, "attn"),
        ("clip_vitb16", ["v_proj", "fc2"], 4, "attn+mlp"),
        ("vit_tiny_patch16", ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"], 12, "attn+mlp"),
        ("dinov2_vits14_reg", ["q_proj", "v_proj"], 8, "attn"),
        ("dinov3_vits16", ["q_proj", "v_proj", "up_proj", "down_proj"], 8, "attn+mlp"),
        ("dinov3_vits16plus", ["gate_proj", "up_proj", "down_proj"], 8, "attn+mlp"),
        ("dinov3_vits16plus", ["up_proj"], 4, "attn+mlp"),
        ("siglip2_vitb16", ["q_proj", "v_proj"], 8, "attn"),
    ],
)
def test_what_peft_trained_computes_the_same_here(backbone, targets, rank, kind, rslora, tmp_path):
    vit, model = trained_by_peft(backbone, tmp_path, targets, use_rslora=rslora)
    read = read_peft(tmp_path, backbone, vit.config)
    assert read.settings["lora_rank"] == rank and read.settings["lora_targets"] == kind
    before = ours(vit)
    config = settings(backbone, **read.settings)  # at its rank and alpha, which are not PEFT's
    add_lora(vit, TARGETS[kind], rank, config.lora_alpha, config.lora_scaling)
    vit.load_state_dict({**vit.state_dict(), **read.tensors})
    torch.testing.assert_close(ours(vit.double()), cls(model.double()), **close_to(backbone))
    assert (before - ours(vit)).abs().max() > 0.03


def test_what_peft_trained_on_timm_names_computes_the_same_here(tmp_path):
    vit = adapted_vit(settings("dinov2_vits14", lora_rank=0))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*blocks\.\d+\.(attn\.qkv|mlp\.fc2)")
    model = peft.get_peft_model(TimmLike(vit), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.eval().save_pretrained(tmp_path)
    read = read_peft(tmp_path, "dinov2_vits14", vit.config)
    add_lora(vit, TARGETS["attn+mlp"], 4, 6)
    vit.load_state_dict({**vit.state_dict(), **read.tensors})
    with torch.no_grad():
        x = vit.tokens(images())
        torch.testing.assert_close(vit.blocks[1](vit.blocks[0](x, Mix()), Mix()), model(x), atol=1e-6, rtol=1e-6)


@given(
    rank=st.integers(1, 5),
    alpha=st.floats(0.1, 64),
    scaling=st.sampled_from(["lora", "rslora"]),
    parts=st.sets(st.sampled_from("qkv"), min_size=1),
)
def test_split_layers_add_up_to_the_fused_one(rank, alpha, scaling, parts, tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("split"), torch.Generator().manual_seed(rank)
    tensors, deltas = {}, []
    for block in (0, 1):
        for part in "qkv":
            a, b = (torch.randn(shape, generator=generator) for shape in ((rank, 16), (16, rank)))
            if part in parts:
                module = f"base_model.model.encoder.layer.{block}.attention.{part}_proj"
                tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            deltas.append(b.double() @ a.double() * (part in parts))
    save_file(tensors, folder / TENSORS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": scaling == "rslora"}
    (folder / CONFIG).write_text(json.dumps(config))
    read = read_peft(folder, "dinov2_vits14", tiny_config())
    s = alpha / (rank if scaling == "lora" else rank**0.5)
    ours = read.settings["lora_rank"]
    assert ours == rank * len(parts)
    s_ours = read.settings["lora_alpha"] / (ours if scaling == "lora" else ours**0.5)
    for block in (0, 1):
        a, b = (read.tensors[f"blocks.{block}.attn.qkv.lora_{side}"].double() for side in "ab")
        torch.testing.assert_close(
            s_ours * b @ a, s * torch.cat(deltas[3 * block : 3 * block + 3]), atol=1e-9, rtol=1e-9
        )


def test_split_layers_that_add_up_to_more_than_a_model_may_have(tmp_path, monkeypatch):
    module = "base_model.model.encoder.layer.{}.attention.{}_proj.lora_{}.weight"
    shapes = {"A": (3, 16), "B": (16, 3)}
    parts = itertools.product((0, 1), "qkv", "AB")
    save_file({module.format(b, p, side): torch.randn(shapes[side]) for b, p, side in parts}, tmp_path / TENSORS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 1}))
    monkeypatch.setattr("vitface.exchange.from_peft.MAX_SIZE", 8)
    with pytest.raises(ExchangeError, match="q, k and v together have rank 9; a model's is at most 8"):
        read_peft(tmp_path, "dinov2_vits14", tiny_config())


@pytest.mark.parametrize(
    ("backbone", "layout", "base"),
    [
        ("dinov2_vits14", TIMM, "timm/vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vits14", transformers_layout("dinov2_vits14"), "facebook/dinov2-small"),
        ("clip_vitb16", TIMM, "timm/vit_base_patch16_clip_224.openai"),
        ("clip_vitb16", transformers_layout("clip_vitb16"), "openai/clip-vit-base-patch16"),
        ("vit_tiny_patch16", transformers_layout("vit_tiny_patch16"), None),
    ],
)
def test_the_base_model_is_named(backbone, layout, base):
    config = settings(backbone)
    files = peft_files(adapter_state_dict(adapted_vit(config)), config, layout)
    assert json.loads(files[CONFIG])["base_model_name_or_path"] == base
