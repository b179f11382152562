"""What docs/how_it_works.md says of a photo's way through the frozen model, computed: claims in the page's order.

A claim is a template that holds no number of its own, filled with values; test_how_it_works.py has the other claims.
"""

import dataclasses
import functools
import math
import re

import numpy as np
import torch
from torch import nn

from vitface.config import TrainConfig, resolve
from vitface.data.images import CROP_SIZE
from vitface.data.preprocess import normalise, to_float
from vitface.evaluation.protocol import pair_distance
from vitface.model.face import BatchNormHead, LinearHead, PatchesHead
from vitface.model.lora import TARGETS, adapter_state_dict, add_lora
from vitface.model.ops import attention, attention_map, split_heads
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS
from vitface.training.setup import build_model

NUMBER = re.compile(
    r"(?<!\w)(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\b(?:three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b", re.I
)


def say(template: str, *values) -> str:
    """The template, filled. A number written into it by hand would be checked by nothing."""
    assert not NUMBER.search(re.sub(r"{[^}]*}", "", template)), f"a number by hand in: {template}"
    return template.format(*values)


@functools.cache
def model(**flags):
    """The face model that train.py would build, with random weights, on the CPU."""
    config = dataclasses.replace(resolve({"weights": "random", **flags}), device="cpu", dtype="fp32")
    return build_model(config).eval()


@functools.cache
@torch.no_grad()
def shapes() -> dict[str, tuple[int, ...]]:
    """What leaves each module of exp_003 when one photo passes through, by name, and the number of block passes."""
    face, seen, names = model(exp="exp_003"), {}, []

    def keep(name, output):
        names.append(name)
        seen[name] = output[0] if isinstance(output, tuple) else output

    modules = face.named_modules()
    hooks = [m.register_forward_hook(lambda _, __, output, name=name: keep(name, output)) for name, m in modules]
    photo = torch.zeros(1, CROP_SIZE, CROP_SIZE, 3, dtype=torch.uint8)
    image = face.preprocess(to_float(photo))
    face(image)
    for hook in hooks:
        hook.remove()
    attn = face.vit.blocks[0].attn
    qkv = attn.qkv(face.vit.tokens(image))
    attended = split_heads(torch.cat([attention(qkv, attn.num_heads)] * 3, dim=2), attn.num_heads)[0]
    q, weights = split_heads(qkv, attn.num_heads)[0], attention_map(qkv, attn.num_heads)
    seen.update(photo=photo, input=image, q=q, weights=weights, attended=attended)
    passes = sum(re.fullmatch(r"vit\.blocks\.\d+", name) is not None for name in names)
    return {**{n: tuple(x.shape) for n, x in seen.items() if isinstance(x, torch.Tensor)}, "passes": (passes,)}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def bare(name: str, side: int) -> ViT:
    """The backbone without an adapter and without values, which counting does not need."""
    with torch.device("meta"):
        return ViT(VIT_PRESETS[name], side)


def adapter_count(name: str, rank: int, targets: str = "attn") -> int:
    vit = bare(name, 224)
    with torch.device("meta"):
        add_lora(vit, TARGETS[targets], rank, alpha=1)
    return sum(tensor.numel() for tensor in adapter_state_dict(vit).values())


def attend(products: list[float], head_width: int) -> list[float]:
    """The attention weights of keys with these dot products with the query, in a head of this width."""
    qkv = torch.zeros(1, len(products), 3 * head_width)
    qkv[0, 0, 0], qkv[0, :, head_width] = 1, torch.tensor(products)
    return attention_map(qkv, 1)[0, 0, 0].tolist()


def the_whole_way() -> list[str]:
    seen, face = shapes(), model(exp="exp_003")
    vit, (_, channels, side, _) = face.config.vit, seen["input"]
    black_and_white = to_float(torch.tensor([[[[0, 0, 0], [255, 255, 255]]]], dtype=torch.uint8))
    tokens = seen["vit.blocks.0"][1:]
    return [
        say("DINOv2 ViT-S/{} at {} pixels", vit.patch_size, side),
        say("uint8 (B, {}, {}, {})", *seen["photo"][1:]),
        say("to [{:.0f}, {:.0f}], resize", *black_and_white[0, 0, 0]),
        say("float (B, {}, {}, {})", channels, side, side),
        say("patches of {} × {} pixels", vit.patch_size, vit.patch_size),
        say("patch tokens (B, {}, {})", *seen["vit.patch_embed"][1:]),
        say("tokens (B, {}, {}) ----> {} frozen blocks", *tokens, face.config.router_depth),
        say("gate (B, {})", seen["router"][1]),
        say("| {} blocks of attention", len(face.vit.blocks)),
        say("CLS (B, {}, {}), all that the last block computes", *seen["vit.norm"][1:]),
        say("embedding (B, {})", seen["head"][1]),
        say("sphere (B, {})", seen["head"][1]),
    ]


