"""PEFT's folders both ways, against PEFT itself on models of transformers and on modules with timm's names."""

import dataclasses
import itertools
import json

import pytest
import torch
from conftest import optional, randomise_adapters, tiny_config, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from vitface.config import FaceConfig
from vitface.errors import ExchangeError
from vitface.exchange.bundle import write_folder
from vitface.exchange.from_peft import read_domains, read_peft
from vitface.exchange.peft import CONFIG, TENSORS, TIMM, peft_files, transformers_layout
from vitface.model.lora import TARGETS, Mix, adapter_state_dict, add_lora
from vitface.model.vit import ViT, init_weights
from vitface.presets import VIT_PRESETS, ViTConfig
from vitface.weights.keymaps import transformers_family

peft, transformers = optional("peft"), optional("transformers")
# what transformers says of itself; PEFT's warnings of missing keys stay errors
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def small(name: str, **changes) -> ViTConfig:
    sizes = dict(native_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    return dataclasses.replace(VIT_PRESETS[name], **{**sizes, **changes})


BACKBONES = {  # those that transformers has a model of
    "dinov2_vits14": tiny_config(),
    "clip_vitb16": small("clip_vitb16"),
    "vit_tiny_patch16": small("vit_tiny_patch16"),
    "dinov2_vits14_reg": small("dinov2_vits14_reg"),
    "dinov3_vits16": small("dinov3_vits16"),
    "dinov3_vits16plus": small("dinov3_vits16plus"),
    "siglip2_vitb16": small("siglip2_vitb16", pool_heads=2),
}
OTHERS = {"pe_core_t16": small("pe_core_t16", pool_heads=2), "lvface_t": small("lvface_t")}


def adapted_vit(backbone: str, config: FaceConfig, seed: int = 0) -> ViT:
    """A ViT in float32 whose weights and adapters are large enough that each of them moves the output."""
    vit = ViT(config.vit, 32)
    init_weights(vit, seed)
    with torch.no_grad():
        for parameter in (*vit.blocks.parameters(), *vit.pool.parameters()):
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    if config.lora_rank:
        add_lora(
            vit,
            TARGETS[config.lora_targets],
            config.lora_rank,
            config.lora_alpha,
            config.lora_scaling,
            config.num_domains,
        )
        randomise_adapters(vit, seed)
    return vit.eval()


def settings(backbone: str, **changes) -> FaceConfig:
    return FaceConfig(
        backbone, "random", {**BACKBONES, **OTHERS}[backbone], 32, **{"lora_rank": 4, "lora_alpha": 8, **changes}
    )


def theirs(backbone: str, vit: ViT) -> nn.Module:
    """transformers' model with the frozen weights of `vit`."""
    sizes = dict(
        hidden_size=16,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        layer_norm_eps=vit.config.norm_eps,
    )
    registers = {"num_register_tokens": vit.config.registers}
    if backbone.endswith("reg"):
        model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes, **registers))
    elif backbone.startswith("dinov3"):
        gated = backbone.endswith("plus")
        act = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu"}
        model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, **registers, **act))
    elif backbone.startswith("siglip"):
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    elif backbone.startswith("dinov2"):
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    elif backbone.startswith("clip"):
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    else:
        model = transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)
    family, ours = transformers_family(backbone), vit.state_dict()
    marks = {"[q]": (0, 3), "[k]": (1, 3), "[v]": (2, 3), "[gate]": (0, 2), "[up]": (1, 2)}
    for key, tensor in model.state_dict().items():
        target = family.target(key)
        if target is not None:
            name, bracket, mark = target.partition("[")
            index, count = marks[bracket + mark] if mark else (0, 1)
            tensor.copy_(ours[name].chunk(count)[index].reshape(tensor.shape))
        elif "head.attention.in_proj" in key:
            kind = key.rpartition("_")[2]
            tensor.copy_(torch.cat([ours[f"pool.q.{kind}"], ours[f"pool.kv.{kind}"]]))
    return model.eval()


def cls(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model(pixel_values=images().to(next(model.parameters()).dtype))
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled


class TimmLike(nn.Module):
    """timm's module names around our frozen weights, with plain nn.Linear layers for PEFT to wrap."""

    def __init__(self, vit: ViT):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 16, 8, 8)  # what a target "proj" would catch
        self.blocks = nn.ModuleList(_Block() for _ in vit.blocks)
        self.load_state_dict({key: vit.state_dict()[key] for key in self.state_dict()})
        self.config = {}

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16, eps=1e-6), nn.LayerNorm(16, eps=1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(16, 64), nn.Linear(64, 16)
        self.ls1, self.ls2 = nn.Module(), nn.Module()
        self.ls1.gamma, self.ls2.gamma = nn.Parameter(torch.ones(16)), nn.Parameter(torch.ones(16))

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.mT * 8**-0.5, dim=-1) @ v
        x = x + self.ls1.gamma * self.attn.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.ls2.gamma * self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def close_to(backbone: str) -> dict[str, float]:
    """How exact transformers is: it turns DINOv3's queries and keys by angles in float32."""
    return dict(rtol=1e-6, atol=1e-6) if backbone.startswith("dinov3") else dict(rtol=1e-9, atol=1e-9)


def ours(vit: ViT) -> torch.Tensor:
    with torch.no_grad():
        return vit.pool(vit(images().to(vit.dtype), Mix()))


VARIANTS = [
    {},
    {"lora_scaling": "rslora", "lora_alpha": 2.5},
    {"lora_targets": "attn+mlp", "lora_rank": 3},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_peft_on_transformers_computes_the_same(backbone, changes, tmp_path):
    config = settings(backbone, **changes)
    vit = adapted_vit(backbone, config)
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
    vit = adapted_vit("dinov2_vits14", config)
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
    vit = adapted_vit(backbone, config)
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
    vit = adapted_vit(backbone, config)
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
    adapters = adapter_state_dict(adapted_vit(backbone, config))
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
    adapters = adapter_state_dict(adapted_vit("pe_core_t16", config))
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
    vit = adapted_vit(backbone, settings(backbone, lora_rank=0))
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
    vit = adapted_vit("dinov2_vits14", settings("dinov2_vits14", lora_rank=0))
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


def written(tmp_path, **changes):
    """A good folder with timm's names: (folder, its tensors, its settings)."""
    config = settings("dinov2_vits14", **changes)
    write_folder(
        tmp_path / "a", {"": peft_files(adapter_state_dict(adapted_vit("dinov2_vits14", config)), config, TIMM)}
    )
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
    files = peft_files(adapter_state_dict(adapted_vit(backbone, config)), config, layout)
    assert json.loads(files[CONFIG])["base_model_name_or_path"] == base


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
    adapters = adapter_state_dict(adapted_vit("dinov2_vits14", config))
    write_folder(tmp_path / "a", {f"domain-{k}": peft_files(adapters, config, TIMM, k) for k in range(2)})
    change(tmp_path / "a")
    with pytest.raises(ExchangeError, match=message):
        read_domains(tmp_path / "a", "dinov2_vits14", config.vit)


def _change(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
