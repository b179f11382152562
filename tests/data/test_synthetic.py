"""The procedural faces: pure functions of their arguments, whose factors do to the pixels what their names say."""

import hashlib
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitface.data.counter import uniform
from vitface.data.synthetic.canvas import HALF_VIEW
from vitface.data.synthetic.render import FACTORS, MOMENTS, identity_factors, photo_moments, render_scenes
from vitface.data.synthetic.worlds import (
    PRETRAIN_PEOPLE,
    TEST_PEOPLE,
    TRAIN_PEOPLE,
    SyntheticSamples,
    synthetic_pairs,
)
from vitface.errors import DataError
from vitface.evaluation.protocol import pair_distance, verify

PEOPLE = np.arange(24) + TEST_PEOPLE.start


def brightness(images):
    return images.astype("f8").mean(axis=3)


def render(people=PEOPLE, yaw=0.0, age=0.0, light=0.0, seed=0):
    return render_scenes(people, yaw, age, light, seed)[0]


def test_uniform_is_splitmix64():
    """Against the reference implementation in Python's integers (Steele et al. 2014)."""

    def splitmix(state):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return state, z ^ (z >> 31)

    key = 12345
    _, state = splitmix(key)
    want = []
    for _ in range(5):
        state, value = splitmix(state)
        want.append((value >> 11) / 2**53)
    assert uniform(5, key).tolist() == want
    assert uniform(3, 1, 2).tolist() != uniform(3, 2, 1).tolist()
    assert splitmix(0)[1] == 0xE220A8397B1DCDAF  # the published first output for seed 0


def test_factors_are_uniform_and_independent():
    factors = identity_factors(np.arange(4000))
    assert factors.shape == (4000, len(FACTORS)) and factors.dtype == np.float32
    assert np.abs(factors.mean(axis=0)).max() < 0.04  # 4 standard errors of a uniform's mean
    assert np.abs(factors.std(axis=0) - 3**-0.5).max() < 0.025
    correlation = np.corrcoef(factors.T) - np.eye(len(FACTORS))
    assert np.abs(correlation).max() < 0.08
    moments = photo_moments(np.arange(4000))
    assert moments.shape == (4000, len(MOMENTS)) and np.abs(moments.mean(axis=0)).max() < 0.04


@settings(max_examples=15, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 3_000_000), st.floats(-90, 90), st.floats(0, 1), st.floats(-1, 1), st.integers(0, 2**53)
        ),
        min_size=2,
        max_size=4,
    )
)
def test_an_image_does_not_depend_on_its_batch(rows):
    batch, _ = render_scenes(*zip(*rows, strict=True))
    assert batch.shape == (len(rows), 112, 112, 3) and batch.dtype == np.uint8
    for row, image in zip(rows, batch, strict=True):
        np.testing.assert_array_equal(render_scenes(*row)[0][0], image)


