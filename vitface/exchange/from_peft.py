"""PEFT's folders as our adapters, read strictly, and face models made of them.

PEFT only warns of keys that it does not know, and then runs the base model alone. Here every key must be known (see
peft_keys.py), every layer must have both its matrices in the right shapes, every block must have the layers of the
others, no setting may change the formula, and the base must be the one that the adapter was trained on.

Where q, k and v share one A, as in our own exports, they become qkv at the same rank. Otherwise their A are stacked and
their B are put on a block diagonal, at up to three times the rank; alpha grows with it, so that the scaling stays.
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitface.config import MAX_SIZE, FaceConfig
from vitface.errors import ExchangeError
from vitface.exchange.peft import CONFIG, TENSORS
from vitface.exchange.peft_keys import base_fault, our_layers, part_of_backbone, read_modules, without_wrappers
from vitface.files import read_json
from vitface.model.face import FaceModel
from vitface.model.lora import TARGETS
from vitface.model.vit import ViT
from vitface.presets import ViTConfig
from vitface.store.backbone import expected_tensors, find_backbone, load_backbone
from vitface.store.faces import frozen_face, open_checkpoint, trained_tensors
from vitface.store.tensors import load_tensors
from vitface.weights.keymaps import MARKS
from vitface.weights.layouts import half_turns

MAX_CONFIG_BYTES = 1 << 20
# settings that do not change the formula; any other must be empty
HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "target_modules", "lora_dropout", "bias"),
    *("init_lora_weights", "loftq_config", "megatron_core", "qalora_group_size", "eva_config"),
    *("exclude_modules", "modules_to_save"),  # the layers that there are count; see peft_keys.py
}
UNTOUCHED_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave W as it was

Parts = dict[str, tuple[Tensor, Tensor]]  # "" or [q], [k], [v] -> A (r, I), B (O, r)


@dataclass(frozen=True)
class Adapters:
    """Our adapters: `tensors` as `adapter_state_dict` of a ViT gives them, and `settings`, the fields of `FaceConfig`
    that go with them: lora_rank, lora_alpha, lora_scaling, lora_targets. `notes` are what the user should know."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str]


def read_domains(folder: Path, backbone: str, config: ViTConfig, own_base: bool = False) -> tuple[Adapters, int]:
    """`read_peft` of a folder, or of its domain-0, domain-1, ... stacked; and the number of domains, K.

    ExchangeError if the domains are not numbered from 0 on, or differ in their settings.
    """
    folders = sorted(folder.glob("domain-*"), key=lambda path: (len(path.name), path.name))
    if not folders:
        return read_peft(folder, backbone, config, own_base), 1
    if [path.name for path in folders] != [f"domain-{k}" for k in range(len(folders))]:
        raise ExchangeError(f"{folder} has {', '.join(path.name for path in folders)}; domains are numbered from 0 on")
    first, *others = domains = [read_peft(path, backbone, config, own_base) for path in folders]
    for k, other in enumerate(others, start=1):
        for name, mine in first.settings.items():
            if (its := other.settings[name]) != mine:
                raise ExchangeError(f"{folder}: domain-{k} has {name} {its}, domain-0 {mine}; it must be the same")
    stacked = {
        key: torch.cat([domain.tensors[key] for domain in domains], dim=0 if key.endswith("lora_a") else 1)
        for key in first.tensors
    }
    return Adapters(first.settings, stacked, first.notes), len(domains)


