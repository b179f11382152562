"""The keys of PEFT's files: which of our layers a module is, behind whatever wraps the model, and what is none.

A file may hold more than the vision tower's adapters: a classifier that was trained with them, a text tower. These are
dropped and listed. Anything else that is not known is an ExchangeError.
"""

import fnmatch
import itertools
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from torch import Tensor

from vitface.errors import ExchangeError
from vitface.exchange.peft import PREFIX
from vitface.model.lora import TARGETS
from vitface.store.sources import SOURCES
from vitface.weights.keymaps import META_TIMM, Family, transformers_family

WRAPPERS = {"_orig_mod", "module"}  # of torch.compile and of DistributedDataParallel
Sides = dict[str, Tensor]  # "A" (r, I) and "B" (O, r)


def read_modules(path: Path, tensors: dict[str, Tensor], saved: list[str]) -> tuple[dict[str, Sides], list[str]]:
    """(the matrices A and B of each module, the tensors of the modules `saved` in full), wrappers left out."""
    modules: dict[str, Sides] = {}
    dropped = []
    for key, tensor in sorted(tensors.items()):
        name = without_wrappers(key)
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None and name.startswith(PREFIX) and _is_saved(name.removeprefix(PREFIX), saved):
            dropped.append(name.removeprefix(PREFIX))
        elif match is None:
            raise ExchangeError(f"{path}: {key} is unknown in a LoRA; nothing was read")
        elif match[2] in modules.setdefault(match[1], {}):
            raise ExchangeError(f"{path} has lora_{match[2]} of {match[1]} twice, with wrappers and without")
        else:
            modules[match[1]][match[2]] = tensor
    for module, sides in modules.items():
        if len(sides) < 2:
            raise ExchangeError(f"{path}: {module} has lora_{min(sides)} alone")
    if not modules:
        raise ExchangeError(f"{path} holds no adapter")
    return modules, dropped


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def our_layers(path: Path, modules: list[str], full: list[str], backbone: str) -> tuple[dict[str, str], list[str]]:
    """({module: our layer with its [q], [k] or [v]}, the modules that are no part of the vision tower).

    `full` are the tensors that were trained in full; none may be the tower's.
    """
    families = _families(backbone)
    inside = [module for module in modules if not any(_is_outside(module, family) for family in families)]
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for module, family in itertools.product(inside, families):
        for prefix in _prefixes(module):
            if _layer(family, module, prefix):
                found[family.title, prefix].add(module)
    layouts = sorted(found, key=lambda layout: -len(found[layout]))[:2]
    if (
        len(layouts) == 2
        and len(found[layouts[0]]) == len(found[layouts[1]])
        and found[layouts[0]] != found[layouts[1]]
    ):
        names = " and ".join(prefix or "no prefix" for _, prefix in layouts)
        raise ExchangeError(f"{path} has adapters of two towers, under {names}; save those of one")
    title, prefix = layouts[0] if layouts else (META_TIMM.title, "")
    family = next(family for family in families if family.title == title)
    for name in (name for name in full if name.startswith(prefix) and family.target(name.removeprefix(prefix))):
        raise ExchangeError(f"{path}: {name} is a part of the backbone, trained in full, which has no place here")
    layers = {module: layer for module in inside if (layer := _layer(family, module, prefix))}
    for module in (module for module in inside if module.startswith(prefix) and module not in layers):
        if family.target(f"{module.removeprefix(prefix)}.weight") == "patch_embed.proj.weight":
            raise ExchangeError(
                f"{path}: {module}, the convolution that makes the patches, has an adapter too, which has no place "
                f"here; without it the embeddings would be others. The target {module.rpartition('.')[2]!r} matched it "
                f"by its name: train the blocks' layers alone, in timm target_modules=['attn.qkv', 'attn.proj']"
            )
        raise ExchangeError(f"{path}: {module} is no layer to adapt in a {backbone} of timm or transformers")
    return layers, [module for module in modules if module not in layers]


def _families(backbone: str) -> list[Family]:
    return [family for family in (META_TIMM, transformers_family(backbone)) if family]


def part_of_backbone(saved: str, backbone: str) -> bool:
    """Whether a name of `modules_to_save` is that of a module of the vision tower."""
    names = {key.rpartition(".")[0] for family in _families(backbone) for key in family.keys}
    return any(f".{saved}." in f".{name}." for name in names)


def base_fault(settings: dict[str, Any], backbone: str) -> str | None:
    """What is wrong with the base that an adapter names, None if it is the preset's or none is named."""
    base = settings.get("base_model_name_or_path") or ""
    source = SOURCES.get(backbone)
    known = [name for name in (source and source.transformers, source and source.timm) if name]
    if not isinstance(base, str) or not base or _short(base) in {backbone, *map(_short, known)}:
        return None
    return f"it was trained on {base[:80]!r}, and not on {' or '.join(known) or backbone}"


def _short(name: str) -> str:
    """A model's name without its owner, timm's tag and the activation, which timm has in the name."""
    last = re.split(r"[/\\:]", name.rstrip("/\\"))[-1].lower()
    return last.partition(".")[0].replace("_quickgelu", "")


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts))]


def _layer(family: Family, module: str, prefix: str) -> str:
    """Our layer, "" if the module has none that is adapted, or another prefix."""
    target = family.target(f"{module.removeprefix(prefix)}.weight") if module.startswith(prefix) else None
    layer, _, mark = (target or "").partition(".weight")
    return layer + mark if layer.endswith(tuple(f".{name}" for name in TARGETS["attn+mlp"])) else ""


def _is_outside(module: str, family: Family) -> bool:
    patterns = (*family.outside, *family.dropped)
    names = [f"{module.removeprefix(prefix)}.weight" for prefix in _prefixes(module)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _is_saved(name: str, saved: list[str]) -> bool:
    return any(f".{module}." in f".{name}" for module in saved)
