"""docs/how_it_works.md says no number that the code does not: all are computed here and in claims_of_a_photo.py.

A claim is a template that holds no number of its own, filled with values; the page must hold the result, whatever its
line breaks. A number on the page that no claim covers is an error too, so the page cannot outgrow its test.
"""

import dataclasses
import functools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from claims_of_a_photo import NUMBER, SECTIONS, adapter_count, bare, count, model, say, shapes

from vitface.config import TrainConfig, resolve, to_flag
from vitface.data.preprocess import to_float
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.evaluation.benchmarks import BENCHMARKS
from vitface.evaluation.protocol import THRESHOLDS, pair_distance, verify
from vitface.evaluation.statistics import accuracy_interval
from vitface.metrics import auc, contiguous_folds
from vitface.model.counts import parameter_counts
from vitface.model.lora import adapter_state_dict, lora_scaling
from vitface.model.margin import MarginLoss, make_margin
from vitface.model.ops import lora_linear
from vitface.model.router import load_balance_loss, subsample_patches
from vitface.training.batches import Batch
from vitface.training.loss_scale import LossScale
from vitface.training.setup import build_model
from vitface.training.step import DOMAIN_LOSS_WEIGHT, make_optimizer, schedule, set_rates, total_loss, update

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
PAPER = re.compile(r"arXiv:\d{4}\.\d{5}")
RECORDED = resolve({"exp": "exp_003"})
sys.path.insert(0, str(ROOT / "benchmarks"))  # for the count of multiply-adds
PEOPLE = 10_572  # in CASIA-WebFace, which the recorded experiments trained on


def problems(page: str, claims: list[str]) -> list[str]:
    """The claims that the page does not make (in their order), and its numbers that are part of no claim."""
    page = PAPER.sub(lambda match: " " * len(match[0]), page)
    covered, position, found = set(), 0, []
    for claim in claims:
        match = re.compile(r"\s+".join(map(re.escape, claim.split()))).search(page, position)
        if match is None:
            found.append(f"after line {page.count(chr(10), 0, position) + 1} the page must say: {claim}")
        else:
            covered.update(range(*match.span()))
            position = match.end()
    return found + [
        f"line {page.count(chr(10), 0, number.start()) + 1}: no claim covers {number[0]}"
        for number in NUMBER.finditer(page)
        if not covered.issuperset(range(*number.span()))
    ]


def cosface(cosines: list[float], scale: float, margin: float, people: int = 2) -> float:
    """The loss of one embedding with these cosines to person 0 and person 1, and 0 to everybody else."""
    loss = MarginLoss(make_margin("cosface", margin), people, 4, scale)
    loss.weight.data = torch.eye(4)[torch.arange(people).clamp(max=2)]
    rest = math.sqrt(1 - sum(cosine**2 for cosine in cosines))
    return loss(torch.tensor([[*cosines, 0.0, rest]]), torch.tensor([0])).item()


def fresh_cosface(scale: float, margin: float) -> float:
    """The mean loss of random embeddings, drawn apart from the matrix, before the first step."""
    size, generator = TrainConfig().embedding_dim, torch.Generator().manual_seed(1)
    loss = MarginLoss(make_margin("cosface", margin), PEOPLE, size, scale)
    labels = torch.randint(PEOPLE, (512,), generator=generator)
    with torch.no_grad():
        return loss(torch.randn(512, size, generator=generator), labels).item()