def pixels() -> list[str]:
    seen, vit, byte = shapes(), VIT_PRESETS["dinov2_vits14"], 180
    photo = torch.full(seen["photo"], byte, dtype=torch.uint8)
    unit = to_float(photo)
    red = normalise(unit, vit.mean, vit.std)[0, 0, 0, 0].item()
    _, channels, side, _ = seen["input"]
    return [
        say("{} × {} × {} = {:,} bytes", *photo.shape[1:], photo.nbytes),
        say("red is {} becomes {} / {} = {:.3f}", byte, byte, round(byte / unit[0, 0, 0, 0].item()), unit[0, 0, 0, 0]),
        say("to {} × {} × {} = {:,} numbers", side, side, channels, math.prod(seen["input"])),
        say(
            "squares of {} pixels: {} × {} of them at {} pixels", vit.patch_size, *[vit.grid(CROP_SIZE)] * 2, CROP_SIZE
        ),
        say("{} × {} at {}", vit.grid(side), vit.grid(side), side),
        say("({:.3f} - {}) / {} = {:.3f}", unit[0, 0, 0, 0], vit.mean[0], vit.std[0], red),
    ]


def tokens() -> list[str]:
    seen, vit = shapes(), model(exp="exp_003").vit
    config, weight, (rows, width) = vit.config, vit.patch_embed.proj.weight, vit.pos_embed.shape[1:]
    grid, patches = config.grid(vit.image_size), seen["vit.patch_embed"][1]
    names = ("vit_tiny_patch16", "dinov2_vits14", "clip_vitb16")
    large, small = ([bare(name, side) for name in names] for side in (vit.image_size, CROP_SIZE))

    def row(title: str, cell: str, of_one, models: list[ViT] = large, values: tuple = ()) -> str:
        """A line of the table: what `of_one` gives for each of the models, as `cell` writes it."""
        cells = " | ".join([cell] * len(models))
        return say(f"| {title} | {cells} |", *values, *(number for one in models for number in of_one(one)))

    return [
        say("into {} × {} = {} squares", grid, grid, patches),
        say("{} × {} × {} = {} numbers", *weight.shape[2:], weight.shape[1], weight[0].numel()),
        say("turns it into {}:", width),
        say("W ({}, {}), b ({})", width, weight[0].numel(), width),
        say("{} · {} + {} = {:,} parameters", width, weight[0].numel(), width, count(vit.patch_embed)),
        say("{} + {} = {} tokens", patches, vit.cls_token.shape[1], rows),
        say("({}, {}) is added", rows, width),
        say("on {} × {} patches, at {} pixels", *[config.grid(config.native_size)] * 2, config.native_size),
        say("to {} × {}.", grid, grid),
        say("| ViT-Ti/{} | DINOv2 ViT-S/{} | CLIP ViT-B/{} |", *(m.config.patch_size for m in large)),
        row("patch -> width D", "{} -> {}", lambda m: reversed(m.patch_embed.proj.weight.flatten(1).shape)),
        row("tokens at {} pixels", "{}", lambda m: [m.pos_embed.shape[1]], values=(vit.image_size,)),
        row("tokens at {} pixels", "{}", lambda m: [m.pos_embed.shape[1]], small, values=(CROP_SIZE,)),
        row("heads × head width", "{} × {}", lambda m: [m.config.num_heads, m.config.embed_dim // m.config.num_heads]),
        row("frozen parameters at {}", "{:,}", lambda m: [count(m)], values=(vit.image_size,)),
        say("| LoRA of rank {}, parameters | {:,} | {:,} | {:,} |", 16, *(adapter_count(name, 16) for name in names)),
    ]


def attention_section() -> list[str]:
    seen, raw, given = shapes(), [8, 0, -8], [3, 2, 1]
    width, wide = seen["vit.blocks.0"][2], seen["vit.blocks.0.attn.qkv"][2]
    _, heads, rows, head = seen["q"]
    root = math.isqrt(head)
    weights = attend(raw, head)
    divided = [round(product / root) for product in raw]
    products = [number for pair in zip(weights, given, strict=True) for number in pair]
    received = torch.tensor(weights) @ torch.tensor(given, dtype=torch.float)
    assert root**2 == head and seen["weights"][2:] == (rows, rows) and seen["attended"][2:] == (rows, head)
    return [
        say("{} -> {} = {} · {}", width, wide, wide // width, width),
        say("into {} heads", heads),
        say("(B, {}, {}, {})", heads, rows, head),
        say("√{}) v ({}, {}) times ({}, {})", head, rows, rows, rows, head),
        say("of the {} tokens; it sums to {}. The {} heads, {} · {} = {},", rows, 1, heads, heads, head, width),
        say("`proj`, {} -> {}", width, seen["vit.blocks.0.attn.proj"][2]),
        say("by √{} = {}?", head, root),
        say("{} entries of variance {} has variance {}, hence a typical size of {}", head, 1, head, root),
        say("Dot products {}, {} and {} become {}, {} and {}", *raw, *divided),
        say("weights {:.3f}, {:.3f}, {:.3f}.", *weights),
        say("Undivided they give {:.4f}, {:.4f}, {:.4f}:", *attend(raw, 1)),
        say("values are {}, {} and {}", *given),
        say("{:.3f} · {} + {:.3f} · {} + {:.3f} · {} = {:.3f}", *products, received),
        *dot_products(head, heads),
        *gradients(weights, given, received.item()),
    ]


def dot_products(head: int, heads: int) -> list[str]:
    query, keys = torch.tensor([1, 1]), torch.tensor([[1, 0], [1, -1], [-1, 0]])
    products, correction, before = keys @ query, 2.575, 10
    powers = products.double().exp()
    return [
        say("{} where they are unrelated", (torch.eye(2)[0] @ torch.eye(2)[1]).int()),
        say("query ({}, {}) the keys ({}, {}), ({}, {}) and ({}, {})", *query, *keys.flatten()),
        say("products {}, {} and {}.", *products),
        say("e^{}, e^{} and e^{} are {:.3f}, {:.0f} and {:.3f};", *products, *powers),
        say("sum, {:.3f}, they are {:.3f}, {:.3f} and {:.3f} again", powers.sum(), *powers / powers.sum()),
        say("weighted sum, {} numbers", head),
        say("sums of the {} heads", heads),
        say("correction of {} makes {} into {:.3f}", correction, before, before + correction),
    ]


def gradients(weights: list[float], given: list[int], received: float) -> list[str]:
    """How the received number changes with each value, and with each dot product."""
    products = torch.tensor(weights).log().requires_grad_()
    values = torch.tensor(given, dtype=torch.float, requires_grad=True)
    (products.softmax(0) @ values).backward()
    slopes = zip(weights, given, products.grad, strict=True)
    (first, second, third) = (say("{:.3f} · ({} - {:.3f}) = {:.3f}", w, v, received, slope) for w, v, slope in slopes)
    return [
        say("Say that the {:.3f} should be larger", received),
        say("slopes are {:.3f}, {:.3f} and {:.3f}.", *values.grad),
        first,
        second,
        third,
    ]


def blocks() -> list[str]:
    seen, frozen = shapes(), bare("dinov2_vits14", 224)
    block, (_, rows, width) = frozen.blocks[0], seen["vit.blocks.0"]
    small = count(block) - count(block.attn) - count(block.mlp)
    positions = frozen.cls_token.numel() + frozen.pos_embed.numel()
    return [
        say("{} -> {}, GELU, {} -> {}", width, *[block.mlp.fc1.out_features] * 2, seen["vit.blocks.0.mlp"][2]),
        say("(B, {}, {}), {} times", rows, width, len(frozen.blocks)),
        say("the patch map's {:,}, {:,} of CLS", count(frozen.patch_embed), positions),
        say("{} blocks of {:,} (qkv {:,},", len(frozen.blocks), count(block), count(block.attn.qkv)),
        say("proj {:,}, MLP {:,}, norms and scales {:,})", count(block.attn.proj), count(block.mlp), small),
        say("{:,} of the last norm: {:,} together", count(frozen.norm), count(frozen)),
    ]


def heads() -> list[str]:
    _, rows, width = shapes()["vit.blocks.0"]
    size = TrainConfig().embedding_dim
    linear, norm, patches = LinearHead(width, size), BatchNormHead(width, size), PatchesHead(width, size, rows, 1)
    axes = np.eye(2)
    same, right_angle = pair_distance(axes[:1], axes[:1])[0], pair_distance(axes[:1], axes[1:])[0]
    assert TrainConfig().head == "patches" and resolve({"exp": "exp_001"}).head == "linear"
    return [
        say("Linear {} -> {} | {:,} |", width, size, count(linear)),
        say("batch norm | {:,} |", count(norm)),
        say("{} tokens -> {},", rows, patches.reduce.out_features),
        say("together {:,} -> {}, batch norm | {:,} |", *reversed(patches.proj.weight.shape), count(patches)),
        say("sphere in {} dimensions", size),
        say("‖a - b‖² = {:.0f} - {:.0f} · cos(a, b)", right_angle, right_angle - same),
    ]


SECTIONS = (the_whole_way, pixels, tokens, attention_section, blocks, heads)
