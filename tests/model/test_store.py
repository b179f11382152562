import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import randomise_adapters, tiny_config, tiny_face, tiny_vit
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vitface
from vitface.errors import CheckpointError, WeightsError
from vitface.model import store
from vitface.model.face import FaceModel
from vitface.model.store import load_backbone, load_face, save_backbone, trained_tensors
from vitface.training.checkpoint import save_checkpoint


@pytest.fixture
def tiny_preset(monkeypatch):
    """A preset "tiny" of a 2-block ViT."""
    for module in ("vitface.config", "vitface.model.store"):
        monkeypatch.setitem(__import__(module, fromlist=["x"]).VIT_PRESETS, "tiny", tiny_config())


@pytest.fixture
def backbone(tmp_path, tiny_preset):
    """A file of the tiny preset, and the ViT it was saved from."""
    vit = tiny_vit(seed=3)
    save_backbone(tmp_path / "tiny.safetensors", "tiny", vit.config, vit.state_dict(), {"file": "x", "licence": "none"})
    return tmp_path / "tiny.safetensors", vit


def save_run(run, model, config=None):
    save_checkpoint(run, 7, trained_tensors(model), dataclasses.asdict(model.config), {}, {}, is_best=True)
    if config:
        (run / "config.json").write_text(json.dumps(config))


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


def test_places_in_order(backbone, tmp_path, monkeypatch):
    path, _ = backbone
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    path.rename(tmp_path / "kept")
    with pytest.raises(WeightsError, match="vitface.weights.fetch tiny"):
        load_backbone("tiny")
    (tmp_path / "home").mkdir()
    os.link(tmp_path / "kept", tmp_path / "home" / "tiny.safetensors")
    assert store.find_backbone("tiny") == tmp_path / "home" / "tiny.safetensors"
    (tmp_path / "weights").mkdir()
    os.link(tmp_path / "kept", tmp_path / "weights" / "tiny.safetensors")
    assert str(store.find_backbone("tiny")) == "weights/tiny.safetensors"
    load_backbone("tiny", image_size=32)


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
    with pytest.raises(WeightsError, match="no such file"):
        load_backbone("tiny", tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "source.safetensors")
    torch.save(vit.state_dict(), tmp_path / "source.pth")
    for name in ("source.safetensors", "source.pth"):
        with pytest.raises(WeightsError, match=rf"vitface.weights.convert NAME --src .*{name}"):
            load_backbone("tiny", tmp_path / name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged"):
        load_backbone("tiny", path)
    with pytest.raises(WeightsError, match="holds tiny, not vit_nano"):
        save_backbone(tmp_path / "t.safetensors", "tiny", vit.config, vit.state_dict(), {})
        load_backbone("vit_nano", tmp_path / "t.safetensors")


def face_on(path, digest, **changes):
    vit = load_backbone("tiny", path, 32)
    config = dataclasses.replace(tiny_face(**changes).config, backbone="tiny", weights_sha256=digest)
    model = FaceModel(vit, config, seed=4).eval()
    randomise_adapters(model)
    with torch.no_grad():
        model.head.norm.running_mean.normal_()
        model.head.norm.num_batches_tracked.add_(3)
    return model


@pytest.mark.parametrize("changes", [{}, {"num_domains": 3, "head": "patches", "train_patch_embed": True}])
def test_face_round_trip_is_bitwise(backbone, tmp_path, changes):
    path, _ = backbone
    model = face_on(path, store.sha256_file(path), **changes)
    save_run(tmp_path / "run", model, {"weights": str(path)})
    images = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
    for where in (
        tmp_path / "run",
        tmp_path / "run" / "checkpoints" / "step-7",
        tmp_path / "run" / "checkpoints" / "last",
    ):
        loaded = vitface.load(where)
        assert loaded.config == model.config
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
        np.testing.assert_array_equal(loaded.embed(images), model.embed(images))
    kept = set(load_file(tmp_path / "run" / "checkpoints" / "best" / "model.safetensors"))
    frozen = set(load_backbone("tiny", path, 32).state_dict())
    trained = {"vit.patch_embed.proj.weight", "vit.patch_embed.proj.bias"} if changes else set()
    assert {key for key in kept if key.removeprefix("vit.") in frozen} == trained


def test_the_wrong_backbone_is_refused(backbone, tmp_path):
    path, vit = backbone
    save_run(tmp_path / "run", face_on(path, store.sha256_file(path)), {"weights": str(path)})
    other = tmp_path / "other.safetensors"
    save_backbone(other, "tiny", vit.config, {k: v + 1 for k, v in vit.state_dict().items()}, {})
    with pytest.raises(CheckpointError, match="name the right file with --weights FILE"):
        load_face(tmp_path / "run", other)
    path.unlink()
    with pytest.raises(WeightsError, match="no weights for tiny"):
        load_face(tmp_path / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("fault", ["flip", "cut", "remove"])
def test_damaged_checkpoints_are_refused(tmp_path, tiny_preset, name, fault):
    model = tiny_face()
    save_run(tmp_path, model)
    file = tmp_path / "checkpoints" / "step-7" / name
    data = bytearray(file.read_bytes())
    if fault == "flip":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif fault == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=name):
        load_face(tmp_path)


def test_a_shared_model_is_two_files_and_a_manifest(backbone, tmp_path):
    path, _ = backbone
    model = face_on(path, store.sha256_file(path))
    save_run(tmp_path / "run", model)
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in (*store.MODEL_FILES, "manifest.json"):
        shutil.copy(tmp_path / "run" / "checkpoints" / "best" / name, shared)
    images = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    np.testing.assert_array_equal(vitface.load(shared, weights=path).embed(images), model.embed(images))


def test_neither_run_nor_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
        vitface.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no manifest.json"):
        vitface.load(tmp_path / "empty")
