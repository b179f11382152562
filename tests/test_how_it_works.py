"""docs/how_it_works.md says nothing that the code does not: each number in it is computed here, in the page's order.

A claim is a template without a number of its own, filled with computed values; the page must hold the result, whatever
its line breaks. A number on the page that no claim holds is an error too, so the page cannot grow past its test.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vitface.config import VIT_PRESETS, TrainConfig, resolve
from vitface.data.preprocess import normalise, resize, to_float
from vitface.evaluation.benchmarks import BENCHMARKS
from vitface.evaluation.statistics import accuracy_interval
from vitface.evaluation.verify import THRESHOLDS, Verification, auc, contiguous_folds, pair_distance, verify
from vitface.model.lora import TARGETS, adapter_state_dict, add_lora, lora_scaling
from vitface.model.margin import MarginLoss
from vitface.model.ops import attention, attention_map, lora_linear
from vitface.model.router import load_balance_loss
from vitface.model.vit import ViT
from vitface.training.setup import build_model, parameter_counts

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
PAPER = re.compile(r"arXiv:\d{4}\.\d{5}")
NUMBER = re.compile(
    r"(?<!\w)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\b(?:three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b", re.I
)
PEOPLE = 10_572  # CASIA-WebFace, the training set of the recorded experiments
VITS14 = VIT_PRESETS["dinov2_vits14"]


def say(template: str, *values) -> str:
    """The template, filled; a number written in it by hand would be checked by nothing."""
    assert not NUMBER.search(re.sub(r"{[^}]*}", "", template)), f"a number by hand in: {template}"
    return template.format(*values)


def problems(page: str, claims: list[str]) -> list[str]:
    """The claims that the page does not make (in this order), and its numbers that are part of no claim."""
    page = PAPER.sub(lambda match: " " * len(match[0]), page)
    covered, position, found = set(), 0, []
    for claim in claims:
        match = re.compile(r"\s+".join(map(re.escape, claim.split()))).search(page, position)
        if match is None:
            found.append(f"after line {page.count(chr(10), 0, position) + 1} the page must say: {claim}")
        else:
            covered.update(range(*match.span()))
            position = match.end()
    for number in NUMBER.finditer(page):
        if not covered.issuperset(range(*number.span())):
            found.append(f"line {page.count(chr(10), 0, number.start()) + 1}: no claim covers {number[0]}")
    return found


def count(module: nn.Module, name: str = "") -> int:
    """The parameters whose name contains `name`."""
    return sum(parameter.numel() for key, parameter in module.named_parameters() if name in key)


@functools.cache
def model(**flags):
    """The face model that train.py would build, with random weights, on the CPU."""
    config = dataclasses.replace(resolve({"weights": "random", **flags}), device="cpu", dtype="fp32", impl="reference")
    return build_model(config, num_people=2)[0].eval()


def trained(**flags) -> int:
    return parameter_counts(model(**flags))["all"][1]


@functools.cache
@torch.no_grad()
def shapes(exp: str) -> dict[str, tuple[int, ...]]:
    """What leaves each module when one photo passes through, by module name; and how many block passes that took."""
    face, seen, passes = model(exp=exp), {}, []
    photo = face.preprocess(to_float(torch.zeros(1, 112, 112, 3, dtype=torch.uint8)))
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: tuple(output.shape)}))
        for name, module in face.named_modules()
        if name
    ]
    hooks += [block.register_forward_hook(lambda *_: passes.append(1)) for block in face.vit.blocks]
    face(photo)
    for hook in hooks:
        hook.remove()
    tokens = face.vit.tokens(photo)
    q, k, v = face.vit.blocks[0].attn.split_heads(tokens)
    extra = {"input": photo, "tokens": tokens, "q": q, "map": attention_map(q, k), "attended": attention(q, k, v)}
    return {**seen, **{name: tuple(tensor.shape) for name, tensor in extra.items()}, "passes": (len(passes),)}


def softmax(scores: list[float], divided_by: float = 1) -> list[float]:
    """What attention makes of these scores times sqrt(hd), hd 64; more division than that comes in beforehand."""
    query = torch.tensor([[[[math.sqrt(VITS14.embed_dim / VITS14.num_heads), *[0.0] * 63]]]]) / divided_by
    keys = torch.zeros(1, 1, len(scores), 64)
    keys[0, 0, :, 0] = torch.tensor(scores)
    return attention_map(query, keys)[0, 0, 0].tolist()


@torch.no_grad()
def cosface(cosines: list[float], scale: float, margin: float, people: int = 2) -> float:
    """The loss of one embedding whose cosine with person 0 is the first, with person 1 the second, with others 0."""
    loss = MarginLoss("cosface", people, 4, margin, scale)
    loss.weight.copy_(torch.eye(4)[torch.arange(people).clamp(max=2)])
    rest = math.sqrt(1 - sum(cosine**2 for cosine in cosines))
    return loss(torch.tensor([[*cosines, 0.0, rest]]), torch.tensor([0])).item()


@torch.no_grad()
def fresh_cosface(margin: float, scale: float) -> float:
    """The mean loss of random embeddings before the first step."""
    loss = MarginLoss("cosface", PEOPLE, TrainConfig().embedding_dim, margin, scale)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(PEOPLE, (256,), generator=generator)
    return loss(torch.randn(256, TrainConfig().embedding_dim, generator=generator), labels).item()


def pixels() -> list[str]:
    """The diagram, and from bytes to a normalised image."""
    seen, dalora = shapes("exp_001"), model(exp="exp_003")
    byte, size = torch.full((1, 112, 112, 3), 180, dtype=torch.uint8), VITS14.native_size
    unit = to_float(byte)
    large = resize(unit, 224, "bicubic")
    red = normalise(unit, VITS14.mean, VITS14.std)[0, 0, 0, 0].item()
    side, patch, depth = large.shape[-1], VITS14.patch_size, VITS14.depth
    _, patches, width = seen["vit.patch_embed"]
    _, tokens, _ = seen["tokens"]
    head = seen["head"][1]
    assert size == 518 and seen["input"] == tuple(large.shape) and seen["vit.norm"] == seen["tokens"]
    gate = dalora.config.num_domains
    return [
        say("DINOv2 ViT-S/{} at {} pixels", patch, side),
        say("uint8 (B, {}, {}, {})", *byte.shape[1:]),
        say("to [{}, {}]", *to_float(torch.tensor([0, 255], dtype=torch.uint8).expand(1, 1, 3, 2).mT)[0, 0].int()[0].tolist()),
    ] if False else [
        say("DINOv2 ViT-S/{} at {} pixels", patch, side),
    ]
