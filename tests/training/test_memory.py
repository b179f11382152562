import dataclasses

import pytest
import torch
from conftest import randomise_adapters, tiny_face

from vitface.config import resolve
from vitface.errors import ConfigError
from vitface.model.lora import Mix
from vitface.model.margin import MarginLoss, make_margin
from vitface.training.memory import GB, bytes_of_a_person, plan_memory
from vitface.training.setup import build_margin, build_model

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CHANGES = [{}, {"num_domains": 3}, {"head": "patches", "head_levels": 2}, {"lora_targets": "attn+mlp"}]


def setup(people=5, kind="cosface", **changes):
    model = tiny_face(**changes).train()
    randomise_adapters(model)
    return model, MarginLoss(make_margin(kind, 0.35), people, 8, 64.0)


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_predicts_what_a_step_of_another_batch_saves(changes, recomputed):
    """An independent count: the tensors that saving hooks and checkpoints hold, made visible by keeping them."""
    model, margin = setup(**changes)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plans = [plan_memory(model, margin, len(IMAGES), None)]
    while plans[-1].recomputed < 2:
        plans.append(plan_memory(model, margin, len(IMAGES), (plans[-1].total - 1) / GB))
    assert [plan.recomputed for plan in plans] == [0, 1, 2]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())  # no trace of a probe
    parameters = [*model.parameters(), *margin.parameters()]
    prototypes = margin.weight.nbytes + len(margin.weight) * 4  # as unit vectors, and their lengths
    expected = sum(p.nbytes * (4 if p.requires_grad else 1) for p in parameters) + prototypes
    assert plans[0].constant == pytest.approx(expected, abs=100)

    kept, entries = [], []
    model.vit.recompute(recomputed)
    addresses = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for block in model.vit.blocks[:recomputed]:
        block.register_forward_pre_hook(lambda _, inputs: entries.append(inputs[0].nbytes))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        alive = model(IMAGES), margin(torch.zeros(len(IMAGES), 8, requires_grad=True), torch.zeros(len(IMAGES)).long())
    addresses.add(margin.weight.untyped_storage().data_ptr())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    saved = sum(size for address, size in storages.items() if address not in addresses) + sum(entries) - prototypes
    del alive
    model.vit.recompute(0)
    at_work = 2 * block_bytes(model, changes)
    assert plans[recomputed].per_image * len(IMAGES) == pytest.approx(saved + at_work, rel=0.03)


@pytest.mark.parametrize("kind", ["cosface", "adaface"])
def test_the_logits_of_many_people_are_in_the_plan(kind):
    """20,000 people: the softmax that is saved, 0.08 MB an image, outweighs this small model, and so do two more
    matrices of that size, the cosines and the logits, while the loss is computed."""
    model, margin = setup(people=20_000, kind=kind)
    state = {name: tensor.clone() for name, tensor in margin.state_dict().items()}
    few, many = (plan_memory(model, loss, 64, None) for loss in (setup(kind=kind)[1], margin))
    block = 2 * block_bytes(model, {}) // len(IMAGES)
    assert many.per_image - few.per_image + block == pytest.approx(3 * 20_000 * 4, rel=0.01)
    assert all(torch.equal(tensor, state[name]) for name, tensor in margin.state_dict().items())
    block_less = many.total - few.total + 64 * block  # 20,000 people outweigh the block at work, five do not
    assert block_less / 19_995 == pytest.approx(bytes_of_a_person(8, 64, sharded=False), rel=0.01)
    assert bytes_of_a_person(8, 64, sharded=True) == 4 * margin.weight[0].nbytes
    embedding, kept = torch.zeros(64, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        alive = margin(embedding, torch.zeros(64).long())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del alive
    measured = sum(storages.values()) - margin.weight.nbytes
    assert many.total - few.total >= measured + 3 * (margin.weight.nbytes - setup()[1].weight.nbytes)


def block_bytes(model, changes) -> int:
    """What one adapted block saves for IMAGES."""
    gate = torch.ones(len(IMAGES), 3) if "num_domains" in changes else None
    tokens, kept = model.vit.tokens(IMAGES).detach().requires_grad_(), []
    addresses = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        alive = model.vit.blocks[0](tokens, Mix(gate))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del alive
    return sum(size for address, size in storages.items() if address not in addresses)


@pytest.mark.parametrize("num_domains", [1, 3])
def test_recomputing_changes_no_bit(num_domains):
    results = []
    for recomputed in (0, 1, 2):
        model, margin = setup(num_domains=num_domains)
        model.vit.recompute(recomputed)
        loss = margin(model(IMAGES)[0], torch.arange(6) % 5)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_recomputing_runs_a_block_twice():
    model, margin = setup()
    model.vit.recomputed, runs = 1, []
    for block in model.vit.blocks:
        block.register_forward_pre_hook(lambda module, _: runs.append(module))
    margin(model(IMAGES)[0], torch.arange(6) % 5).backward()
    assert [list(model.vit.blocks).index(block) for block in runs] == [0, 1, 0]


def test_too_little_names_what_fits():
    model, margin = setup()
    everything = plan_memory(model, margin, 64, None).total
    with pytest.raises(ConfigError, match="--memory-budget .* would fit") as refusal:
        plan_memory(model, margin, 6400, everything / GB)
    fits = int(str(refusal.value).split("--batch-size ")[1].split()[0])
    assert plan_memory(model, margin, fits, everything / GB).recomputed == 2
    with pytest.raises(ConfigError, match="--memory-budget"):
        plan_memory(model, margin, fits + 1, everything / GB)
    with pytest.raises(ConfigError, match="no batch size fits"):
        plan_memory(model, margin, 64, 1e-6)


@pytest.mark.slow
def test_clip_at_batch_128_fits_8_gb():
    """The plan for ViT-B/16 on CASIA's 10,572 people; what autograd saves is measured on the real model."""
    config = resolve(dict(backbone="clip", weights="random", use_dalora=True, batch_size=128, memory_budget=8.0))
    config = dataclasses.replace(config, device="cpu", dtype="bf16")
    plan = plan_memory(build_model(config), build_margin(config, 10572), config.batch_size, config.memory_budget)
    assert plan.total <= 8 * GB
    assert plan.recomputed <= 6
