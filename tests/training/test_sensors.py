"""Training on images as sensors give them: which images a step sees, and their known domains."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vitface.config import resolve
from vitface.data.augment import augment, plan, uniforms
from vitface.data.degrade import degrade, draw, parse_sensors
from vitface.data.loader import epoch_order
from vitface.data.preprocess import to_float
from vitface.errors import ConfigError
from vitface.training import estimate, setup
from vitface.training.loop import Trainer
from vitface.training.step import total_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "reliability"))
from tiny import TINY, Faces, use_tiny


@pytest.fixture
def trainer(monkeypatch):
    use_tiny(monkeypatch)
    return lambda **changes: Trainer(setup.resolve_choices(resolve({**TINY, "seed": 5, **changes})), None)


@pytest.mark.parametrize("known", [True, False])
def test_the_step_that_warms_up_has_domains_as_the_others(trainer, monkeypatch, known):
    """Else --compile would make a second graph in the first step."""
    seen = []

    def spy(model, margin, batch, config):
        seen.append(batch.domains)
        return total_loss(model, margin, batch, config)

    monkeypatch.setattr(estimate, "total_loss", spy)
    settings = {"degrade": "nir:30,blur:2", "domain_labels": None if known else "none"}
    run = trainer(use_dalora=True, num_domains=3, router_depth=1, **settings)
    assert run.data.labelled == known == (next(run._batches()).domains is not None)
    assert len(seen) == 2 and all((domains is not None) == known for domains in seen)


def test_a_step_sees_the_images_degraded_then_augmented_and_knows_their_sensors(trainer):
    run = trainer(degrade="nir:30")
    batch = next(run._batches())
    indices = run.data.split.indices[epoch_order(32, 5, 0)[:8]]
    crops = to_float(torch.from_numpy(np.stack([Faces().read(int(i)) for i in indices])))
    drawn = draw(parse_sensors("nir:30"), 5, 0, indices)
    expected = run.model.preprocess(augment(degrade(crops, drawn), plan(uniforms(5, 0, indices)), "strong"))
    torch.testing.assert_close(batch.images, expected)
    assert batch.domains is not None and batch.domains.tolist() == drawn.kinds.tolist()
    assert set(drawn.kinds) == {0, 1}
    losses = run.losses(run.forward, run.margin_forward, batch, run.config)
    assert losses["domain_loss"] > 0


@pytest.mark.parametrize(
    "changes", [dict(use_dalora=False), dict(num_domains=3), dict(domain_labels="none"), dict(degrade=None)]
)
def test_sensors_are_domains_only_if_there_are_as_many_and_they_are_wanted(trainer, changes):
    assert next(trainer(**{"degrade": "nir:30", **changes})._batches()).domains is None


def test_training_learns_on_degraded_images(trainer):
    run = trainer(degrade="all", num_domains=5, epochs=1)
    run.fit(None)
    assert run.state.progress.finished and np.isfinite(run.state.progress.best_auc)


def test_a_sensor_that_is_none_is_said_with_all_other_mistakes(tmp_path):
    config = resolve({"degrade": "fog", "train_data": str(tmp_path / "none"), "weights": "random"})
    with pytest.raises(ConfigError, match=r"unknown kind 'fog'(.|\n)*does not exist"):
        setup.open_inputs(config)
