import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import randomise_adapters, tiny_face
from safetensors.torch import load_file

import vitface
from vitface.errors import CheckpointError
from vitface.files import sha256_file
from vitface.model.face import FaceModel
from vitface.recogniser import Recogniser
from vitface.store import faces
from vitface.store.backbone import load_backbone, save_backbone
from vitface.store.faces import MODEL_FILES, open_checkpoint, trained_tensors
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
        loaded = Recogniser.from_checkpoint(open_checkpoint(where))
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
        open_checkpoint(tmp_path / "run", other).load()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tiny.safetensors: not there\nname the right file"):
        open_checkpoint(tmp_path / "run").load()


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
        open_checkpoint(tmp_path).load()


def test_a_shared_model_is_two_files_and_a_manifest(backbone, tmp_path):
    path, _ = backbone
    model = face_on(path, sha256_file(path))
    save_run(tmp_path / "run", model)
    shared = tmp_path / "shared"
    shared.mkdir()
    for name in (*MODEL_FILES, "manifest.json"):
        shutil.copy(tmp_path / "run" / "checkpoints" / "best" / name, shared)
    images = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    expected = Recogniser(model).embed(images)
    np.testing.assert_allclose(vitface.load(shared, weights=path).embed(images), expected, atol=2e-6)


def test_neither_run_nor_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
        vitface.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jpg").touch()
    for path in (tmp_path / "empty", tmp_path / "a.jpg"):
        with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
            vitface.load(path)


def test_an_open_checkpoint_knows_its_run(tiny_run):
    step = tiny_run / "checkpoints" / "step-7"
    shutil.copytree(step, tiny_run / "checkpoints" / "step-6")
    for path, folder, is_best in (
        (tiny_run, step, True),
        (step.with_name("best"), step, True),
        (step.with_name("step-6"), step.with_name("step-6"), False),
    ):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.path, checkpoint.folder, checkpoint.run) == (path, folder, tiny_run)
        assert checkpoint.is_best is is_best and checkpoint.config.backbone == "tiny"
        assert checkpoint.sha256 == sha256_file(step / "model.safetensors")
        assert checkpoint.thresholds == {0.01: 0.2, 0.001: 0.6}
        assert checkpoint.calibration["pairs"] == {"same": 9, "different": 30_000}
    shutil.copytree(step, tiny_run.parent / "bundle")
    bundle = open_checkpoint(tiny_run.parent / "bundle")
    assert (bundle.run, bundle.settings, bundle.calibration, bundle.thresholds) == (None, {}, None, {})
    assert bundle.is_best is False
    shutil.copy(tiny_run / "thresholds.json", bundle.folder)
    assert open_checkpoint(bundle.folder).thresholds == {0.01: 0.2, 0.001: 0.6}


def test_a_checkpoint_is_verified_once(backbone, tmp_path, monkeypatch):
    path, _ = backbone
    save_run(tmp_path / "run", face_on(path, sha256_file(path)), {"weights": str(path)})
    hashed = []
    monkeypatch.setattr(faces, "sha256_file", lambda file: hashed.append(file.name) or sha256_file(file))
    checkpoint = open_checkpoint(tmp_path / "run")
    assert hashed == list(MODEL_FILES)
    for _ in range(2):
        assert checkpoint.load().config == checkpoint.config and checkpoint.backbone == path
        assert len(checkpoint.sha256) == 64 and checkpoint.thresholds == {}
    assert hashed == [*MODEL_FILES, "tiny.safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        lambda written: written.pop("pairs"),
        lambda written: written["thresholds"]["0.01"].pop("tar"),
        lambda written: written["thresholds"].update({"0.01": {"threshold": "high", "tar": 1}}),
        lambda written: written.update(thresholds=[1]),
    ],
)
def test_damaged_thresholds_are_refused(tiny_run, change, capsys):
    file = tiny_run / "thresholds.json"
    written = json.loads(file.read_text())
    change(written)
    file.write_text(json.dumps(written))
    checkpoint = open_checkpoint(tiny_run)
    with pytest.raises(CheckpointError, match=r"thresholds\.json is damaged; put a copy back or delete it"):
        _ = checkpoint.calibration
    assert checkpoint.thresholds == {} and f"note: {file} is damaged" in capsys.readouterr().err
    file.write_text(json.dumps({**written, "model": "another's"}))
    assert open_checkpoint(tiny_run).thresholds == {}
