"""Files as people have them: what training scripts, FSDP and torch.compile put around names, other grids, settings."""

import json

import pytest
import torch
from layouts import as_meta, as_openai, assert_same, random_state, tiny, write

from vitface.__main__ import main
from vitface.commands.models.convert import report
from vitface.errors import WeightsError
from vitface.presets import IMAGENET_MEAN, VIT_PRESETS
from vitface.store.backbone import load_backbone, read_backbone
from vitface.weights.conversion import convert_backbone, convert_file


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def beside_a_head(prefix):
    return lambda state: prefixed(prefix)(state) | {"head.weight": torch.zeros(2, 2), "id_head.bias": torch.zeros(2)}


def wrapped(*names):
    """The state dict in nested entries, beside what else a training checkpoint holds."""

    def nest(state):
        for name in reversed(names):
            state = {name: state, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
        return state

    return nest


def inside(part):
    return lambda state: {name.replace("blocks.1.", f"blocks.1.{part}."): tensor for name, tensor in state.items()}


def chunked(state):
    return {name.replace("blocks.", "blocks.0."): tensor for name, tensor in state.items()}


def teacher_and_student(state):
    other = {name: tensor + 1 for name, tensor in state.items()}
    return {"teacher": prefixed("backbone.")(state) | {"dino_head.mlp.0.weight": torch.zeros(2)}, "student": other}


def flat_teacher_and_student(state):
    other = {name: tensor + 1 for name, tensor in state.items()}
    return prefixed("student.backbone.")(other) | prefixed("teacher.backbone.")(state)


AROUND = {
    "as it is": lambda state: state,
    "DDP": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "DDP of a compiled model": prefixed("module._orig_mod."),
    "a backbone": prefixed("backbone."),
    "a model's backbone": prefixed("model.backbone."),
    "timm's wrapper": prefixed("timm_model."),
    "an image tower": prefixed("visual.trunk."),
    "transformers around timm": prefixed("timm_model."),
    "a net": prefixed("model.net."),
    "an encoder": prefixed("encoder."),
    "a teacher": prefixed("teacher.backbone."),
    "a head beside": beside_a_head("backbone."),
    "a head beside, DDP": lambda state: prefixed("module.")(beside_a_head("backbone.")(state)),
    "FSDP inside": inside("_fsdp_wrapped_module"),
    "recomputed blocks": inside("_checkpoint_wrapped_module"),
    "compiled blocks": inside("_orig_mod"),
    "FSDP outside": prefixed("_fsdp_wrapped_module."),
    "blocks in chunks": chunked,
    "chunks of a backbone": lambda state: prefixed("backbone.")(chunked(state)),
    "state_dict": wrapped("state_dict"),
    "model": wrapped("model"),
    "model_state_dict": wrapped("model_state_dict"),
    "weights": wrapped("weights"),
    "teacher": wrapped("teacher"),
    "model_ema": wrapped("model_ema"),
    "student alone": wrapped("student"),
    "Lightning": lambda state: wrapped("state_dict")(prefixed("model.")(state)),
    "DINO's checkpoint": teacher_and_student,
    "DINO's, flat": flat_teacher_and_student,
    "two entries": wrapped("model", "state_dict"),
    "mmpretrain": lambda state: wrapped("state_dict")(beside_a_head("backbone.")(state)),
}


@pytest.mark.parametrize("variant", AROUND)
def test_what_stands_around_the_weights_does_not_matter(variant, tmp_path):
    config = tiny("dinov2_vits14")
    ours = random_state(config)
    torch.save(AROUND[variant](as_meta(ours)), tmp_path / "source.pth")
    convert_file("dinov2_vits14", config, tmp_path / "source.pth", tmp_path / "ours.safetensors")
    assert_same(read_backbone(tmp_path / "ours.safetensors")[2], ours)


@pytest.mark.parametrize(
    ("names", "entry"),
    [
        (["state_dict", "state_dict_ema"], "state_dict; not taken: state_dict_ema"),
        (["model_ema", "model"], "model; not taken: model_ema"),
        (["weights"], "weights"),
    ],
)
def test_the_entry_that_was_taken_is_named(names, entry, tmp_path):
    config = tiny("dinov2_vits14")
    entries = {name: as_meta(random_state(config)) for name in names}
    torch.save(entries | {"optimizer": {"state": {}, "param_groups": []}}, tmp_path / "source.pth")
    done = convert_file("dinov2_vits14", config, tmp_path / "source.pth", tmp_path / "ours.safetensors")
    assert done.entry == entry and f"\n          its entry {entry}\n" in report(done)


def test_a_checkpoint_that_holds_itself_ends(tmp_path):
    config = tiny("dinov2_vits14")
    state = as_meta(random_state(config))
    state["model"] = state
    torch.save(state, tmp_path / "source.pth")
    assert convert_file("dinov2_vits14", config, tmp_path / "source.pth", tmp_path / "ours.safetensors").used


@pytest.mark.parametrize("layout", [as_openai, as_meta])
@pytest.mark.parametrize("around", ["DDP", "torch.compile", "a model's backbone", "state_dict"])
def test_so_it_is_for_other_layouts(layout, around, tmp_path):
    config = tiny("clip_vitb16")
    ours = random_state(config)
    torch.save(AROUND[around](layout(ours)), tmp_path / "source.pth")
    convert_file("clip_vitb16", config, tmp_path / "source.pth", tmp_path / "ours.safetensors")
    assert_same(read_backbone(tmp_path / "ours.safetensors")[2], ours)


def test_what_is_no_head_is_still_an_error(tmp_path):
    config = tiny("dinov2_vits14")
    theirs = prefixed("backbone.")(as_meta(random_state(config))) | {"adapter.weight": torch.zeros(2)}
    write(tmp_path / "source.safetensors", theirs)
    with pytest.raises(WeightsError, match=r"adapter\.weight is unknown"):
        convert_file("dinov2_vits14", config, tmp_path / "source.safetensors", tmp_path / "ours.safetensors")


def as_timm(ours):
    """Our names are timm's, but for those of a pool."""
    names = {"query": "latent", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    found = {}
    for name, tensor in ours.items():
        part = name.split(".")[1] if name.startswith("pool.") else ""
        found[name.replace(f"pool.{part}", f"attn_pool.{names.get(part, part)}") if part else name] = tensor
    return found


@pytest.mark.parametrize("grid", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("name", ["dinov2_vits14", "clip_vitb16", "siglip2_vitb16", "vit_tiny_patch16"])
def test_the_grid_is_that_of_the_file(name, grid, tmp_path):
    """A model that was tuned at another size has that size's positions."""
    config = tiny(name)
    tuned = tiny(name, native_size=grid * config.patch_size)
    ours = random_state(tuned)
    write(tmp_path / "source.safetensors", as_timm(ours))
    done = convert_file(name, config, tmp_path / "source.safetensors", tmp_path / "ours.safetensors")
    assert done.config == tuned
    assert_same(read_backbone(tmp_path / "ours.safetensors")[2], ours)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A tiny vit_tiny_patch16 as timm's file in a folder of its own."""
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(VIT_PRESETS, "vit_tiny_patch16", tiny("vit_tiny_patch16"))
    write(tmp_path / "model.safetensors", random_state(tiny("vit_tiny_patch16")))
    return tmp_path


BESIDE = {
    "transformers": (
        {"config.json": {"hidden_size": 8, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}},
        {"act": "gelu_tanh", "norm_eps": 1e-5},
    ),
    "its processor": ({"preprocessor_config.json": {"image_mean": [0.1, 0.2, 0.3]}}, {"mean": (0.1, 0.2, 0.3)}),
    "timm": (
        {"config.json": {"num_features": 8, "pretrained_cfg": {"mean": IMAGENET_MEAN, "std": (0.1, 0.1, 0.1)}}},
        {"mean": IMAGENET_MEAN, "std": (0.1, 0.1, 0.1)},
    ),
    "open_clip": (
        {"open_clip_config.json": {"model_cfg": {"quick_gelu": True, "vision_cfg": {"width": 8}}}},
        {"act": "quick_gelu"},
    ),
    "another model's": ({"config.json": {"hidden_size": 768, "hidden_act": "quick_gelu"}}, {}),
    "something else": ({"config.json": {"colour": "red"}}, {}),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_settings_beside_the_file_are_taken(kind, small):
    files, settings = BESIDE[kind]
    for name, content in files.items():
        (small / name).write_text(json.dumps(content))
    done = convert_backbone("vit_tiny_patch16", small / "model.safetensors", small / "out.safetensors")
    assert {key: getattr(done.config, key) for key in settings} == settings
    assert done.settings_from == (tuple(files) if settings else ())
    assert load_backbone("vit_tiny_patch16", small / "out.safetensors", 32).config == done.config


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"image_mean": [1, 2]}', '{"image_mean": ["a", 1, 2]}', '{"image_mean": 3}']
)
def test_damaged_settings_are_named(text, small):
    (small / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json is damaged"):
        convert_backbone("vit_tiny_patch16", small / "model.safetensors", small / "out.safetensors")
    assert not (small / "out.safetensors").exists()


def test_flags_win_and_assumptions_are_said(small, capsys):
    files = ["--src", str(small / "model.safetensors"), "--out", str(small / "out.safetensors")]
    command = ["convert", "vit_tiny_patch16", *files]
    assert main(command) == 0
    assert "assumed as the preset's; --act, --mean and --std" in capsys.readouterr().out
    (small / "config.json").write_text(json.dumps({"hidden_act": "gelu_new"}))
    assert main([*command, "--act", "quick_gelu", "--mean", "0.485", "0.456", "0.406"]) == 0
    assert "from config.json, --act, --mean" in capsys.readouterr().out
    stored = load_backbone("vit_tiny_patch16", small / "out.safetensors", 32).config
    assert stored.act == "quick_gelu" and stored.mean == IMAGENET_MEAN
