import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import randomise_adapters, tiny_face
from safetensors.torch import load_file

import vitface
from vitface.errors import CheckpointError, WeightsError
from vitface.files import sha256_file
from vitface.model.face import FaceModel
from vitface.recogniser import Recogniser
from vitface.store.backbones import load_backbone, save_backbone
from vitface.store.faces import MODEL_FILES, load_face, trained_tensors
from vitface.training.runs.checkpoint import save_checkpoint


def save_run(run, model, config=None):
    save_checkpoint(run, 7, trained_tensors(model), dataclasses.asdict(model.config), {}, {}, is_best=True)
    if config:
        (run / "config.json").write_text(json.dumps(config))


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
    model = face_on(path, sha256_file(path), **changes)
    save_run(tmp_path / "run", model, {"weights": str(path)})
    images = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)
    for where in (
        tmp_path / "run",
        tmp_path / "run" / "checkpoints" / "step-7",
        tmp_path / "run" / "checkpoints" / "last",
    ):
        loaded = vitface.load(where)
        assert loaded.config == model.config
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.model.state_dict().items())
        np.testing.assert_array_equal(loaded.embed(images), Recogniser(model).embed(images))
    kept = set(load_file(tmp_path / "run" / "checkpoints" / "best" / "model.safetensors"))
    frozen = set(load_backbone("tiny", path, 32).state_dict())
    trained = {"vit.patch_embed.proj.weight", "vit.patch_embed.proj.bias"} if changes else set()
    assert {key for key in kept if key.removeprefix("vit.") in frozen} == trained


def test_the_wrong_backbone_is_refused(backbone, tmp_path):
    path, vit = backbone
    save_run(tmp_path / "run", face_on(path, sha256_file(path)), {"weights": str(path)})
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
    model = face_on(path, sha256_file(path))
    save_run(tmp_path / "run", model)
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in (*MODEL_FILES, "manifest.json"):
        shutil.copy(tmp_path / "run" / "checkpoints" / "best" / name, shared)
    images = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    np.testing.assert_array_equal(vitface.load(shared, weights=path).embed(images), Recogniser(model).embed(images))


def test_neither_run_nor_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
        vitface.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no manifest.json"):
        vitface.load(tmp_path / "empty")
