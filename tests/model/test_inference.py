"""A prepared model computes the function of the model it was, to rounding."""

import numpy as np
import pytest
import torch
from conftest import randomise_adapters, tiny_face

import vitface.kernels.onednn as onednn
from vitface.config import FaceConfig
from vitface.data.preprocess import to_float
from vitface.model.face import FaceModel
from vitface.model.inference import fold_stem, prepare_inference
from vitface.model.lora import adapted_linears
from vitface.recogniser import Recogniser
from vitface.store.backbone import load_backbone


def face_model(backbone="dinov2_vits14", image_size=56, depth=2, **fields) -> FaceModel:
    """Random weights, LayerScale and adapters; few blocks, so that it is quick."""
    vit = load_backbone(backbone, "random", image_size)
    del vit.blocks[depth:]
    fields = dict(lora_rank=4, lora_alpha=8, head="bn", embedding_dim=16, router_depth=1) | fields
    model = FaceModel(vit, FaceConfig(backbone, "random", vit.config, image_size, **fields)).eval()
    randomise_adapters(model)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.vit.named_parameters():
        if name.endswith("gamma") or name.endswith("bias"):
            parameter.data = torch.rand(parameter.shape, generator=generator).to(parameter) + 0.1
    return model


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    """Noise, the hardest picture to resize; its border is unlike its neighbours too."""
    return np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)


@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize(("backbone", "image_size"), [("dinov2_vits14", 112), ("clip_vitb16", 224), ("vit_nano", 112)])
def test_embeddings_and_domain_weights_are_the_same(backbone, image_size, domains, crops):
    model = face_model(backbone, image_size, num_domains=domains, lora_targets="attn+mlp" if domains > 1 else "attn")
    recogniser = Recogniser(model)
    want = recogniser.embed(crops), recogniser.domain_weights(crops), recogniser.attention(crops)
    assert prepare_inference(model) is model
    found = recogniser.embed(crops), recogniser.domain_weights(crops), recogniser.attention(crops)
    for rows, expected in zip(found, want, strict=True):
        np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-6)
    assert len(adapted_linears(model)) == (0 if domains == 1 else 8)


def test_rounding_once_in_bf16_is_no_worse(crops):
    """Error against float32 of the prepared bf16 model and of the plain one."""
    exact = face_model(depth=4, image_size=112)
    plain = face_model(depth=4, image_size=112, dtype="bf16")
    want = Recogniser(exact).embed(crops)
    plain_error = np.abs(Recogniser(plain).embed(crops) - want).mean()
    assert 0 < np.abs(Recogniser(prepare_inference(plain)).embed(crops) - want).mean() <= 2 * plain_error


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_are_prepared_in_the_dtype_that_they_are_used_in(dtype):
    model = prepare_inference(face_model(num_domains=3, dtype=dtype))
    adapters = [p.dtype for layer in adapted_linears(model).values() for p in (layer.lora_a, layer.lora_b)]
    assert adapters == [model.vit.dtype] * 8


@pytest.mark.skipif(not onednn.serves(torch.ones(1)), reason="without oneDNN, weights keep their layout")
def test_a_prepared_model_says_that_it_is_for_inference(crops):
    model = prepare_inference(face_model())
    tokens = model.tokens(torch.from_numpy(crops))
    with pytest.raises(RuntimeError, match="prepared for inference: call it under torch.no_grad"):
        model.embed_tokens(tokens)
    with torch.no_grad():
        assert model.embed_tokens(tokens).embedding.shape == (3, 16)


@pytest.mark.parametrize("rule", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("backbone", "image_size", "kernel"),
    [
        ("dinov2_vits14", 224, {"bicubic": 11, "bilinear": 9}),
        ("clip_vitb16", 224, {"bicubic": 12, "bilinear": 10}),
        ("dinov2_vits14", 112, {"bicubic": 14, "bilinear": 14}),
        ("vit_tiny_patch16", 448, {"bicubic": 8, "bilinear": 6}),
    ],
)
def test_folded_stem_is_the_stem_in_float64(backbone, image_size, kernel, rule, crops):
    model = face_model(backbone, image_size, depth=1, resize=rule)
    model.vit.patch_embed.double()
    stem = fold_stem(model)
    assert stem is not None and stem.kernel.shape[-1] == kernel[rule]
    pixels = torch.from_numpy(crops)
    want = model.vit.patch_embed(model.preprocess(to_float(pixels).double()))
    torch.testing.assert_close(stem(pixels), want, rtol=0, atol=1e-6)  # to_float divides in float32
    exact = model.vit.patch_embed(model.preprocess(pixels.permute(0, 3, 1, 2).double() / 255))
    torch.testing.assert_close(stem(pixels), exact, rtol=0, atol=1e-10)


def test_a_size_that_cannot_be_folded_is_left_as_it_is(crops):
    model = face_model("dinov2_vits14", 70, depth=1)
    want = Recogniser(model).embed(crops)
    assert prepare_inference(model).stem is None
    np.testing.assert_allclose(Recogniser(model).embed(crops), want, rtol=0, atol=2e-6)


def test_the_frozen_backbone_can_be_prepared(crops):
    model = tiny_face(lora_rank=0, head="pretrained", embedding_dim=16)
    want = Recogniser(model).embed(crops)
    np.testing.assert_allclose(Recogniser(model).prepare().embed(crops), want, rtol=0, atol=2e-6)
