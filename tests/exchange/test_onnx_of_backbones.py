"""ONNX Runtime computes what PyTorch does of each family of backbones, with adapters and random weights."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import optional
from runs import faces

from vitface.config import FaceConfig
from vitface.exchange.onnx_graph import onnx_bytes, trace
from vitface.model.face import FaceModel
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS
from vitface.recogniser import Recogniser

SMALL = dict(embed_dim=32, depth=1, num_heads=2)
FAMILIES = {
    "dinov3_vits16plus": (
        dict(native_size=64, depth=2),
        dict(num_domains=2, router_depth=1, head="bn"),
    ),  # registers, rotary, SwiGLU; a router
    "siglip2_vitb16": (dict(native_size=64, pool_heads=2), dict(head="bn")),  # attention pool, no CLS
    "pe_core_t16": (dict(native_size=64, pool_heads=2), dict(head="linear")),  # learned and rotary, pool with CLS
    "lvface_t": (dict(pool_dim=8), dict(head="pretrained")),  # all tokens in a row, batch norms
}


def random_model(name: str) -> FaceModel:
    sizes, changes = FAMILIES[name]
    config = dataclasses.replace(VIT_PRESETS[name], **{**SMALL, **sizes})
    face = FaceConfig(name, "random", config, config.native_size, lora_rank=2, embedding_dim=8, **changes)
    model, generator = FaceModel(ViT(config, config.native_size), face).eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
                tensor.copy_(tensor.abs() + 0.1 if key.endswith("running_var") else tensor)
    return model


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "dinov3_vits16plus" else pytest.mark.slow) for name in FAMILIES]
)
def test_onnx_runtime_computes_the_same(name):
    onnxruntime = optional("onnxruntime")
    for package in ("onnx", "onnxscript"):
        optional(package)
    model = random_model(name)
    data = onnx_bytes(trace(model), Recogniser(model))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        embeddings, *weights = session.run(None, {"images": faces(count)})
        expected = Recogniser(model).embed(faces(count))
        assert np.ptp(expected[:, 0]) > 1e-4 or count == 1
        np.testing.assert_allclose(embeddings, expected, atol=2e-5)
        if weights:
            np.testing.assert_allclose(weights[0], Recogniser(model).domain_weights(faces(count)), atol=2e-5)
