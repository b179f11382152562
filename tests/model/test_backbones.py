import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vitface.errors import WeightsError
from vitface.store import backbone as store
from vitface.store.backbone import find_backbone, load_backbone, save_backbone


def test_backbone_round_trip_is_bitwise(backbone):
    path, vit = backbone
    loaded = load_backbone("tiny", path, image_size=32)
    assert loaded.config == vit.config
    for key, tensor in vit.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)
    assert not path.with_name(path.name + ".part").exists()


@pytest.mark.parametrize("side", [16, 24, 40])
def test_other_sides_resample_positions_only(backbone, side):
    path, vit = backbone
    loaded = load_backbone("tiny", path, image_size=side)
    assert loaded(torch.zeros(1, 3, side, side)).shape == (1, 1 + (side // 8) ** 2, 16)
    different = [key for key, tensor in vit.state_dict().items() if not _equal(loaded.state_dict()[key], tensor)]
    assert different == ["pos_embed"]
    assert torch.equal(loaded.pos_embed[:, 0], vit.pos_embed[:, 0])


def _equal(a, b):
    return a.shape == b.shape and torch.equal(a, b)


def test_random_is_a_function_of_the_name(tiny_preset):
    first, second = load_backbone("tiny", "random", 32), load_backbone("tiny", "random", 32)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "commands", "page"),
    [
        ("dinov2", ["vitface fetch dinov2_vits14"], ""),
        (
            "vit_tiny_patch16",
            ["vitface convert vit_tiny_patch16 --src FILE --out {home}/vit_tiny_patch16.safetensors"],
            "from https://huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k (licence: Apache-2.0)",
        ),
        (
            "dinov3_vits16",
            ["vitface convert dinov3_vits16 --src FILE --out {home}/dinov3_vits16.safetensors"],
            "from https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/ (licence: DINOv3 License)",
        ),
    ],
)
def test_missing_weights_are_fetched_or_converted(tmp_path, monkeypatch, name, commands, page):
    """Only a command that gets them is named: `vitface fetch` has no address of the others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        load_backbone(name)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert [line for line in lines if line.startswith("vitface")] == [x.format(home=tmp_path) for x in commands]
    assert page in str(caught.value)


def test_places_in_order(backbone, tmp_path, monkeypatch, capsys):
    path, _ = backbone
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    path.rename(tmp_path / "kept")
    store._say.cache_clear()
    with pytest.raises(WeightsError, match="tiny.safetensors in .*home, the package and ./weights"):
        load_backbone("tiny")
    (tmp_path / "weights").mkdir()
    os.link(tmp_path / "kept", tmp_path / "weights" / "tiny.safetensors")
    for _ in range(2):
        assert str(find_backbone("tiny")) == "weights/tiny.safetensors"
    assert capsys.readouterr().err == "backbone: weights/tiny.safetensors, of the current folder\n"
    (tmp_path / "home").mkdir()
    os.link(tmp_path / "kept", tmp_path / "home" / "tiny.safetensors")
    assert find_backbone("tiny") == tmp_path / "home" / "tiny.safetensors"  # not that of somebody's folder
    load_backbone("tiny", image_size=32)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", "norm.weight has NaN"),
        ("missing", "missing tensor norm.bias"),
        ("extra", "unknown tensor head.weight"),
        ("shape", r"cls_token is torch.float32 \(1, 1, 17\), expected"),
        ("integer", "norm.bias is torch.int64"),
    ],
)
def test_damaged_backbones_are_named(backbone, tmp_path, fault, message):
    _, vit = backbone
    tensors = {key: tensor.clone() for key, tensor in vit.state_dict().items()}
    if fault == "nan":
        tensors["norm.weight"][3] = float("nan")
    elif fault == "missing":
        del tensors["norm.bias"]
    elif fault == "extra":
        tensors["head.weight"] = torch.zeros(2)
    elif fault == "shape":
        tensors["cls_token"] = torch.zeros(1, 1, 17)
    else:
        tensors["norm.bias"] = tensors["norm.bias"].long()
    save_backbone(tmp_path / "bad.safetensors", "tiny", vit.config, tensors, {})
    with pytest.raises(WeightsError, match=message):
        load_backbone("tiny", tmp_path / "bad.safetensors", 32)


@pytest.mark.parametrize("change", [{"act": None}, {"color": 1}, "not json"])
def test_settings_of_another_version_are_named(backbone, tmp_path, change):
    path, vit = backbone
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["config"])
    metadata["config"] = change if isinstance(change, str) else json.dumps({**settings, **change})
    if change == {"act": None}:
        del metadata["config"]
    save_file(dict(vit.state_dict()), path, metadata)
    with pytest.raises(WeightsError, match="settings that this version does not know"):
        load_backbone("tiny", path)


def test_other_files_are_answered_with_what_to_do(backbone, tmp_path):
    path, vit = backbone
    advice = r"none.safetensors: no such file[^$]*vitface convert NAME --src FILE --out .*none[^$]*fetch NAME"
    with pytest.raises(WeightsError, match=advice):
        load_backbone("tiny", tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "source.safetensors")
    torch.save(vit.state_dict(), tmp_path / "source.pth")
    for name in ("source.safetensors", "source.pth"):
        with pytest.raises(WeightsError, match=rf"vitface convert NAME --src .*{name}"):
            load_backbone("tiny", tmp_path / name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged"):
        load_backbone("tiny", path)
    save_backbone(tmp_path / "t.safetensors", "tiny", vit.config, vit.state_dict(), {})
    with pytest.raises(WeightsError, match="holds tiny, not vit_nano"):
        load_backbone("vit_nano", tmp_path / "t.safetensors")


def test_vit_nano_of_a_clone_is_found_from_any_folder(tmp_path):
    root = Path(__file__).parents[2]
    script = "from vitface.store.backbone import find_backbone; print(find_backbone('vit_nano'))"
    settings = {**os.environ, "PYTHONPATH": str(root), "VITFACE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.stdout.strip() == str(root / "weights" / "vit_nano.safetensors"), done.stderr
