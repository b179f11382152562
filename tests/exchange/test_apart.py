"""A page's graph without the backbone: no number of it is there, and with its file it computes what PyTorch does."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import optional, tiny_config
from runs import faces
from test_onnx_of_backbones import FAMILIES, SMALL

from vitface.config import FaceConfig
from vitface.errors import ExchangeError
from vitface.exchange import site
from vitface.exchange.apart import read_stored
from vitface.exchange.onnx_graph import onnx_bytes
from vitface.exchange.site import page_graph
from vitface.files import sha256_file
from vitface.model.face import FaceModel
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS
from vitface.recogniser import Recogniser
from vitface.store.backbone import load_backbone, read_backbone, save_backbone
from vitface.store.faces import trained_tensors

onnx, onnxruntime = optional("onnx"), optional("onnxruntime")
optional("onnxscript")
DINOV2 = "dinov2_vits14"
CASES = {  # a backbone, the image's side where it is not its own, and the face model around it
    "LoRA": (DINOV2, None, {}),
    "DA-LoRA": (DINOV2, None, dict(num_domains=3, lora_targets="attn+mlp")),
    "LoRA, resampled positions": (DINOV2, 48, dict(head="patches")),
    "DA-LoRA, resampled positions": (DINOV2, 24, dict(num_domains=3)),
    "a trained patch convolution": (DINOV2, 48, dict(train_patch_embed=True)),
    **{name: (name, 48 if name == "pe_core_t16" else None, changes) for name, (_, changes) in FAMILIES.items()},
}

FAST = ("LoRA, resampled positions", "DA-LoRA, resampled positions")


def randomise(tensors: dict, seed: int) -> dict:
    """Fills tensors in place: N(0, 0.3²), and above 0 for variances."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
                tensor.copy_(tensor.abs() + 0.1 if name.endswith("running_var") else tensor)
    return tensors


def backbone_of(name: str, path: Path, seed: int = 1) -> Path:
    """A small backbone's file."""
    small = {**SMALL, **FAMILIES[name][0]} if name in FAMILIES else dataclasses.asdict(tiny_config())
    config = dataclasses.replace(VIT_PRESETS[name], **small)
    tensors = randomise(ViT(config, config.native_size).state_dict(), seed)
    path.parent.mkdir(exist_ok=True)
    save_backbone(path, name, config, tensors, {"file": f"{seed}.pth", "licence": "somebody's"})
    return path


def model_on(path: Path, side: int | None, changes: dict) -> Recogniser:
    """A face model on a backbone's file; what is trained of it is the same whatever the file."""
    name, vit, _, _ = read_backbone(path)
    wanted = dict(lora_rank=2, embedding_dim=8, head="bn", router_depth=1)
    config = FaceConfig(name, sha256_file(path), vit, side or vit.native_size, **{**wanted, **changes})
    model = FaceModel(load_backbone(name, path, config.image_size), config).eval()
    randomise(trained_tensors(model), seed=2)
    return Recogniser(model)


def graph_on(path: Path, side: int | None, changes: dict) -> bytes:
    return page_graph(model_on(path, side, changes), "fp32", read_stored(path))


def run_with(graph: bytes, path: Path) -> list[np.ndarray]:
    """What a graph computes of `faces()` with a backbone's file."""
    stored, options = read_stored(path), onnxruntime.SessionOptions()
    options.add_external_initializers_from_files_in_memory([stored.name], [stored.data], [len(stored.data)])
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": faces()})


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in CASES])
def test_not_a_bit_depends_on_the_backbone_whose_file_completes_it(tmp_path, case):
    """One graph for two backbones, so neither numbers of one nor any computed from them are in it; with the file of
    either, it computes what PyTorch does."""
    name, *rest = CASES[case]
    paths = [backbone_of(name, tmp_path / str(seed) / "any name.safetensors", seed) for seed in (1, 7)]
    graph = graph_on(paths[0], *rest)
    assert graph == graph_on(paths[1], *rest)
    assert {file_of(tensor) for tensor in onnx.load_from_string(graph).graph.initializer} == {"", f"{name}.safetensors"}
    first, second = (model_on(path, *rest) for path in paths)
    assert np.abs(first.embed(faces()) - second.embed(faces())).max() > 0.01
    for model, path in zip((first, second), paths, strict=True):
        embeddings, *more = run_with(graph, path)
        np.testing.assert_allclose(embeddings, model.embed(faces()), atol=3e-5)
        if model.config.num_domains > 1:
            np.testing.assert_allclose(more[0], model.domain_weights(faces()), atol=3e-5)


def file_of(tensor) -> str:
    return {entry.key: entry.value for entry in tensor.external_data}.get("location", "")


def test_a_planted_leak_is_seen(tmp_path, monkeypatch):
    """What the exporter computes from the backbone is refused where it is noise; else the test above sees it."""
    paths = [backbone_of(DINOV2, tmp_path / str(seed) / "x.safetensors", seed) for seed in (1, 7)]
    monkeypatch.setattr(site, "onnx_bytes", lambda *given, fold: onnx_bytes(*given, fold=True))
    with pytest.raises(ExchangeError, match=r"ONNX Runtime's embeddings differ .*; nothing was written"):
        graph_on(paths[0], None, {})
    monkeypatch.setattr(site, "with_noise", lambda model: model)
    first, second = (graph_on(path, None, {}) for path in paths)
    assert first != second


def test_a_file_that_nobody_else_has_is_refused(tmp_path):
    path = backbone_of(DINOV2, tmp_path / "x.safetensors")
    name, config, tensors, source = read_backbone(path)
    save_backbone(path, name, config, tensors, {**source, "merged": "LoRA"})
    with pytest.raises(ExchangeError, match="has LoRA folded in, so no visitor has a copy; publish the run"):
        read_stored(path)


@pytest.mark.slow
def test_a_file_of_another_precision_is_read_as_it_is(tmp_path):
    path = backbone_of(DINOV2, tmp_path / "x.safetensors")
    name, config, tensors, source = read_backbone(path)
    save_backbone(path, name, config, {key: tensor.bfloat16() for key, tensor in tensors.items()}, source)
    graph = graph_on(path, 48, {})
    np.testing.assert_allclose(run_with(graph, path)[0], model_on(path, 48, {}).embed(faces()), atol=3e-5)


def test_the_header_of_a_file_does_not_matter(tmp_path):
    path = backbone_of(DINOV2, tmp_path / "x.safetensors")
    facts = read_stored(path).facts
    name, config, tensors, source = read_backbone(path)
    save_backbone(path, name, config, dict(reversed(tensors.items())), {**source, "file": "another name.pth"})
    assert read_stored(path).facts == facts