def read_peft(folder: Path, backbone: str, config: ViTConfig, own_base: bool = False) -> Adapters:
    """The LoRA in a PEFT folder for the preset `backbone`; ExchangeError names the first thing that does not fit.

    An adapter of another base is one of these, unless that base is a local folder or the user's own (`own_base`): then
    it is a note.
    """
    found = _read_settings(folder / CONFIG)
    if not (folder / TENSORS).is_file():
        raise ExchangeError(f"{folder} has no {TENSORS}; save it with PEFT's save_pretrained, as safetensors")
    notes = _check_base(folder / CONFIG, found, backbone, own_base)
    layers, dropped = _read_layers(folder / TENSORS, found, backbone, config)
    if dropped:
        more = f", and {len(dropped) - 3} more" if len(dropped) > 3 else ""
        notes.append(f"left out, as no part of the vision tower: {', '.join(dropped[:3])}{more}")
    fused = {layer: _fuse(parts) for layer, parts in layers.items()}
    rank, scaling = max(len(a) for a, _ in fused.values()), "rslora" if found["use_rslora"] else "lora"
    if rank > MAX_SIZE:
        raise ExchangeError(f"{folder}: q, k and v together have rank {rank:,}; a model's is at most {MAX_SIZE:,}")
    targets = "attn+mlp" if any(".mlp." in layer for layer in layers) else "attn"
    grown = rank / found["r"]
    settings = {
        "lora_rank": rank,
        "lora_alpha": found["lora_alpha"] * (grown if scaling == "lora" else math.sqrt(grown)),
        "lora_scaling": scaling,
        "lora_targets": targets,
    }
    return Adapters(settings, _padded(fused, rank, targets, config), notes)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        inside = "".join(f", but {found.parent} has" for found in sorted(path.parent.glob(f"*/{CONFIG}"))[:1])
        raise ExchangeError(f"{path.parent} is no PEFT folder: it has no {CONFIG}{inside}") from None
    except ValueError:  # no JSON, or nested to do harm
        settings = None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ExchangeError(f"{path} is not the configuration of a LoRA")
    for name in sorted(name for name in settings.keys() - HARMLESS if settings[name]):
        raise ExchangeError(f"{path}: {name} is {str(settings[name])[:60]}, which is not supported here")
    good = {
        "r": type(settings.get("r")) is int and 0 < settings["r"] <= MAX_SIZE,
        "lora_alpha": type(settings.get("lora_alpha")) in (int, float) and 0 < settings["lora_alpha"] < 1e9,
        "use_rslora": settings.setdefault("use_rslora", False) in (True, False),
        "bias": settings.get("bias", "none") == "none",
        "init_lora_weights": settings.get("init_lora_weights") in UNTOUCHED_BASE,
    }
    for name in (name for name, fits in good.items() if not fits):
        raise ExchangeError(f"{path}: {name} cannot be {str(settings.get(name))[:60]} here")
    return settings


def _check_base(path: Path, settings: dict[str, Any], backbone: str, own_base: bool) -> list[str]:
    fault, base = base_fault(settings, backbone), str(settings.get("base_model_name_or_path"))
    if fault is None:
        return []
    if own_base or base.startswith(("/", ".", "~")) or "\\" in base:
        return [f"warning: {path}: {fault}; with other weights than those, the embeddings mean nothing"]
    raise ExchangeError(
        f"{path}: {fault}; with other weights the embeddings would mean nothing. Convert that base and name it with "
        f"--weights FILE; if it is the same one under another name, correct base_model_name_or_path in {path.name}"
    )


