"""Trained runs that take no training: a tiny backbone file, and run directories around it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from conftest import randomise_adapters, tiny_config, tiny_face, tiny_vit

from vitface.files import sha256_file
from vitface.model.face import FaceModel
from vitface.presets import VIT_PRESETS
from vitface.store.backbone import load_backbone, save_backbone
from vitface.store.faces import open_checkpoint, trained_tensors
from vitface.training.runs.checkpoint import save_checkpoint

NAME = "dinov2_tiny"
EMBEDDING = [round(0.0123456 * i, 7) for i in range(512)]  # of a person: must not be published


def use_tiny(monkeypatch, home: Path) -> Path:
    """Makes the preset `NAME` known, and its backbone one that is found; where it lies."""
    monkeypatch.setitem(VIT_PRESETS, NAME, tiny_config())
    monkeypatch.setenv("VITFACE_HOME", str(home))
    home.mkdir()
    vit = tiny_vit(seed=3)
    path = home / f"{NAME}.safetensors"
    save_backbone(path, NAME, vit.config, vit.state_dict(), {"file": "x.pth", "licence": "Apache-2.0"})
    return path


def face_on(backbone: Path, **changes) -> FaceModel:
    """A face model on the tiny backbone, each of whose trained tensors matters."""
    config = dataclasses.replace(tiny_face(**changes).config, backbone=NAME, weights_sha256=sha256_file(backbone))
    model = FaceModel(load_backbone(NAME, backbone, config.image_size), config, seed=4).eval()
    randomise_adapters(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.head.named_buffers():
            counter = name.endswith("num_batches_tracked")
            tensor.copy_(torch.tensor(3) if counter else torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def save_run(run: Path, model: FaceModel, **settings) -> Path:
    """A run directory of `model`, with what a training leaves in it."""
    identities = {"margin.weight": torch.randn(10, model.config.embedding_dim)}
    state = {"settings": {"train_data": "/home/someone/faces"}, "data": {"people": ["Alice", "Bob"]}}
    settings = {"train_data": "data/faces", "exp": None, **settings}
    save_checkpoint(run, 7, trained_tensors(model), dataclasses.asdict(model.config), identities, state, is_best=True)
    (run / "config.json").write_text(json.dumps(settings))
    (run / "log.jsonl").write_text('{"loss": 1.0}\n')
    thresholds = {"0.01": {"threshold": 0.25, "tar": 0.9}, "0.0001": {"refused": "Alice has too few pairs"}}
    written = {"model": open_checkpoint(run).sha256, "pairs": {"same": 40, "different": 900}, "thresholds": thresholds}
    (run / "thresholds.json").write_text(json.dumps(written))
    return run


def faces(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 112, 112, 3), np.uint8)
