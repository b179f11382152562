"""Turns a published checkpoint into a backbone file: our names, float32, every setting in the metadata.

Every tensor of the source is used exactly once or is listed in `keymaps` as not used, and every tensor of the model is
filled; anything else is an error that names the tensor.
"""

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from vitface.config import to_flag
from vitface.errors import WeightsError
from vitface.files import sha256_file
from vitface.presets import VIT_PRESETS, ViTConfig, backbone_name
from vitface.store.backbone import PROJECTION, expected_tensors, save_backbone
from vitface.store.sources import SOURCES
from vitface.weights.beside import settings_beside
from vitface.weights.keymaps import BESIDE, FAMILIES, MARKS, Family, find_family
from vitface.weights.layouts import arrange, half_turns
from vitface.weights.reading import read_source
from vitface.weights.recognisers import check_variant, takes_bgr


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    `dropped` counts the source tensors not used, by the pattern that lists them. `settings_from` names the flags and
    the files beside the source that gave settings; all others are those of the preset. `entry` names the entry of a
    training checkpoint that was taken, and those beside it.
    """

    name: str
    config: ViTConfig
    src: Path
    out: Path
    family: str
    sha256: str
    published: bool
    used: int
    dropped: dict[str, int]
    settings_from: tuple[str, ...] = ()
    bgr: bool = False  # the source takes blue first: its patch convolution was turned
    entry: str = ""


def convert_backbone(name: str, src: str | Path, out: str | Path, bgr: bool | None = None, **given: Any) -> Conversion:
    """Converts the checkpoint `src` into the backbone file `out`, which is replaced only by a complete file.

    `name` is a preset or its alias. `given` are fields of `ViTConfig` that no checkpoint names and that override those
    of files beside it (see `settings_beside`) and of the preset: `act`, as open_clip's LAION and DataComp weights have
    the exact GELU, `mean` and `std`, as DeiT has ImageNet's. `bgr` is whether the source takes blue first, None: what a
    recogniser's settings beside it say. WeightsError names what does not fit.
    """
    name, src = backbone_name(name), Path(src)
    if name not in SOURCES:
        raise WeightsError(f"{name} ships with the package as a converted file: there is nothing to convert")
    found, files = settings_beside(src, VIT_PRESETS[name])
    given = {field: value for field, value in given.items() if value is not None}
    done = convert_file(name, dataclasses.replace(VIT_PRESETS[name], **{**found, **given}), src, Path(out), bgr)
    return dataclasses.replace(done, settings_from=(*files, *map(to_flag, given)))


def convert_file(name: str, config: ViTConfig, src: Path, out: Path, bgr: bool | None = None) -> Conversion:
    """`convert_backbone` for any sizes: `config` describes the model in `src`."""
    if not src.is_file():
        hint = "; name the file inside, such as model.safetensors" if src.is_dir() else ""
        raise WeightsError(f"{src}: no such file{hint}")
    if out.is_dir() or out.resolve() == src.resolve():
        raise WeightsError(f"--out {out} is {'a folder' if out.is_dir() else 'the source itself'}; name another file")
    digest = sha256_file(src)
    published = digest == SOURCES[name].sha256
    state, entry = read_source(src, digest)
    check_variant(src, state)
    projection = take_projection(state) if name.startswith("clip") else {}
    family, config, tensors, dropped = map_tensors(src, state, name, config)
    bgr = takes_bgr(src) if bgr is None and config.pool == "tokens" else bool(bgr)
    if bgr:
        tensors["patch_embed.proj.weight"] = tensors["patch_embed.proj.weight"].flip(1)
    licence = f"{SOURCES[name].licence} ({SOURCES[name].origin})"
    source = {
        "file": src.name,
        "sha256": digest,
        "family": family.title,
        "licence": licence if published else f"{licence}, if it holds those weights: its sha256 is not a pinned one",
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_backbone(out, name, config, tensors | projection, source)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write {out}: {error}") from None
    used = len(state) - sum(dropped.values()) + len(projection)
    return Conversion(name, config, src, out, family.title, digest, published, used, dropped, bgr=bgr, entry=entry)


def take_projection(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """{PROJECTION: (D, E), float32} of a whole CLIP, taken out of `state`; {} of a vision tower alone.

    Names are those of OpenAI and open_clip, transformers and timm; a head that was trained for classes has a bias.
    """
    for key in ("visual.proj", "proj", "visual_projection.weight", "head.weight"):
        tensor = state.get(key, torch.zeros(0))
        trained = key == "head.weight" and state.get("head.bias", tensor[:0]).any()
        if tensor.dim() == 2 and tensor.isfinite().all() and not trained:
            del state[key]
            return {PROJECTION: (tensor if key.endswith("proj") else tensor.T).float().clone().contiguous()}
    return {}


def map_tensors(
    path: Path, state: dict[str, Tensor], name: str, config: ViTConfig
) -> tuple[Family, ViTConfig, dict[str, Tensor], dict[str, int]]:
    """Renames, fuses and casts a source's tensors: (family, settings, ours, how many each pattern dropped).

    The settings are those of `config` with the native size of the source's positions.

    WeightsError names the first tensor that is unknown, missing, there twice, of another shape, or not finite.
    """
    found = find_family(set(state))
    if found is None:
        known = ", ".join(family.title for family in FAMILIES)
        raise WeightsError(f"{path} has none of the known layouts ({known}); it begins with {', '.join([*state][:3])}")
    family, prefix = found
    arranged = arrange(state, prefix, config)
    assigned, dropped = _assign(path, arranged, family, prefix)
    _check_preset(path, arranged, assigned, name, config)
    config = _at_its_grid(arranged, assigned, config)
    ours = {}
    for target, want in expected_tensors(config).items():
        marks = _marks(family, target, assigned)
        if not marks:
            raise WeightsError(f"{path}: {name} needs {target}, which {family.title} files do not have")
        pieces = []
        for mark in marks:
            if target + mark not in assigned:
                names = " or ".join(prefix + key for key in family.source_names(target + mark))
                raise WeightsError(f"{path}: {names} is missing, which {name} needs for {target}")
            key = assigned.pop(target + mark)
            shape = torch.Size([want.shape[0] // len(marks), *want.shape[1:]])
            pieces.append(_checked(path, key, arranged[key], target, shape))
        ours[target] = torch.cat(pieces)  # a copy, so that no two tensors share memory in the file
        if config.rope == "index" and ".attn.qkv." in target:
            ours[target] = half_turns(ours[target], config.num_heads)
    for target, key in assigned.items():
        raise WeightsError(f"{path}: {name} has no place for {key} (it would be {target})")
    return family, config, ours, dropped


def _marks(family: Family, target: str, assigned: dict[str, str]) -> tuple[str, ...]:
    """The marks of the pieces that `target` has in this file; those of any file of the family if it has none."""
    kinds = [kind for kind in reversed(MARKS) if family.source_names(target + kind[0])]
    return next((kind for kind in kinds if target + kind[0] in assigned), kinds[0] if kinds else ())


def _assign(path: Path, state: dict[str, Tensor], family: Family, prefix: str) -> tuple[dict[str, str], dict[str, int]]:
    """({our name with its mark: the source's name}, how many each pattern dropped); WeightsError names any other."""
    assigned: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    targets = family.targets(state, prefix)
    for key in state:
        inside, bare = key.startswith(prefix), key.removeprefix(prefix)
        target = targets.get(key)
        beside = family.outside if prefix in family.prefixes else (*family.outside, *BESIDE)
        unused = [p for p in (family.dropped if inside else beside) if fnmatchcase(bare, p)]
        if target is not None and target in assigned:
            raise WeightsError(f"{path}: {assigned[target]} and {key} are the same tensor under two names")
        if target is not None:
            assigned[target] = key
        elif unused:
            dropped[prefix + unused[0] if inside else unused[0]] += 1
        else:
            raise WeightsError(f"{path}: {key} is unknown in a {family.title} file; nothing was converted")
    return assigned, dict(dropped)


def _check_preset(path: Path, state: dict[str, Tensor], assigned: dict[str, str], name: str, config: ViTConfig) -> None:
    """WeightsError with the right name if what is in the file is another preset."""
    patches = state[assigned["patch_embed.proj.weight"]]
    width, patch = len(patches), patches.shape[-1]
    depth = len({target.split(".")[1] for target in assigned if target.startswith("blocks.")})
    registers = state[assigned["register_tokens"]].shape[-2] if "register_tokens" in assigned else 0
    marks = ("blocks.0.ls1.gamma", "cls_token", "pos_embed", "pool.query", "blocks.0.mlp.fc1.weight[gate]")
    found = (width, depth, patch, registers, *(mark in assigned for mark in marks))
    known = {**VIT_PRESETS, name: config}
    fits = [
        key
        for key, c in known.items()
        if found[:4] == (c.embed_dim, c.depth, c.patch_size, c.registers)
        and found[4:] == (c.layer_scale, c.class_token, c.pos_embed, c.pool == "attention", c.act == "swiglu")
    ]
    if fits and name not in fits:
        size = f"it has {depth} blocks of width {width}{f', {registers} registers' if registers else ''}"
        raise WeightsError(f"{path} is not a {name}: {size}; convert it as {' or '.join(fits)}")


def _at_its_grid(state: dict[str, Tensor], assigned: dict[str, str], config: ViTConfig) -> ViTConfig:
    """The settings with the native size of the positions in the file: a model may have been tuned at another one."""
    if "pos_embed" not in assigned or config.pool == "tokens":
        return config
    places = state[assigned["pos_embed"]].shape[-2] - config.class_token
    side = math.isqrt(max(places, 0))
    if side * side != places or not side or side == config.grid(config.native_size):
        return config
    return dataclasses.replace(config, native_size=side * config.patch_size)


def _checked(path: Path, key: str, tensor: Tensor, target: str, shape: torch.Size) -> Tensor:
    """`tensor` in float32 and in our shape, or WeightsError."""
    if target in ("cls_token", "pos_embed", "register_tokens") and tensor.dim() in (1, 2):  # CLIP's are (D,) and (N, D)
        tensor = tensor.reshape(1, -1, tensor.shape[-1])
    if tensor.shape != shape or not tensor.is_floating_point():
        raise WeightsError(f"{path}: {key} is {tensor.dtype} {tuple(tensor.shape)}, expected {tuple(shape)} of floats")
    tensor = tensor.to(torch.float32)
    if not tensor.isfinite().all():
        raise WeightsError(f"{path}: {key} has NaN or infinite values; download it again")
    return torch.where(tensor.abs() < torch.finfo(torch.float32).tiny, 0.0, tensor)  # denormals make a CPU crawl
