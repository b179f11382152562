"""Face recognisers against a module of our own making, written from the description of arcface_torch's and CVLface's
ViTs and not from `vitface.model`: files as people have them, through the converter, in float64.
"""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from vitface.errors import WeightsError
from vitface.model.inference import embed_crops, prepare_inference
from vitface.presets import VIT_PRESETS
from vitface.store.backbone import load_backbone, read_backbone
from vitface.store.faces import frozen_face
from vitface.weights.conversion import convert_file

SIZES = {  # width, blocks, heads, MLP ratio, patch
    "lvface_t": (256, 12, 8, 4, 9),
    "lvface_s": (512, 12, 8, 4, 9),
    "lvface_b": (512, 24, 8, 4, 9),
    "lvface_l": (768, 24, 8, 4, 9),
    "adaface_vit_s": (512, 12, 8, 5, 8),
    "adaface_vit_b": (512, 24, 16, 3, 8),
}


class OracleBlock(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim, bias=False), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, ratio * dim), "fc2": nn.Linear(ratio * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = ((q @ k.transpose(-2, -1)) * (d // self.heads) ** -0.5).softmax(dim=-1)
        x = x + self.attn["proj"]((weights @ v).transpose(1, 2).reshape(b, n, d))
        hidden = self.mlp["fc1"](self.norm2(x)).clamp(min=0, max=6)
        return x + self.mlp["fc2"](hidden)


class Oracle(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, ratio: int, patch: int):
        super().__init__()
        tokens = (112 // patch) ** 2
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(OracleBlock(dim, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.feature = nn.Sequential(
            nn.Linear(tokens * dim, dim, bias=False),
            nn.BatchNorm1d(dim, eps=2e-5),
            nn.Linear(dim, 512, bias=False),
            nn.BatchNorm1d(512, eps=2e-5),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.feature(self.norm(x).reshape(len(x), -1))


@torch.no_grad()
def oracle(name: str, seed: int = 0, **changes) -> Oracle:
    """Random weights of the scale of trained ones, and statistics of batch norm that are nobody's defaults."""
    sizes = dict(zip(("dim", "depth", "heads", "ratio", "patch"), SIZES[name], strict=True)) | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Oracle(**sizes)
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
            nn.init.normal_(parameter, std=scale)
        for norm in (model.feature[1], model.feature[3]):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.1, 3)
            nn.init.uniform_(norm.weight, 0.5, 2)
            norm.num_batches_tracked.fill_(7)
    return model.eval()


def images(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.rand(batch, 3, 112, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def converted(state, folder, name: str, config=None, **options):
    config = config or VIT_PRESETS[name]
    torch.save(state, folder / "source.pt")
    done = convert_file(name, config, folder / "source.pt", folder / "ours.safetensors", **options)
    return done, load_backbone(name, folder / "ours.safetensors", 112).double()


@torch.no_grad()
def embedding(vit, batch: Tensor) -> Tensor:
    """As `FaceModel` makes it, in float64: the head "pretrained" rounds to float32."""
    return vit.pool(vit(batch))


def small(name: str):
    """The preset, two blocks deep and eight numbers a head wide; and the same for the oracle."""
    width = 8 * VIT_PRESETS[name].num_heads
    return dataclasses.replace(VIT_PRESETS[name], depth=2, embed_dim=width), {"depth": 2, "dim": width}


def test_lvface_t_with_its_real_shapes(tmp_path):
    model = oracle("lvface_t")
    done, vit = converted(model.state_dict(), tmp_path, "lvface_t")
    assert done.used == len(model.state_dict()) - 3 and set(done.dropped) == {
        "mask_token",
        "feature.[13].num_batches_tracked",
    }
    batch = images()
    with torch.no_grad():
        want = model.double()(batch)
    assert want.shape == (2, 512) and want.std() > 0.1
    assert (embedding(vit, batch) - want).abs().max() <= 1e-9
    assert torch.equal(embedding(vit, torch.cat([batch[:, :, :108], images(2, 9)[:, :, :4]], 2)), embedding(vit, batch))


@pytest.mark.parametrize("name", SIZES)
def test_each_preset(name, tmp_path):
    config, changes = small(name)
    model = oracle(name, **changes)
    _, vit = converted(model.state_dict(), tmp_path, name, config)
    with torch.no_grad():
        assert (embedding(vit, images()) - model.double()(images())).abs().max() <= 1e-9


def prefixed(state, prefix: str):
    return {prefix + key: tensor for key, tensor in state.items()}


VARIANTS = {
    "CVLface": lambda state: prefixed(state, "model.net."),
    "net": lambda state: prefixed(state, "net."),
    "DDP": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "without a mask token": lambda state: {key: value for key, value in state.items() if key != "mask_token"},
    "arcface_torch's checkpoint": lambda state: {"epoch": 3, "state_dict_backbone": state, "state_dict_softmax_fc": {}},
    "float16": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_files_as_people_have_them(kind, tmp_path):
    config, changes = small("lvface_t")
    model = oracle("lvface_t", **changes)
    if kind == "float16":
        model = model.half().float()
    _, vit = converted(VARIANTS[kind](model.state_dict()), tmp_path, "lvface_t", config)
    with torch.no_grad():
        assert (embedding(vit, images()) - model.double()(images())).abs().max() <= 1e-9


@pytest.mark.parametrize("said", [None, "config", "flag", "neither"])
def test_blue_first_is_folded_into_the_patch_convolution(said, tmp_path):
    config, changes = small("adaface_vit_s")
    model = oracle("adaface_vit_s", **changes)
    if said in ("config", "neither"):
        text = f"name: base\n  input_color_flip: {said == 'config'}\nmask_ratio: 0\n"
        (tmp_path / "config.yaml").write_text(text)
    options = {"bgr": True} if said == "flag" else {}
    done, vit = converted(model.state_dict(), tmp_path, "adaface_vit_s", config, **options)
    assert done.bgr is (said in ("config", "flag"))
    batch = images()
    with torch.no_grad():
        want = model.double()(batch.flip(1) if done.bgr else batch)
    assert (embedding(vit, batch) - want).abs().max() <= 1e-9


def test_denormals_become_zero(tmp_path):
    config, changes = small("lvface_t")
    model = oracle("lvface_t", **changes)
    state = model.state_dict()
    state["blocks.0.mlp.fc1.weight"][:, :10] = 1e-41
    converted(state, tmp_path, "lvface_t", config)
    _, _, tensors, _ = read_backbone(tmp_path / "ours.safetensors")
    assert (tensors["blocks.0.mlp.fc1.weight"][:, :10] == 0).all()
    tiny = torch.finfo(torch.float32).tiny
    assert not any(((tensor != 0) & (tensor.abs() < tiny)).any() for tensor in tensors.values())
    assert torch.equal(tensors["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])


REFUSED = {
    "norm1 as batch norm": ("blocks.0.norm1.running_mean", 'norm_layer="bn"'),
    "KP-RPE": ("net.keypoint_linear.weight", "KP-RPE"),
    "iRPE": ("blocks.0.attn.rpe_k.lookup_table_weight", "iRPE"),
    "Swin": ("layers.0.blocks.0.attn.relative_position_bias_table", "Swin"),
    "part-fViT": ("stn.features.0.weight", "part-fViT"),
    "IResNet": ("layer1.0.bn1.running_mean", "no Vision Transformer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_recognisers_are_refused_with_the_reason(kind, tmp_path):
    key, reason = REFUSED[kind]
    state = {**oracle("lvface_t", depth=1, dim=64).state_dict(), key: torch.zeros(3)}
    with pytest.raises(WeightsError, match=reason):
        converted(state, tmp_path, "lvface_t")
    assert not (tmp_path / "ours.safetensors").exists()


def test_another_size_is_named(tmp_path):
    with pytest.raises(WeightsError, match="convert it as lvface_t"):
        converted(oracle("lvface_t").state_dict(), tmp_path, "lvface_s")


@torch.no_grad()
def test_prepared_in_bf16_is_as_near_as_eager(tmp_path):
    """Batch norms are folded; each against the oracle in float64 on the crops' own pixels."""
    model = oracle("lvface_t")
    converted(model.state_dict(), tmp_path, "lvface_t")
    crops = torch.randint(0, 256, (4, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    want = model.double()(crops.permute(0, 3, 1, 2).double() / 255 * 2 - 1)
    want = want / want.norm(dim=1, keepdim=True)
    errors = {}
    for dtype in ("fp32", "bf16"):
        eager = frozen_face("lvface_t", tmp_path / "ours.safetensors", 112, dtype)
        for kind, one in (("eager", eager), ("prepared", prepare_inference(copy.deepcopy(eager)))):
            rows, _ = embed_crops(one, crops, flip=False)
            errors[dtype, kind] = (rows.double() - want).abs().max().item()
    assert errors["fp32", "prepared"] <= max(2 * errors["fp32", "eager"], 1e-6), errors
    assert errors["bf16", "prepared"] <= 2 * errors["bf16", "eager"], errors
    assert math.isfinite(errors["bf16", "eager"]) and errors["bf16", "eager"] > 1e-5
