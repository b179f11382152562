"""The controls of DA-LoRA: which weights the blocks get, and what is stored of them."""

import numpy as np
import pytest
import torch
from conftest import tiny_face

from vitface.errors import ConfigError
from vitface.recogniser import Recogniser
from vitface.store.faces import trained_tensors
from vitface.study.controls import random_gate, shuffled_gate, uniform_gate


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), np.uint8)


def weights_of(model, images):
    with torch.no_grad():
        return model.route(model.tokens(torch.from_numpy(images)))[0].numpy()


def changed(control, seed=0):
    model = tiny_face(num_domains=3)
    control(model, seed)
    return model


def test_a_uniform_gate_weighs_all_domains_alike(images):
    np.testing.assert_allclose(weights_of(changed(uniform_gate), images), 1 / 3, atol=1e-7)


def test_a_random_gate_is_the_same_for_every_image_and_another_for_every_seed(images):
    rows = weights_of(changed(random_gate, 5), images)
    np.testing.assert_array_equal(rows, rows[:1].repeat(4, 0))
    assert rows[0].std() > 0.01 and rows[0].sum() == pytest.approx(1)
    np.testing.assert_array_equal(weights_of(changed(random_gate, 5), images), rows)
    assert abs(weights_of(changed(random_gate, 6), images) - rows).max() > 0.05


@pytest.mark.parametrize("control", [uniform_gate, random_gate])
def test_a_fixed_gate_is_not_trained_but_travels_with_the_checkpoint(control, images):
    model = changed(control)
    assert not any(name.startswith("router") for name, p in model.named_parameters() if p.requires_grad)
    kept = trained_tensors(model)
    other = tiny_face(num_domains=3, seed=7)
    assert not np.allclose(weights_of(other, images), weights_of(model, images))
    other.load_state_dict(kept, strict=False)
    np.testing.assert_array_equal(weights_of(other, images), weights_of(model, images))


def test_a_shuffled_gate_is_another_images(images):
    model = tiny_face(num_domains=3)
    own, keys = weights_of(model, images), list(model.state_dict())
    shuffled_gate(model)
    np.testing.assert_array_equal(weights_of(model, images), own[[2, 3, 0, 1]])
    assert list(model.state_dict()) == keys
    embedded = Recogniser(tiny_face(num_domains=3)).embed(images)
    assert Recogniser(model).embed(images).shape == embedded.shape


def test_a_control_needs_a_router_of_its_own():
    shuffled = changed(shuffled_gate)
    for refused in (tiny_face(), shuffled):
        with pytest.raises(ConfigError, match="router of its own"):
            shuffled_gate(refused)