def lora() -> list[str]:
    face = model(exp="exp_001")
    counts, recorded = parameter_counts(face), resolve({"exp": "exp_001"})
    attn = face.vit.blocks[0].attn
    (rank, width), outputs = attn.qkv.lora_a.shape, attn.qkv.lora_b.shape[0]
    adapters = adapter_state_dict(face.vit)
    qkv, proj = (layer.lora_a.numel() + layer.lora_b.numel() for layer in (attn.qkv, attn.proj))
    total, trained = counts["all"]
    scalings = [lora_scaling(formula, recorded.lora_alpha, r) for r in (rank, 48) for formula in ("lora", "rslora")]
    assert counts["adapters"][0] == attn.qkv.weight.numel() == outputs * width == counts["adapters"][1]
    assert not any(tensor.any() for name, tensor in adapters.items() if name.endswith("lora_b"))
    assert face.config.lora_scaling == "lora"
    return [
        say("moments for {:,} parameters", counts["backbone"][0]),
        say("A ({}, {}), B ({}, {}) for qkv", rank, width, outputs, rank),
        say("{} × {} = {:,} entries", outputs, width, outputs * width),
        say("rank {} at most, and {} · ({} + {}) = {:,} numbers", rank, rank, width, outputs, qkv),
        say("a proj has {:,}, and all {} adapters", proj, len(adapters) // 2),
        say("of the {} blocks have {:,}", len(face.vit.blocks), counts["adapters"][0]),
        say("head {:,} parameters are trained, {:.2f} % of the {:,}", trained, 100 * trained / total, total),
        say("MLPs too: {:,} adapter", adapter_count("dinov2_vits14", rank, "attn+mlp")),
        say("B = {}. So B A = {}, and at step {}", 0, 0, 0),
        say("α = {:.0f} they are {:.2f} and {:.2f} at r = {},", recorded.lora_alpha, *scalings[:2], rank),
        say("{:.2f} and {:.2f} at r = {}", *scalings[2:], 48),
    ]


def dalora() -> list[str]:
    seen, face, config = shapes(), model(exp="exp_003"), TrainConfig()
    counts, domains, depth = parameter_counts(face), face.config.num_domains, len(face.vit.blocks)
    qkv, (passes,), logits = face.vit.blocks[0].attn.qkv, seen["passes"], [1.0, 0.0, -1.0]
    stacked, rank = qkv.lora_a.shape[0], face.config.lora_rank
    adapters, router, head = (counts[part][1] for part in ("adapters", "router", "head"))
    single = adapter_count("dinov2_vits14", rank)
    even, collapsed = (
        load_balance_loss(row[None]) for row in (torch.full((domains,), 1 / domains), torch.eye(domains)[0])
    )
    tokens = seen["vit.blocks.0"][1]
    thin = subsample_patches(torch.zeros(1, tokens, 1), prefix=1).shape[1]
    wide = 48  # the rank and the alpha of the control
    assert lora_scaling(face.config.lora_scaling, wide, wide) == qkv.scaling
    assert adapter_count("dinov2_vits14", wide) == adapters and adapters + router + head == counts["all"][1]
    return [
        say("K = {} pairs", domains),
        say("A ({}, {}), B ({}, {})", *qkv.lora_a.shape, *qkv.lora_b.shape),
        say("{} · {} = {},", domains, stacked // domains, stacked),
        say("repeated {} times", rank),
        say("runs these {} tokens", thin),
        say("first {} blocks", passes - depth),
        say("the {} patch tokens", thin - 1),
        say("MLP {} -> {} -> {} with softmax", *reversed(face.router.fc1.weight.shape), seen["router"][1]),
        say("logits {:.0f}, {:.0f}, {:.0f} give the weights", *logits),
        say("{:.3f}, {:.3f}, {:.3f}", *torch.tensor(logits).softmax(0)),
        say(
            "{} block passes for {}, but {} of them with {} tokens for {}", passes, depth, passes - depth, thin, tokens
        ),
        say("an extra {:.3f} of a forward", (passes - depth) * thin / (depth * tokens)),
        say("{} · {:,} = {:,}, router {:,}", adapters // single, single, adapters, router),
        say("head {:,}, together {:,}", head, counts["all"][1]),
        say("rank {}, α = {} (so s = {:.2f} as before)", wide, wide, qkv.scaling),
        say("weights of {}/{} each are exactly rank {}", 1, domains, stacked),
        say("({:.0f} when all {} are used alike, {:.0f} when", even.abs(), domains, collapsed),
        say("weight {})", config.balance_loss_weight),
        say("weight {})", DOMAIN_LOSS_WEIGHT),
    ]


def cosface_section() -> list[str]:
    config = TrainConfig()
    s, m, size = config.scale, config.margin, config.embedding_dim
    right, other, clear = 0.6, 0.3, 0.75
    matrix = MarginLoss(make_margin("cosface", m), PEOPLE, size, s).weight.numel()
    chance = cosface([0, 0], s, m, PEOPLE)
    return [
        say("for {:,} people a matrix of {:,} × {} = {:,}", PEOPLE, PEOPLE, size, matrix),
        say("s = {:.0f}, m = {}", s, m),
        say("end at {}, which is nothing to a softmax over {:,} people", 1, PEOPLE),
        say("ln {:,} = {:.2f}", PEOPLE, cosface([0, 0], 1, 0, PEOPLE)),
        say("(cosine {}, all others {}) still {:.2f}", 1, 0, cosface([1, 0], 1, 0, PEOPLE)),
        say("With s = {:.0f} it costs {:.2f}", s, cosface([1, 0], s, 0, PEOPLE)),
        say("cosines {:.2f} (right) and {:.2f}", right, other),
        say("the loss is {:.2f}", cosface([right, other], s, 0)),
        say("{:.2f} - {} = {:.2f} has to beat {:.2f}", right, m, right - m, other),
        say("logits {:.1f} and {:.1f}", s * (right - m), s * other),
        say("ln({} + e^{:.1f}) = {:.2f}", 1, s * (other - right + m), cosface([right, other], s, m)),
        say("at a cosine of {} the loss is {:.4f}", clear, cosface([clear, other], s, m)),
        say("All cosines {}: ln({} + {:,} · e^{:.1f}) = {:.2f}", 0, 1, PEOPLE - 1, s * m, chance),
        say("where {:.1f} = {:.0f} · {}", s * m, s, m),
        say("near {:.1f}; the fall to {:.2f}", fresh_cosface(s, m), chance),
        say("near {:.1f} says", fresh_cosface(s, 0)),
    ]


def one_step() -> list[str]:
    """The first step of the demo, by the code that trains, and the steps of exp_003."""
    photos, people, epoch = 64, 32, 59
    config = dataclasses.replace(resolve({"exp": "demo"}), device="cpu", dtype="fp32")
    face, samples = build_model(config), SyntheticSamples(people, photos // people)
    margin = MarginLoss(make_margin(config.loss, config.margin), 190, config.embedding_dim, config.scale)
    images = face.preprocess(to_float(torch.from_numpy(samples.render(np.arange(photos)))))
    batch = Batch(images, torch.from_numpy(samples.labels), torch.from_numpy(samples.domains), samples.labels)
    optimizer, b = make_optimizer(face, margin, config), face.vit.blocks[-1].attn.qkv.lora_b
    factor, before = schedule(0, config.epochs * epoch, epoch), b[0, 0].item()
    set_rates(optimizer, factor)
    losses = total_loss(face, margin, batch, config)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    _, norm, _ = update(optimizer, losses["loss"], trained, config.clip_grad, LossScale(False, torch.device("cpu")))
    shrunk = config.clip_grad / norm.item()
    steps, batch_size, epochs = 494_149 // RECORDED.batch_size, RECORDED.batch_size, RECORDED.epochs
    return [
        say("on {} photos of {} people and in float{}", photos, people, 8 * images.element_size()),
        say("b = {:.0f}.", before),
        say("a loss of {:.2f}: CosFace {:.2f}", losses["loss"], losses["margin_loss"]),
        say(
            "{} times the load balance {:.2f}, and {}",
            config.balance_loss_weight,
            losses["balance_loss"],
            DOMAIN_LOSS_WEIGHT,
        ),
        say("times the domains' cross-entropy {:.2f}", losses["domain_loss"]),
        say("That of b is {:.5f}", b.grad[0, 0].item() / shrunk),
        say("a vector of length {:.1f}; more than `--clip-grad` {:.0f}", norm, config.clip_grad),
        say("{:.0f} / {:.1f} = {:.3f}", config.clip_grad, norm, shrunk),
        say("{} · {}/{:.0f}, as it warms up over {:.0f} steps: b", config.lr, 1, 1 / factor, 1 / factor),
        say("= {:.6f}.", b[0, 0].item()),
        say("a loss of {:.2f}.", total_loss(face, margin, batch, config)["loss"]),
        say("{:,} images. At {} a step that is {:,} steps an epoch", 494_149, batch_size, steps),
        say("{:,} in the {} epochs", epochs * steps, epochs),
    ]


def read(page: str, pattern: str) -> list[str]:
    """The numbers that another page gives, where they were measured."""
    (found,) = set(re.findall(pattern, (ROOT / page).read_text(encoding="utf-8")))
    return [found] if isinstance(found, str) else [*found]


def trust() -> list[str]:
    results = "docs/results.md"
    lora = read(results, r"The mean is \*\*(\S+) ± (\S+)\*\* after")
    gain = read(results, r"After 20 epochs \(.*?\) it is (\S+) \((\S+) to (\S+)\) above LoRA")
    frozen, demo = read(results, r"\| 160 \| fp32 \| (\S+) ±"), read(results, r"\| frozen, raw CLS \| (\S+) ±")
    adapted, people = read(results, r"\| adapted \| (\S+) ±"), read(results, r"## ViT-Ti on (\d+) people: LFW")
    return [
        say("at step {}", 0),
        say("from {} % to {} ± {} % by {} people's photos", *frozen, *lora, *people),
        say("from {} % to {} %", *demo, *adapted),
        say("{} points ({} to {})", *gain),
    ]


def times() -> list[str]:
    """Measured rates are read, predicted ones computed from the step's multiply-adds and the makers' TFLOP/s."""
    steps, size = 494_149 // RECORDED.batch_size * RECORDED.epochs, RECORDED.batch_size
    from flops import forward_and_step

    work = forward_and_step(model(exp="exp_001").config)[1]
    (rate,) = read("kernels/README.md", r"seconds 8`, with the loader \| ([\d,]+) img/s")
    (cpu,) = read("README.md", r"\*\*vitface\*\*, LoRA \| \S+ ± \S+ \| ([\d.]+) \|")
    (memory,) = read("kernels/README.md", r"peak memory of a step \| (\S+) GB")
    shares, hour, h100 = (0.2, 0.4), 3600, float(rate.replace(",", ""))

    def predicted(tera: int) -> tuple[float, ...]:
        rates = [share * tera * 1e12 / (2 * work) for share in shares]
        return *rates, *sorted(steps * size / each / hour for each in rates)

    row = "{} TFLOP/s: *predicted* | {:,.0f} to {:,.0f} | {:.1f} to {:.1f} hours"
    return [
        say("{:,} parameters", count(bare("clip_vitb16", 224))),
        say("{:,} steps of {} images, ViT-S/{} at {} pixels", steps, size, 14, 224),
        say("costs {:.1f} billion", work / 1e9),
        say("{} epochs", RECORDED.epochs),
        say("over {} seconds", 8),
        say("{} | {:.1f} hours", rate, steps * size / h100 / hour),
        say("{} images a step: measured | {} | {:.1f} days", 8, cpu, steps * size / float(cpu) / hour / 24),
        say(f"RTX {{}}, {row}", 4090, 165, *predicted(165)),
        say(row, 65, *predicted(65)),
        say("{:.0f} to {:.0f} % of", *(100 * share for share in shares)),
        say("reached {:.0f} % of its maker's {} TFLOP/s", 100 * 2 * work * h100 / 989e12, 989),
        say("takes {} GB", memory),
    ]


def verification() -> list[str]:
    pairs, share, distance = BENCHMARKS["lfw"].pairs, 0.9, 1.4
    folds = contiguous_folds(pairs)
    sizes = np.bincount(folds)
    correct, same = np.arange(pairs) % 10 < 10 * share, np.arange(pairs) % 20 < 10
    result = verify(np.where(correct == same, 0.5, 1.5), same, folds)  # every threshold between decides as `correct`
    low, high = accuracy_interval(result, seed=1)  # of 95 %; 1.96 · 0.387 = 0.76, and the draws leave ± 0.02
    error = 100 * correct.std() / math.sqrt(pairs)
    fold_error = 100 * correct[folds == 0].std() / math.sqrt(sizes[0])
    angle = math.acos(0.3)
    measured = pair_distance(np.array([[1.0, 0.0]]), np.array([[math.cos(angle), math.sin(angle)]]))[0]
    score, issame = np.array([0.8, 0.6, 0.3, 0.5, 0.1]), np.array([True] * 3 + [False] * 2)
    area = auc(score, issame)
    compared = issame.sum() * (~issame).sum()
    assert measured == pytest.approx(distance)
    return [
        say("{:.2f}, say, is a cosine of {:.2f}", measured, math.cos(angle)),
        say("{:,} pairs are cut in file order into {} folds of {}", pairs, len(sizes), sizes[0]),
        say("{} thresholds ({:.2f}, {:.2f}, ... {:.2f})", len(THRESHOLDS), *THRESHOLDS[[0, 1, -1]]),
        say("on {} folds, {:,} pairs, decides the {}th", len(sizes) - 1, pairs - sizes[0], len(sizes)),
        say("the {} test folds", len(sizes)),
        say("Same pairs {}, {}, {} against different pairs {}, {}:", *score),
        say("{:.0f} of {} comparisons are won, AUC {:.3f}", area * compared, compared, area),
        say("At {:.0f} % of {:,} pairs", 100 * share, pairs),
        say("√({} · {:.1f} / {:,}) = {:.2f} points", share, 1 - share, pairs, error),
        say("{} % interval ± {:.1f} points", 95, 100 * (high - low) / 2),
        say("deviation of one fold {:.2f} points", fold_error),
    ]


@functools.cache
def claims() -> list[str]:
    """Every number of the page, in its order."""
    sections = (*SECTIONS, lora, dalora, cosface_section, one_step, verification, trust, times)
    return [claim for section in sections for claim in section()]


def test_every_number_on_the_page_is_what_the_code_computes():
    found = problems(PAGE, claims())
    assert not found, "\n".join(found)


def test_any_wrong_number_is_noticed():
    assert problems(PAGE, claims()) == []
    numbers = list(NUMBER.finditer(PAPER.sub(lambda match: " " * len(match[0]), PAGE)))
    assert len(numbers) > 300
    for number in numbers:
        wrong = number[0][:-1] + str((int(number[0][-1]) + 1) % 10)
        found = problems(PAGE[: number.start()] + wrong + PAGE[number.end() :], claims())
        assert found, f"{number[0]} at {number.start()} could be {wrong}"
    longer = PAGE + "And seven more.\n"
    assert problems(longer, claims()) == [f"line {longer.count(chr(10))}: no claim covers seven"]


def test_a_uniform_gate_is_lora_of_rank_48():
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, weight, a, b = draw(2, 5, 8), draw(6, 8), draw(48, 8), draw(6, 48)
    uniform = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    gated = lora_linear(x, weight, None, a, b, 1.0, uniform)
    torch.testing.assert_close(gated, lora_linear(x, weight, None, a, b, 1 / 3), rtol=0, atol=1e-12)


def test_flags_and_papers_exist():
    flags = {to_flag(field.name) for field in dataclasses.fields(TrainConfig)}
    assert set(re.findall(r"`(--[\w-]+)", PAGE)) <= flags
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "vitface").rglob("*.py"))
    assert [paper for paper in PAPER.findall(PAGE) if paper not in sources] == []