def _read_layers(
    path: Path, settings: dict[str, Any], backbone: str, config: ViTConfig
) -> tuple[dict[str, Parts], list[str]]:
    """The parts of each of our layers, and the names of what is no part of the vision tower."""
    saved = _names(settings.get("modules_to_save"))
    for name in (name for name in saved if part_of_backbone(name, backbone)):
        raise ExchangeError(f"{path.parent / CONFIG}: modules_to_save has {name!r}, a part of the backbone")
    modules, full = read_modules(path, load_tensors(path), saved)
    _check_targets(path, settings, list(modules))
    names, outside = our_layers(path, list(modules), full, backbone)
    shapes = {key: tensor.shape for key, tensor in expected_tensors(config).items()}
    layers: dict[str, Parts] = {}
    for module, name in names.items():
        layer, _, mark = name.partition("[")
        mark = mark and f"[{mark}"
        if f"{layer}.weight" not in shapes:
            raise ExchangeError(f"{path}: {module} is no layer to adapt in a {backbone} of timm or transformers")
        if mark in layers.setdefault(layer, {}):
            raise ExchangeError(f"{path} names a layer as transformers 4 and as transformers 5 does")
        out_features, in_features = shapes[f"{layer}.weight"]
        wanted = (settings["r"], in_features), (out_features // len(marks_of(mark)), settings["r"])
        for side, want in zip("AB", wanted, strict=True):
            tensor = modules[module][side]
            is_float = tensor.is_floating_point() and tensor.itemsize > 1  # torch computes little with float8
            if tensor.shape != want or not is_float or not tensor.isfinite().all():
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ExchangeError(f"{path}: lora_{side} of {module} is {found}, expected finite floats {want}")
        layers[layer][mark] = modules[module]["A"].float(), modules[module]["B"].float()
    if not layers:
        raise ExchangeError(f"{path} holds no adapter of a {backbone}: {', '.join(outside[:3])}, ...")
    _check_blocks(path, layers, config.depth)
    return layers, [*full, *outside]


def _names(value: Any) -> list[str]:
    """A setting that is a list of names; [] for any other."""
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []


def _check_targets(path: Path, settings: dict[str, Any], modules: list[str]) -> None:
    """Compares the configuration's list of targets with the file; a pattern, which PEFT allows too, is not run.

    A target may be missing if it is excluded again, or saved in full.
    """
    targets, excluded = settings.get("target_modules"), settings.get("exclude_modules")
    if not isinstance(targets, list):
        return
    targets = [without_wrappers(str(target)) for target in targets]
    others = [*_names(excluded), *_names(settings.get("modules_to_save"))]
    needed = [target for target in targets if not f".{target}".endswith(tuple(f".{other}" for other in others))]
    for target in needed if not isinstance(excluded, str) else ():
        if not any(f".{module}".endswith(f".{target}") for module in modules):
            raise ExchangeError(f"{path}: {CONFIG} has the target {target[:60]}, the file no such layer")
    for module in modules:
        if not f".{module}".endswith(tuple(f".{target}" for target in targets)):
            raise ExchangeError(f"{path}: {module} is none of the targets in {CONFIG}")


def _check_blocks(path: Path, layers: dict[str, Parts], depth: int) -> None:
    adapted = {(layer.split(".", 2)[2], mark) for layer, parts in layers.items() for mark in parts}
    for block, (target, mark) in itertools.product(range(depth), sorted(adapted)):
        if mark not in layers.get(f"blocks.{block}.{target}", {}):
            raise ExchangeError(f"{path}: block {block} has no adapter on {target}{mark}, other blocks have one")


def marks_of(mark: str) -> tuple[str, ...]:
    """The marks of the parts of the layer that has a part with this one."""
    return next(marks for marks in MARKS if mark in marks)


def _fuse(parts: Parts) -> tuple[Tensor, Tensor]:
    """One layer's parts -> its A (R, I) and B (O, R)."""
    if "" in parts:
        return parts[""]
    marks, (first, rows) = marks_of(next(iter(parts))), next(iter(parts.values()))
    if len(parts) == len(marks) and all(torch.equal(first, a) for a, _ in parts.values()):
        return first, torch.cat([parts[mark][1] for mark in marks])
    nothing = first[:0], rows[:, :0]
    a, b = zip(*(parts.get(mark, nothing) for mark in marks), strict=True)
    return torch.cat(a), torch.block_diag(*b)


def _padded(fused: dict[str, tuple[Tensor, Tensor]], rank: int, targets: str, config: ViTConfig) -> dict[str, Tensor]:
    """The tensors of a model with one rank and all of `targets`, padded with zeros."""
    shapes = {key: tensor.shape for key, tensor in expected_tensors(config).items()}
    tensors = {}
    for layer in (f"blocks.{block}.{target}" for block in range(config.depth) for target in TARGETS[targets]):
        out_features, in_features = shapes[f"{layer}.weight"]
        a, b = fused.get(layer, (torch.zeros(0, in_features), torch.zeros(out_features, 0)))
        if config.rope == "index" and layer.endswith("attn.qkv"):
            b = half_turns(b, config.num_heads)
        tensors[f"{layer}.lora_a"] = torch.cat([a, torch.zeros(rank - len(a), in_features)])
        tensors[f"{layer}.lora_b"] = torch.cat([b, torch.zeros(out_features, rank - len(a))], dim=1)
    return tensors


def adapted_backbone(
    adapter: Path, backbone: str, weights: str | None, image_size: int | None
) -> tuple[FaceModel, str | Path, list[str]]:
    """(A preset with the adapter of a PEFT folder, whose embedding is that of its pool; the backbone's file; notes)."""
    frozen = frozen_face(backbone, weights, image_size)
    adapters, domains = read_domains(adapter, frozen.config.backbone, frozen.config.vit, bool(weights))
    if domains > 1:
        raise ExchangeError(f"{adapter} has {domains} domains, and no router comes with them: name one with --into")
    file = weights or find_backbone(frozen.config.backbone)
    return _with_adapters(frozen.vit, frozen.config, adapters, {}), file, adapters.notes


def adapters_into(adapter: Path, path: Path, weights: str | None) -> tuple[FaceModel, str | Path, list[str]]:
    """(The face model of a checkpoint, with the adapters of a PEFT folder instead of its own; the backbone's file;
    notes).

    The model has no thresholds: the checkpoint's do not hold for it.
    """
    checkpoint = open_checkpoint(path, weights)
    old, config = checkpoint.load(), checkpoint.config
    adapters, domains = read_domains(adapter, config.backbone, config.vit, bool(weights))
    if domains != config.num_domains:
        raise ExchangeError(f"{adapter} has {domains} domains, {path} {config.num_domains}")
    kept = {key: tensor for key, tensor in trained_tensors(old).items() if not key.endswith(("lora_a", "lora_b"))}
    vit = load_backbone(config.backbone, checkpoint.backbone, config.image_size)
    return _with_adapters(vit, config, adapters, kept), checkpoint.backbone, adapters.notes


def _with_adapters(vit: ViT, config: FaceConfig, adapters: Adapters, kept: dict[str, Tensor]) -> FaceModel:
    model = FaceModel(vit, dataclasses.replace(config, **adapters.settings))
    new = {f"vit.{key}": tensor for key, tensor in adapters.tensors.items()}
    model.load_state_dict({**model.state_dict(), **kept, **new})
    return model.eval()
