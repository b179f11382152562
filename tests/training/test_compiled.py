"""--compile: model and loss as one graph, and runs that learn what eager ones learn."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_face
from ranks import in_ranks

from vitface.config import resolve
from vitface.model.margin import MarginLoss, make_margin
from vitface.training.batches import Batch
from vitface.training.run import run
from vitface.training.runs.resume import configure
from vitface.training.step import total_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "reliability"))

from tiny import TINY, use_tiny


@pytest.mark.parametrize(("kind", "domains"), [("cosface", 1), ("adaface", 3)])
def test_model_and_margin_are_one_graph(kind, domains):
    model, margin = tiny_face(num_domains=domains).train(), MarginLoss(make_margin(kind, 0.35), 7, 8, 64.0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (4,), generator=generator)
    batch = Batch(torch.randn(4, 3, 32, 32, generator=generator), labels, labels % 3, np.arange(4))
    state = {name: buffer.clone() for name, buffer in [*model.named_buffers(), *margin.named_buffers()]}
    config, found = resolve({"use_dalora": domains > 1}), []
    torch.compiler.reset()
    for losses in (total_loss, torch.compile(total_loss, backend="aot_eager", fullgraph=True)):
        for name, buffer in [*model.named_buffers(), *margin.named_buffers()]:
            buffer.copy_(state[name])
        parts = losses(model, margin, batch, config)
        parts["loss"].backward()
        gradients = [p.grad for p in [*model.parameters(), *margin.parameters()] if p.grad is not None]
        found.append([*(part.detach() for part in parts.values()), *gradients])
        model.zero_grad(), margin.zero_grad()
    assert len(found[0]) > 4 + 3 * (domains > 1)
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def losses_of(run_dir, world, **changes):
    """The mean loss of each epoch of a tiny run on so many ranks."""

    def act(number):
        use_tiny(pytest.MonkeyPatch())
        run(configure({**TINY, "save_dir": str(run_dir), **changes}))

    assert in_ranks(world, act) == [0] * world
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "holdout_auc" in row]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks, and torch's own in its compiler
@pytest.mark.parametrize(("changes", "world"), [({}, 1), ({"partial_fc": 0.5}, 2), ({"grad_accum": 2}, 2)], ids=str)
def test_a_compiled_run_learns_what_an_eager_one_learns(tmp_path, world, changes):
    eager, compiled = (losses_of(tmp_path / str(on), world, compile=on, **changes) for on in (False, True))
    assert len(eager) == 3 and compiled == pytest.approx(eager, rel=1e-4)
    assert compiled != eager  # by its last digits: it was compiled
