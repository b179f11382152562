"""Conversion writes a whole file or none, with its settings and origin; `vitface convert` says what it did."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layouts import LAYOUTS, as_meta, as_openai, assert_same, random_state, tiny, write
from safetensors import safe_open

from vitface.__main__ import main
from vitface.errors import ConfigError, WeightsError
from vitface.files import sha256_file
from vitface.presets import VIT_PRESETS
from vitface.store.backbone import load_backbone, read_backbone
from vitface.store.sources import FACES_LICENCE, SOURCES
from vitface.weights.conversion import convert_backbone, convert_file


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
    convert_file(name, config, write(tmp_path / "source.safetensors", write_as(ours)), tmp_path / "out.safetensors")
    vit = load_backbone(name, tmp_path / "out.safetensors", config.native_size)
    assert vit.config == config
    assert_same(dict(vit.state_dict()), ours)


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


LICENCES = ("Apache-2.0", "MIT", "DINOv3 License", "FAIR Noncommercial Research License", FACES_LICENCE)


def test_the_pinned_sources_are_complete():
    for name, source in SOURCES.items():
        assert name in VIT_PRESETS and source.licence in LICENCES
        if source.url is not None:
            assert source.url.startswith("https://") and len(bytes.fromhex(source.sha256)) == 32
        if name.startswith("clip"):
            assert source.sha256 in source.url
