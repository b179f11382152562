import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from vitface.model.margin import MarginLoss, make_margin


def literal_loss(kind, embedding, weight, labels, margin, scale):
    """The papers' formulas, image by image, in float64 with angles from acos."""
    total = 0.0
    norms = embedding.double().norm(dim=1).clamp(1e-3, 100)
    for i, label in enumerate(labels.tolist()):
        cosines = F.normalize(weight.double(), dim=1) @ F.normalize(embedding[i].double(), dim=0)
        theta = torch.acos(cosines[label].clamp(-1, 1))
        if kind == "cosface":
            target = torch.cos(theta) - margin
        elif kind == "arcface":
            target = torch.cos(theta + margin)
            if theta + margin > math.pi:
                target = torch.cos(theta) - margin * math.sin(margin)
        else:
            quality = (0.333 * (norms[i] - 20) / (100 + 1e-3)).clamp(-1, 1)
            target = torch.cos((theta - margin * quality).clamp(1e-6, math.pi - 1e-6)) - margin * (1 + quality)
        logits = scale * cosines
        logits[label] = scale * target
        total += torch.logsumexp(logits, 0) - logits[label]
    return total / len(labels)


cases = st.tuples(st.integers(1, 6), st.integers(2, 7), st.integers(2, 9), st.integers(0, 100), st.floats(0.1, 50))


def make(kind, case, margin=0.35, scale=16.0):
    batch, people, dim, seed, size = case
    generator = torch.Generator().manual_seed(seed)
    loss = MarginLoss(make_margin(kind, margin), people, dim, scale, seed).eval()
    embedding = torch.randn(batch, dim, generator=generator) * size
    return loss, embedding, torch.randint(people, (batch,), generator=generator)


@pytest.mark.parametrize("kind", ["cosface", "arcface", "adaface"])
@given(case=cases)
def test_equals_the_papers_formula(kind, case):
    loss, embedding, labels = make(kind, case)
    expected = literal_loss(kind, embedding, loss.weight, labels, 0.35, 16.0)
    assert loss(embedding, labels).item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["cosface", "arcface", "adaface"])
@given(case=cases)
def test_without_margin_it_is_scaled_cross_entropy(kind, case):
    loss, embedding, labels = make(kind, case, margin=0.0)
    logits = 16.0 * F.normalize(embedding) @ F.normalize(loss.weight).T
    assert loss(embedding, labels).item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3, abs=1e-4)


@given(case=cases)
def test_larger_margins_cost_more_and_norms_do_not_matter(case):
    loss, embedding, labels = make("cosface", case)
    harder, _, _ = make("cosface", case, margin=0.5)
    assert harder(embedding, labels) > loss(embedding, labels)
    with torch.no_grad():
        before = loss(embedding, labels)
        loss.weight.mul_(7)
        torch.testing.assert_close(loss(3 * embedding, labels), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_gradients_against_float64(kind):
    loss, embedding, labels = make(kind, (5, 7, 9, 3, 2.0), scale=64.0)
    embedding.requires_grad_()
    loss(embedding, labels).backward()
    ours = embedding.grad.double(), loss.weight.grad.double()
    exact = [t.detach().double().requires_grad_() for t in (embedding, loss.weight)]
    literal_loss(kind, *exact, labels, 0.35, 64.0).backward()
    for got, want in zip(ours, exact, strict=True):
        assert (got - want.grad).norm() <= 1e-5 * want.grad.norm()


def test_adaface_averages_the_mean_and_the_deviation_of_the_norms():
    """Kim et al.'s algorithm: momentum 0.01, starting at 20 and 100; a margin that these change, and no gradient."""
    loss, embedding, labels = make("adaface", (5, 7, 9, 3, 8.0))
    mean, deviation = 20.0, 100.0
    for step in range(3):
        norms = (embedding * (step + 1)).double().norm(dim=1).clamp(1e-3, 100)
        mean, deviation = 0.99 * mean + 0.01 * norms.mean(), 0.99 * deviation + 0.01 * norms.std()
        loss.train()(embedding * (step + 1), labels)
        assert loss.margin.norm_mean.item() == pytest.approx(mean.item(), rel=1e-5)
        assert loss.margin.norm_std.item() == pytest.approx(deviation.item(), rel=1e-5)
    before = loss.margin.norm_mean.clone()
    loss.eval()(embedding, labels)
    assert torch.equal(loss.margin.norm_mean, before)


def test_adaface_takes_the_norms_as_constants():
    """Its gradients are those of the formula in float64 with the quality of the norms held fixed."""
    loss, embedding, labels = make("adaface", (5, 7, 9, 3, 2.0), scale=64.0)
    embedding.requires_grad_()
    loss(embedding, labels).backward()
    z, weight = (t.detach().double().requires_grad_() for t in (embedding, loss.weight))
    quality = (0.333 * (embedding.detach().double().norm(dim=1) - 20) / (100 + 1e-3)).clamp(-1, 1)
    cosine = F.normalize(z) @ F.normalize(weight).T
    rows = torch.arange(5)
    own = torch.cos(torch.acos(cosine[rows, labels]) - 0.35 * quality) - 0.35 * (1 + quality)
    F.cross_entropy(64.0 * cosine.index_put((rows, labels), own), labels).backward()
    for got, want in ((embedding.grad, z.grad), (loss.weight.grad, weight.grad)):
        assert (got.double() - want).norm() <= 1e-5 * want.norm()


def test_low_precision_embeddings_are_raised_to_float32():
    loss, embedding, labels = make("cosface", (4, 6, 8, 0, 1.0))
    rounded = embedding.bfloat16()
    assert torch.equal(loss(rounded, labels), loss(rounded.float(), labels))


def test_chance_loss_of_casia():
    """With cosines all zero, CosFace at s 64, m 0.35 and 10,572 people costs log(1 + 10571 e^22.4) = 31.67."""
    loss = MarginLoss(make_margin("cosface", 0.35), 10_572, 16, 64.0)
    with torch.no_grad():
        loss.weight[:, 8:] = 0
    embedding = torch.zeros(3, 16)
    embedding[:, 12] = 1.0
    assert loss(embedding, torch.tensor([0, 5, 10_571])).item() == pytest.approx(31.67, abs=0.01)


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="cosface, arcface, adaface"):
        MarginLoss(make_margin("triplet", 0.1), 3, 4, 1.0)
