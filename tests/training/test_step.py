"""The update: what it does with numbers that are not finite, and fp16's scaled loss."""

import contextlib

import numpy as np
import pytest
import torch

from vitface.config import resolve
from vitface.training import loss_scale
from vitface.training.batches import Ahead, Batch
from vitface.training.loss_scale import GROWTH, START, LossScale
from vitface.training.non_finite import NonFiniteError, diagnose, non_finite_error
from vitface.training.step import make_optimizer, set_rates, update

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def adamw(weight):
    return torch.optim.AdamW([weight], lr=0.1, fused=True)


def sgd(weight):
    return torch.optim.SGD([weight], lr=1.0, fused=True)


def test_an_update_clips_to_the_norm():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    loss = (weight * torch.tensor([30.0, 40.0])).sum()
    outcome = update(sgd(weight), loss, [weight], 5.0, LossScale(False, CPU))
    assert [part.item() for part in outcome] == pytest.approx([250, 50, 0])
    torch.testing.assert_close(weight.data, torch.tensor([0.0, 0.0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("slopes", [[NAN, 1.0], [INF, 1.0], [-INF, INF]])
def test_a_bad_step_changes_nothing(make, scaled, slopes):
    """AdamW's kernel reads the verdict from a tensor; other optimisers are not asked."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer, scale = make(weight), LossScale(scaled, CPU)
    update(optimizer, weight.square().sum(), [weight], 5.0, scale)
    optimizer.zero_grad()
    before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
    weight.register_hook(lambda gradient: gradient * torch.tensor(slopes))
    loss = weight.square().sum()
    outcome = update(optimizer, loss, [weight], 5.0, scale)
    assert outcome.bad == 1 and outcome.loss == loss and not outcome.norm.isfinite()
    for value, kept in zip([weight.detach(), *optimizer.state[weight].values()], before, strict=True):
        assert torch.equal(value, kept)
    modules = torch.nn.ModuleDict({"loss": torch.nn.ParameterList([weight])})
    where = {"step": 2, "skipped_before": 0}
    found = diagnose(where, torch.zeros(1), {"loss": loss.item()}, outcome.norm.item(), modules)
    assert found["fault"] == "gradient"
    message = f"^step 2: loss {loss.item()}, gradient norm {outcome.norm.item()}: stopped before the update"
    with pytest.raises(NonFiniteError, match=message):
        raise non_finite_error(found, None)


def test_a_loss_that_is_not_finite_is_bad_though_its_gradient_is():
    weight = torch.nn.Parameter(torch.ones(2))
    assert update(adamw(weight), weight.sum() + INF, [weight], 5.0, LossScale(False, CPU)).bad == 1
    assert torch.equal(weight.data, torch.ones(2))


def test_the_update_is_that_of_torch_without_a_scale():
    """Ten steps, with clipping: bit for bit what torch's own functions do one after the other."""
    generator = torch.Generator().manual_seed(0)
    start, data = torch.randn(6, generator=generator), torch.randn(10, 6, generator=generator)
    runs = []
    for own in (True, False):
        weight = torch.nn.Parameter(start.clone())
        optimizer = adamw(weight)
        for row in data:
            optimizer.zero_grad()
            loss = (weight * row).exp().sum()
            if own:
                update(optimizer, loss, [weight], 2.0, LossScale(False, CPU))
            else:
                loss.backward()
                torch.nn.utils.clip_grad_norm_([weight], 2.0)
                optimizer.step()
        runs.append(weight.detach())
    assert torch.equal(*runs)


def test_the_scale_follows_torch(monkeypatch):
    """A random row of overflows against `torch.amp.GradScaler`, which is shown a gradient for each."""
    monkeypatch.setattr(loss_scale, "GROWTH", 5)
    theirs = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=5)
    ours, weight = LossScale(True, CPU), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    bad = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.15
    scales = set()
    for skipped in bad:
        assert ours(torch.ones(())) == theirs.scale(torch.ones(()))
        weight.grad = torch.tensor([INF if skipped else 1.0])
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(skipped.float())
        assert ours.scale == theirs.get_scale() and ours.held == theirs._get_growth_tracker()
        scales.add(ours.scale.item())
    assert len(scales) > 4 and max(scales) > START > min(scales)
    assert torch.amp.GradScaler("cpu").get_growth_interval() == GROWTH


def test_a_scaled_step_is_the_plain_one_and_keeps_small_gradients():
    """In fp16 a gradient of 1e-9 is zero; scaled it is not. A power of two changes no bit of what float32 holds."""
    found = {}
    for scaled in (False, True):
        weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = adamw(weight)
        update(optimizer, 1e-9 * weight.half().sum().float(), [weight], 5.0, LossScale(scaled, CPU))
        found[scaled] = weight.grad.clone()
        plain = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        update(adamw(plain), plain.square().sum(), [plain], 5.0, LossScale(scaled, CPU))
        found[f"plain {scaled}"] = plain.detach()
    assert not found[False].any()
    torch.testing.assert_close(found[True], torch.tensor([1e-9, 1e-9]), rtol=1e-2, atol=0)
    assert torch.equal(found["plain False"], found["plain True"])


def test_learning_rates_are_a_factor_of_their_peaks():
    config = resolve({"lr": 1e-3, "identity_lr": 1e-2, "device": "cpu"})
    optimizer = make_optimizer(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), config)
    for factor in (0.5, 0.1):
        set_rates(optimizer, factor)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * factor, 1e-3 * factor, 1e-2 * factor])


class Queued:
    """A tensor that notes the streams that use it."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream)


def test_the_next_batch_is_prepared_on_a_stream_of_its_own(monkeypatch):
    """With stand-ins for CUDA's streams; on a CPU nothing is read before it is asked for."""
    made, current = [], ["main"]

    def batches():
        for number in range(3):
            made.append((number, current[-1]))
            yield Batch(Queued(), Queued(), None, np.array([number]))

    class Stream:
        def __init__(self, device):
            self.device = device

    class Main:
        def __init__(self):
            self.waited_for = []

        def wait_stream(self, stream):
            self.waited_for.append(stream)

    @contextlib.contextmanager
    def use(stream):
        current.append("side")
        yield
        current.pop()

    main = Main()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    ahead = Ahead(batches(), torch.device("cuda:0"))
    first = next(ahead)
    assert made == [(0, "side")] and first.people == [0] and main.waited_for == [ahead.stream]
    assert first.images.streams == first.labels.streams == [main]
    ahead.prepare()
    ahead.prepare()
    assert made == [(0, "side"), (1, "side")]
    assert [batch.people[0] for batch in ahead] == [1, 2]
    ahead.prepare()
    made.clear()
    plain = Ahead(batches(), CPU)
    plain.prepare()
    assert made == [] and next(plain).people == [0] and made == [(0, "main")]