def test_another_process_draws_the_same_bytes():
    code = (
        "import hashlib; from vitface.data.synthetic.worlds import SyntheticSamples as S; "
        "print(hashlib.sha256(S(1, 4, seed=3).render(range(4)).tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert hashlib.sha256(SyntheticSamples(1, 4, seed=3).render(range(4)).tobytes()).hexdigest() == other


def test_every_argument_matters():
    base = dict(people=PEOPLE[:1], yaw=10.0, age=0.3, light=0.2, seed=1)
    image = render(**base)
    for change in ({"people": PEOPLE[1:2]}, {"yaw": 30.0}, {"age": 0.8}, {"light": 0.8}, {"seed": 2}):
        assert np.abs(render(**base | change).astype(int) - image).mean() > 2, change
    assert len(render(people=np.array([], int))) == 0


def test_light_brightens_its_own_side():
    """The face's right half minus its left half flips sign with the light, and mirrors in size."""
    difference = []
    for light in (-0.8, 0.0, 0.8):
        face = brightness(render(light=light, seed=np.arange(len(PEOPLE))))[:, 45:85, 30:82]
        difference.append((face[:, :, 26:].mean(axis=(1, 2)) - face[:, :, :26].mean(axis=(1, 2))).mean())
    left, none, right = difference
    assert left < -10 and right > 10
    assert abs(none) < 4
    assert abs(left + right) < 0.25 * (right - left)


def test_strong_side_light_is_dim():
    assert brightness(render(light=1.0)).mean() < 0.8 * brightness(render(light=0.1)).mean()


@pytest.mark.parametrize("yaw", [-90.0, -35.0, 0.0, 60.0])
def test_yaw_turns_every_point_in_three_dimensions(yaw, monkeypatch):
    """Without pose jitter, the surface point seen at (u, v) satisfies u = x cos + z sin and v = y."""
    monkeypatch.setattr("vitface.data.synthetic.render.photo_moments", lambda seeds: np.zeros((1, len(MOMENTS))))
    _, truth = render_scenes(PEOPLE, yaw, 0.3, 0.0, 0)
    seen = truth[..., 6] == 1
    x, y, z = (truth[..., 3 + axis].astype("f8") for axis in range(3))
    axis = ((np.arange(28) * 4 + 2.5) / 56 - 1) * HALF_VIEW
    cos, sin = np.cos(np.radians(yaw)), np.sin(np.radians(yaw))
    u, v = np.broadcast_to(axis, seen.shape), np.broadcast_to(-axis[:, None] + 0.10, seen.shape)
    np.testing.assert_allclose((x * cos + z * sin)[seen], u[seen], atol=2e-3)  # float16
    np.testing.assert_allclose(y[seen], v[seen], atol=2e-3)
    depth = z * cos - x * sin
    assert 0.25 < seen.mean() < 0.6 and (depth[seen] > -0.3).all()
    assert 0.6 < depth.max() < 1.4


def test_the_photo_shows_the_truth():
    """Under a soft frontal light, a photo's pixels on the head follow the unlit colours it was drawn from."""
    images, truth = render_scenes(PEOPLE, 20.0, 0.0, 0.0, np.arange(len(PEOPLE)))
    np.testing.assert_array_equal(images, render(yaw=20.0, seed=np.arange(len(PEOPLE))))
    for image, colour in zip(images[:, 2::4, 2::4], truth.astype("f8"), strict=True):
        seen = colour[..., 6] == 1
        assert np.corrcoef(image[seen].ravel(), colour[seen][:, :3].ravel())[0, 1] > 0.6


def test_age_greys_the_hair_and_lines_the_forehead():
    people = np.arange(200) + TEST_PEOPLE.start
    people = people[identity_factors(people)[:, FACTORS.index("hairline")] > 0.4]  # foreheads that are free to see
    young, old = render(people, age=0.0).astype("f8"), render(people, age=1.0).astype("f8")
    assert old[:, 4:12, 46:66].mean() > 1.4 * young[:, 4:12, 46:66].mean()
    rough = [np.abs(np.diff(brightness(image)[:, 35:41, 50:62], axis=1)).mean() for image in (young, old)]
    assert rough[1] > 1.2 * rough[0]


@pytest.mark.parametrize("world", ["synthetic", "synthetic_shift"])
def test_pixels_and_mean_colour_recognise_nobody(world):
    images, people = synthetic_pairs(200, seed=1, world=world)
    issame = people[:, 0] == people[:, 1]
    pixels = images[:, ::2, ::2].reshape(len(images), -1).astype("f4")
    assert verify(pair_distance(pixels[0::2], pixels[1::2]), issame).accuracy < 0.65
    colour = images.mean(axis=(1, 2)).astype("f4")
    assert verify(pair_distance(colour[0::2], colour[1::2]), issame).accuracy < 0.65


def test_same_person_is_closer_under_the_same_light():
    """With the photo's accidents held fixed, another person differs more than a small turn of the same one."""
    still = render().astype(int)
    nudged, other = render(yaw=3.0).astype(int), render(people=PEOPLE + 100).astype(int)
    assert (np.abs(nudged - still).mean(axis=(1, 2, 3)) < np.abs(other - still).mean(axis=(1, 2, 3))).mean() > 0.9


def test_identity_ranges_are_disjoint():
    ranges = (PRETRAIN_PEOPLE, TRAIN_PEOPLE, TEST_PEOPLE)
    assert len(set().union(*(range(r.start, r.stop, 1000) for r in ranges))) == 3000
    assert all(a.stop <= b.start for a, b in pairwise(ranges))
    assert int(SyntheticSamples(2, 1).names[0]) in TRAIN_PEOPLE


@given(st.integers(1, 9), st.integers(1, 14), st.integers(0, 2**40))
def test_samples_have_the_shape_all_samples_share(people, images, seed):
    samples = SyntheticSamples(people, images, seed, first_person=70)
    assert len(samples) == people * images == len(samples.labels) == len(samples.domains)
    assert samples.labels.dtype == samples.domains.dtype == np.int64
    assert samples.labels.tolist() == [label for label in range(people) for _ in range(images)]
    assert samples.names == [str(70 + label) for label in range(people)]
    counts = np.array([np.bincount(samples.domains[samples.labels == p], minlength=3) for p in range(people)])
    assert counts.max() - counts.min() <= 1


def test_domains_are_what_the_factors_say():
    samples = SyntheticSamples(40, 9, seed=5)
    people, yaw, age, light, seeds = samples.factors(range(len(samples)))
    assert samples.domain_names == ("pose", "age", "light")
    np.testing.assert_array_equal(people, samples.labels + TRAIN_PEOPLE.start)
    extreme = np.stack([np.abs(yaw) >= 50, age >= 0.7, np.abs(light) >= 0.7])
    np.testing.assert_array_equal(extreme, np.arange(3)[:, None] == samples.domains)
    assert len(set(seeds.tolist())) == len(samples)
    for factor, low, high in ((yaw, -90, 90), (age, 0, 1), (light, -1, 1)):
        assert low <= factor.min() and factor.max() <= high
    assert 0.4 < (yaw[samples.domains == 0] > 0).mean() < 0.6 and 0.4 < (light[samples.domains == 2] > 0).mean() < 0.6


def test_shifted_domains_are_other_pictures_of_the_same_faces():
    samples = SyntheticSamples(4, 6, seed=5, world="synthetic_shift")
    images, plain = samples.render(range(24)), render_scenes(*samples.factors(range(24)))[0]
    assert samples.domain_names == ("plain", "negative", "upside_down") and set(samples.domains) == {0, 1, 2}
    for image, face, domain in zip(images, plain, samples.domains, strict=True):
        np.testing.assert_array_equal(image, (face, 255 - face, face[::-1])[domain])
    _, yaw, age, light, _ = samples.factors(range(24))
    assert np.abs(yaw).max() <= 35 and age.max() <= 0.5 and np.abs(light).max() <= 0.5
    pairs, _ = synthetic_pairs(200, seed=3, num_people=20, world="synthetic_shift")
    hair = pairs[:, 8:20, 46:66].mean(axis=(1, 2, 3))  # bright in negatives alone
    assert 0.2 < (hair > 140).mean() < 0.5


def test_a_sample_is_a_function_of_seed_person_and_number():
    few, many = SyntheticSamples(2, 4, seed=9, first_person=30), SyntheticSamples(5, 6, seed=9, first_person=29)
    np.testing.assert_array_equal(few.read(4 + 1), many.read(2 * 6 + 1))  # person 31, image 1
    np.testing.assert_array_equal(few.render([5, 0])[1], few.read(0))
    assert not np.array_equal(few.read(0), SyntheticSamples(2, 4, seed=10, first_person=30).read(0))


@pytest.mark.parametrize("count", [100, 37])
def test_pairs_are_balanced_in_every_fold(count):
    images, people = synthetic_pairs(count, seed=2, num_people=6)
    issame = people[:, 0] == people[:, 1]
    assert images.shape == (2 * count, 112, 112, 3) and people.dtype == np.int64
    assert (issame[0 : 2 * (count // 2) : 2] != issame[1::2]).all()
    assert 0 < issame[0::2].sum() < len(issame[0::2])  # and not simply in turn
    again, _ = synthetic_pairs(10, seed=2, num_people=6)
    np.testing.assert_array_equal(again, images[:20])


def test_pairs_show_whom_they_say(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "vitface.data.synthetic.worlds.draw_photos", lambda kinds, *columns: drawn.update(columns=columns)
    )
    _, people = synthetic_pairs(400, seed=3, first_person=1000, num_people=20)
    np.testing.assert_array_equal(np.array(drawn["columns"][0]).reshape(-1, 2), people)
    assert set(people.flat) == set(range(1000, 1020))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(DataError, match="two people"):
        synthetic_pairs(10, num_people=1)
    with pytest.raises(DataError, match="0 people x 3 images"):
        SyntheticSamples(0, 3)
