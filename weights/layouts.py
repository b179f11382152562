"""What a key map cannot say: tensors of published checkpoints that are cut, joined or turned before names are mapped.

A state dict is {name: tensor}, and each function here returns another one.
"""

import math
import re

import torch
from einops import rearrange
from torch import Tensor

from vitface.presets import ViTConfig

State = dict[str, Tensor]
# put between the parts of a name by torch.compile, FSDP and activation checkpointing
_WRAPPED = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_CHUNK = re.compile(r"((?:^|\.)blocks\.)\d+\.(?=\d+\.)")  # DINOv2 trains its blocks in chunks; the second is the index
_META_GATED, _TIMM_GATED = re.compile(r"(?<=\.mlp\.)(w[123])(?=\.)"), {"w1": "fc1_g", "w2": "fc1_x", "w3": "fc2"}
_POOL = re.compile(r"(?P<pool>.*(?:head|attn_pool)\.)(?:attention|attn)\.in_proj_(?P<kind>weight|bias)")


def clean(name: str) -> str:
    """A tensor's name without what wrappers of modules add to it."""
    return _CHUNK.sub(r"\1", _WRAPPED.sub("", name))


def arrange(state: State, prefix: str, config: ViTConfig) -> State:
    """A source's tensors as the key maps read them; `prefix` is that of its vision tower."""
    arranged = {}
    for name, tensor in state.items():
        pool = _POOL.fullmatch(name)
        if pool:
            width = tensor.shape[0] // 3
            for part, rows in (("q", slice(None, width)), ("kv", slice(width, None))):
                arranged[f"{pool['pool']}{part}.{pool['kind']}"] = tensor[rows]
        else:
            arranged[_META_GATED.sub(lambda found: _TIMM_GATED[found[1]], name)] = tensor
    arranged = _with_qkv_biases(arranged, config)
    positions = arranged.get(f"{prefix}pos_embed")
    if positions is not None and config.class_token and math.isqrt(positions.shape[-2]) ** 2 == positions.shape[-2]:
        # timm adds the position of CLS to the token itself where registers stand beside it
        arranged[f"{prefix}pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return arranged


def _with_qkv_biases(state: State, config: ViTConfig) -> State:
    """DINOv3 has no bias of keys: Meta masks it, transformers leaves it out, timm stores q's and v's or none at all."""
    found = dict(state)
    for name, tensor in state.items():
        stem, _, end = name.rpartition(".")
        if end == "bias_mask":
            query, _, value = state[f"{stem}.bias"].chunk(3)
            found[f"{stem}.bias"] = torch.cat([query, torch.zeros_like(query), value])
            del found[name]
        elif end == "q_bias" and f"{stem}.v_bias" in state:
            found[f"{stem}.qkv.bias"] = torch.cat([tensor, torch.zeros_like(tensor), state[f"{stem}.v_bias"]])
            del found[name], found[f"{stem}.v_bias"]
        elif config.rope != "none" and name.endswith(("attention.k_proj.weight", "attn.qkv.weight")):
            found.setdefault(f"{stem}.bias", torch.zeros(len(tensor), dtype=tensor.dtype))
    return found


def neighbour_turns(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of `half_turns`."""
    q, k, v = tensor.chunk(3)
    heads = {"nh": num_heads, "yx": 2, "two": 2}
    parts = [rearrange(part, "(nh two yx i) ... -> nh yx i two ...", **heads).flip(1) for part in (q, k)]
    return torch.cat([*(part.reshape(v.shape) for part in parts), v])


def half_turns(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows of a fused qkv (3 D, ...) whose heads turn neighbours, x axis first, as heads that turn halves, y first.

    q and k are reordered alike, so each of their dot products stays. PE's rotary positions turn numbers 2 i and 2 i + 1
    of a head; ours number i and i + hd / 2.
    """
    q, k, v = tensor.chunk(3)
    heads = {"nh": num_heads, "yx": 2, "two": 2}
    turned = [rearrange(part, "(nh yx i two) ... -> nh two yx i ...", **heads).flip(2) for part in (q, k)]
    turned = [part.reshape(v.shape) for part in turned]
    return torch.cat([*turned, v])


def from_big_vision(state: State) -> State:
    """big_vision's archive with weights that map from the right, without an axis for heads, and its blocks numbered."""
    prefix, found = "params/img/", {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            found[name] = tensor
            continue
        parts = name.removeprefix(prefix).removeprefix("Transformer/").split("/")
        if parts[0] == "encoderblock":
            blocks = {f"encoderblock.{index}": block for index, block in enumerate(tensor)}
        else:
            blocks = {re.sub(r"^encoderblock_(\d+)$", r"encoderblock.\1", parts[0]): tensor}
        for first, block in blocks.items():
            last = [_KINDS.get(part, part) for part in parts[1:]]
            found[prefix + ".".join([first, *last])] = _turned(parts, block)
    return _joined_pool(found, f"{prefix}MAPHead_0.")


_KINDS = {"kernel": "weight", "scale": "weight"}


def _turned(parts: list[str], tensor: Tensor) -> Tensor:
    if parts[-1] == "bias":
        return tensor.flatten()
    if parts[-1] != "kernel":
        return tensor
    if parts[0] == "embedding":
        return rearrange(tensor, "h w c d -> d c h w")
    if parts[-2] == "out":
        return rearrange(tensor, "nh hd d -> d (nh hd)")
    return rearrange(tensor, "i ... -> (...) i")


def _joined_pool(state: State, pool: str) -> State:
    """The pool's attention under the names of its parts, keys and values in one tensor."""
    attention = f"{pool}MultiHeadDotProductAttention_0."
    found = {name: tensor for name, tensor in state.items() if not name.startswith(attention)}
    for kind in ("weight", "bias"):
        names = {part: f"{attention}{part}.{kind}" for part in ("query", "key", "value", "out")}
        if state.keys() >= {*names.values()}:
            parts = {part: state[name] for part, name in names.items()}
            found[f"{pool}q.{kind}"], found[f"{pool}out.{kind}"] = parts["query"], parts["out"]
            found[f"{pool}kv.{kind}"] = torch.cat([parts["key"], parts["value"]])
    return found
