"""Progressive resizing: a run whose first epochs see smaller images."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import SMALL, few_faces  # noqa: F401  # a fixture of small sets

import vitface
from vitface.config import Phase, TrainConfig, resolve
from vitface.errors import ConfigError
from vitface.model.positions import resample_rows
from vitface.store.faces import read_face_config
from vitface.training.loop import Trainer
from vitface.training.run import run
from vitface.training.setup import resolve_choices


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 9)), min_size=1, max_size=4), st.booleans())
def test_phases_end_where_their_epochs_do(phases, last_is_given):
    text = ",".join(f"{16 * side}:{epochs}" for side, epochs in phases)
    text = text if last_is_given else text.rpartition(":")[0]
    config = TrainConfig(backbone="vit_nano", image_size=text, epochs=sum(epochs for _, epochs in phases))
    ends = itertools.accumulate(epochs for _, epochs in phases)
    assert config.phases == [Phase(16 * side, end) for (side, _), end in zip(phases, ends, strict=True)]
    assert config.side == 16 * phases[-1][0]


@pytest.mark.parametrize(
    ("sizes", "epochs", "said"),
    [
        ("64:6,112", 6, "each size at least one of the 6 --epochs"),
        ("64:2,112:5", 6, "each size at least one of the 6 --epochs"),
        ("64:0,112", 6, "each size at least one"),
        ("64:2,112:0", 6, "SIDE:EPOCHS,...,SIDE such as 64:6,112"),
        ("64,112", 6, "SIDE:EPOCHS,...,SIDE such as 64:6,112"),
        ("64:2;112", 6, "SIDE:EPOCHS,...,SIDE such as 64:6,112"),
        ("٦٤:2,112", 6, "SIDE:EPOCHS,...,SIDE such as 64:6,112"),
        ("60:2,112", 6, "60 is not a multiple of the patch size 16; use 48 or 64"),
        ("64:2,2048", 6, "at most 1024, not 2048"),
        ("-64", 6, "SIDE:EPOCHS"),
    ],
)
def test_sizes_that_cannot_be(sizes, epochs, said):
    with pytest.raises(ConfigError, match="(?s)image.size.*") as raised:
        TrainConfig(backbone="vit_nano", image_size=sizes, epochs=epochs)
    assert said in str(raised.value)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 3), st.integers(0, 99))
def test_a_resampled_head_says_of_even_tokens_what_it_said(old, new, places, seed):
    """Tokens that are alike at all patches: the sum over them, and so the embedding, stays. Moments stay values."""
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, (places + old * old) * 3)))
    cls, patch = torch.randn(places, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def of(rows, grid):
        return rows @ torch.cat([cls, patch.expand(grid * grid, 3)]).flatten()

    torch.testing.assert_close(of(resample_rows(rows, places, 3, new, of_map=True), new), of(rows, old))
    ones = resample_rows(torch.ones_like(rows), places, 3, new)
    torch.testing.assert_close(ones, torch.ones(2, (places + new * new) * 3, dtype=torch.float64))
    same = resample_rows(rows, places, 3, old, of_map=True)
    torch.testing.assert_close(same, rows)


def test_a_grown_model_is_the_old_one_at_another_size(few_faces):  # noqa: F811
    """Adapters, head and moments stay, but for what the head holds for each patch; the margin is the same object."""
    trainer = Trainer(resolve_choices(resolve({**SMALL, "image_size": "32:1,64:1,48", "epochs": 3})), None)
    assert (trainer.model.config.image_size, list(trainer.seconds)) == (32, [48, 64, 32])
    batches = trainer._batches()
    trainer._step(batches)
    batches.close()
    before, model, progress = trainer.state.tensors(), trainer.model.state_dict(), trainer.state.progress
    margin = trainer.margin
    trainer._grow(64)
    assert trainer.model.config.image_size == trainer.model.vit.image_size == 64
    assert trainer.state.progress is progress and trainer.state.margin is trainer.margin is margin
    now = trainer.model.state_dict()
    assert {name for name in now if now[name].shape != model[name].shape} == {"head.proj.weight", "vit.pos_embed"}
    assert all(torch.equal(now[name], model[name]) for name in now if now[name].shape == model[name].shape)
    assert now["head.proj.weight"].shape == (16, 17 * 32)
    torch.testing.assert_close(now["head.proj.weight"].sum(1), model["head.proj.weight"].sum(1))
    moments = trainer.state.tensors()
    changed = [name for name in moments if moments[name].shape != before[name].shape]
    assert len(changed) == 2 and all(torch.equal(moments[n], before[n]) for n in moments if n not in changed)
    assert all(moments[name].abs().max() > 0 for name in changed)
    first, image = trainer.trained[0], torch.zeros(2, 3, 64, 64)
    trainer.model(image).embedding.sum().backward()
    assert first.grad is not None  # the new model's parameters are those that are trained


def test_the_header_estimates_each_phase(tmp_path, capsys, few_faces):  # noqa: F811
    run(resolve({**SMALL, "image_size": "32:1,64", "save_dir": str(tmp_path / "run")}))
    printed = capsys.readouterr().out
    assert re.search(r"estimated time: \d+ s for 2 steps at 32 px \(.*\), \d+ s for 2 steps at 64 px \(", printed)
    assert read_face_config(tmp_path / "run" / "checkpoints" / "last").image_size == 64
    assert vitface.load(tmp_path / "run").embed(np.zeros((1, 112, 112, 3), np.uint8)).shape == (1, 16)
    run(resolve({**SMALL, "image_size": "32:1,64", "dry_run": True}))
    assert "2 steps at 32 px" in capsys.readouterr().out
