"""What `vitface.load` returns: images of any kind -> embeddings, verdicts, domain weights, attention."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_face, tiny_recogniser
from PIL import Image

from vitface.errors import ConfigError, ImageError
from vitface.gallery.gallery import Gallery
from vitface.model.inference import embed_batches, embed_crops, route_crops, split
from vitface.model.lora import Mix
from vitface.recogniser import Recogniser
from vitface.store.thresholds import Verdict


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)


@pytest.mark.parametrize("num_domains", [1, 3])
def test_flip_sum_is_the_sum_over_the_mirror_image(images, num_domains):
    recogniser = tiny_recogniser(num_domains=num_domains)
    model, mirrored = recogniser.model, images[:, :, ::-1].copy()
    with torch.no_grad():

        def raw(x):
            return model(model.preprocess(torch.from_numpy(x).permute(0, 3, 1, 2) / 255.0))[0]

        total = raw(images) + raw(mirrored)
        expected = (total / total.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(recogniser.embed(images), expected, atol=1e-6)
    np.testing.assert_allclose(recogniser.embed(mirrored), expected, atol=1e-6)
    assert abs(recogniser.embed(images, flip=False) - expected).max() > 1e-4


@pytest.mark.parametrize("flip", [True, False])
def test_embeddings_and_domain_weights_share_one_pass(images, flip):
    """The weights are those of the images themselves, and each image and its mirror image is seen once."""
    recogniser, seen = tiny_recogniser(num_domains=3), []
    recogniser.model.vit.blocks[1].register_forward_hook(lambda block, inputs, output: seen.append(len(output)))
    embeddings, weights = embed_crops(recogniser.model, torch.from_numpy(images), flip)
    assert seen == [10 if flip else 5]
    np.testing.assert_allclose(embeddings.numpy(), recogniser.embed(images, flip), atol=1e-6)
    np.testing.assert_allclose(weights.numpy(), recogniser.domain_weights(images), atol=1e-6)
    assert np.ptp(weights.numpy(), axis=0).max() > 1e-4  # it would show if they were of another image
    plain = tiny_recogniser()
    assert embed_crops(plain.model, images, flip)[1] is None
    assert embed_batches(plain.model, [images], flip)[1].tolist() == plain.domain_weights(images).tolist() == [[1]] * 5


def test_a_model_is_copied_unless_it_was_prepared(images):
    recogniser = tiny_recogniser(num_domains=3)
    for again in (copy.deepcopy(recogniser), pickle.loads(pickle.dumps(recogniser))):
        assert np.array_equal(again.embed(images), recogniser.embed(images))
    recogniser.prepare()
    for act in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match="cannot be copied or sent to a process; load it again there"):
            act(recogniser)


@pytest.mark.parametrize("domains", [1, 3])
@pytest.mark.parametrize("prepared", [False, True])
def test_no_images_give_no_rows(images, domains, prepared):
    recogniser = tiny_recogniser(num_domains=domains)
    model = recogniser.prepare().model if prepared else recogniser.model
    embeddings, weights = embed_crops(model, images[:0])
    assert embeddings.shape == (0, 8) and embeddings.dtype == torch.float32
    assert weights is None if domains == 1 else weights.shape == (0, 3)
    assert route_crops(model, images[:0]).shape == (0, domains)
    assert [part.shape for part in embed_batches(model, [images[:0]])] == [(0, 8), (0, domains)]
    with pytest.raises(ValueError, match="images must be uint8"):
        embed_crops(model, images[:0, :60])


def test_views_of_an_array_are_its_values(images):
    """BGR turned to RGB, rows upside down: torch takes no negative strides."""
    model = tiny_recogniser().model
    for view in (images[..., ::-1], images[:, ::-1], images[::-1]):
        torch.testing.assert_close(embed_crops(model, view)[0], embed_crops(model, view.copy())[0], rtol=0, atol=0)


@pytest.mark.parametrize("domains", [1, 3])
def test_domain_weights_are_on_the_device_of_the_model(domains):
    """ "meta", which computes nothing, in place of a GPU."""
    model = tiny_face(num_domains=domains).eval().to("meta")
    weights = route_crops(model, torch.zeros(2, 112, 112, 3, dtype=torch.uint8, device="meta"))
    assert weights.device.type == "meta" and weights.shape == (2, domains)


def test_batches_do_not_change_what_is_computed(images):
    model = tiny_recogniser(num_domains=3).model
    for flip in (True, False):
        rows, weights = embed_batches(model, split(model, images, flip, 2), flip)
        expected = embed_crops(model, images, flip)
        np.testing.assert_allclose(rows, expected[0].numpy(), atol=1e-6)
        np.testing.assert_allclose(weights, expected[1].numpy(), atol=1e-6)
    assert [len(batch) for batch in split(model, range(40))] == [16, 16, 8]
    assert [len(batch) for batch in split(model, range(40), flip=True)] == [8] * 5
    assert [part.shape for part in embed_batches(model, [])] == [(0, 8), (0, 3)]


def test_images_are_arrays_paths_and_pil_images(images, tmp_path):
    recogniser = tiny_recogniser()
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    expected = recogniser.embed(images[:1])
    both = recogniser.embed([tmp_path / "a.png", str(tmp_path / "a.png")])
    np.testing.assert_allclose(both, expected[[0, 0]], atol=1e-6)
    np.testing.assert_array_equal(recogniser.embed([Image.fromarray(images[0])]), expected)
    np.testing.assert_array_equal(recogniser.embed(torch.from_numpy(images[:1])), expected)
    Image.fromarray(images[0][:, :60]).save(tmp_path / "b.png")
    with pytest.raises(ImageError, match=r"b\.png"):
        recogniser.embed([tmp_path / "b.png"], align=False)
    with pytest.raises(TypeError, match="must be a list, even of one"):
        recogniser.embed(str(tmp_path / "a.png"))
    with pytest.raises(ValueError, match="not \\(5, 60, 112, 3\\)"):
        recogniser.embed(torch.from_numpy(images[:, :60]))
    assert recogniser.embed([]).shape == (0, 8) and recogniser.domain_weights([]).shape == (0, 1)
    assert recogniser.attention([]).shape == (0, 2, 4, 4)


def test_a_model_in_train_mode_is_refused(images):
    recogniser = Recogniser(tiny_face().train())
    for call in (recogniser.embed, recogniser.domain_weights, recogniser.attention):
        with pytest.raises(RuntimeError, match="eval"):
            call(images)


def test_attention_maps_sum_to_at_most_one(images):
    recogniser = tiny_recogniser(num_domains=3)
    maps, model = recogniser.attention(images, block=0), recogniser.model
    assert maps.shape == (5, 2, 4, 4)
    inputs = model.preprocess(torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0)
    full = model.vit.attention(inputs, Mix(model.route(model.vit.tokens(inputs))[0]), block=0)
    np.testing.assert_allclose(full[:, :, 0, 1:].detach().numpy().reshape(5, 2, 4, 4), maps, atol=1e-6)
    assert maps.sum((2, 3)).min() > 0 and maps.sum((2, 3)).max() < 1
    with pytest.raises(ValueError, match="block must be 0 to 1, or -1 for the last, not 2"):
        recogniser.attention(images, block=2)


def test_verify_is_the_cosine_of_the_embeddings(images):
    recogniser, (first, second) = tiny_recogniser(num_domains=3), images[:2]
    rows = recogniser.embed([first, second]).astype("f8")
    assert recogniser.verify(first, second) == Verdict(pytest.approx(rows[0] @ rows[1], abs=1e-6))
    assert recogniser.verify(first, first).score == pytest.approx(1, abs=1e-6)
    assert recogniser.verify(first, second).score == pytest.approx(recogniser.verify(second, first).score, abs=1e-6)
    calibrated = Recogniser(recogniser.model, {1e-2: -1.0, 1e-3: 1.5})
    assert calibrated.verify(first, second).same is False and calibrated.verify(first, second, far=1e-2).same is True
    with pytest.raises(ConfigError):
        calibrated.verify(first, second, far=0.5)
    with pytest.raises(ImageError, match="not a square crop"):
        calibrated.verify(first, second[:50])


def test_a_notebook_shows_what_a_model_and_a_gallery_are():
    model = tiny_recogniser(num_domains=3)
    assert repr(model) == "<Recogniser: dinov2_vits14, DA-LoRA x 3, 32 px -> 8 numbers, thresholds at FAR (none)>"
    model = Recogniser(tiny_face(), {0.01: 0.2, 0.001: 0.4})
    assert repr(model).endswith(" LoRA, 32 px -> 8 numbers, thresholds at FAR 0.001, 0.01>")
    gallery = Gallery(8)
    gallery.add(["anna", "anna", "ben"], np.eye(8)[:3])
    assert repr(gallery) == "<Gallery: 3 rows of 8 numbers, 2 names>"
