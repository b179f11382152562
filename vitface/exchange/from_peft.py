"""PEFT's folders as our adapters, strictly, and face models made of them.

PEFT itself only warns of keys that it does not know, and then runs the base model alone. Here each key has to be known,
each layer to have both its matrices in the right shapes, each block to have what the others have, and each setting that
would change the formula to be absent.

Where q, k and v share one A, as our own exports do, they become qkv at the same rank. Where they do not, or one of them
is missing, their A are stacked and their B put on a block diagonal, at up to three times the rank; alpha grows with it,
so that the scaling stays what it was. Both are exact.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitface.config import MAX_SIZE, FaceConfig, ViTConfig, backbone_name
from vitface.errors import ExchangeError
from vitface.exchange.peft import CONFIG, MARKS, PREFIX, TENSORS
from vitface.model.face import FaceModel
from vitface.model.lora import TARGETS
from vitface.store.backbones import expected_tensors, find_backbone, load_backbone, weights_sha256
from vitface.store.faces import open_checkpoint, trained_tensors
from vitface.store.tensors import load_tensors
from vitface.weights.keymaps import META_TIMM, transformers_family

MAX_CONFIG_BYTES = 1 << 20
# what a configuration may say without changing the formula; anything else must be empty
HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "inference_mode",
    "r", "lora_alpha", "use_rslora", "target_modules", "lora_dropout", "bias", "init_lora_weights", "loftq_config",
    "megatron_core", "qalora_group_size", "eva_config",
}  # fmt: skip
UNTOUCHED_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave W as it was

Parts = dict[str, tuple[Tensor, Tensor]]  # "" or [q], [k], [v] -> A (r, I), B (O, r)


@dataclass(frozen=True)
class Adapters:
    """Adapters in our form: `tensors` as `adapter_state_dict` of a ViT gives them, and `settings`, the four fields of
    `FaceConfig` that go with them: lora_rank, lora_alpha, lora_scaling, lora_targets."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def read_domains(folder: Path, backbone: str, config: ViTConfig) -> tuple[Adapters, int]:
    """`read_peft` of a folder, or of its domain-0, domain-1, ... stacked; and the number of domains, K.

    ExchangeError if the domains are not numbered from 0 on, or differ in their settings.
    """
    folders = sorted(folder.glob("domain-*"), key=lambda path: (len(path.name), path.name))
    if not folders:
        return read_peft(folder, backbone, config), 1
    if [path.name for path in folders] != [f"domain-{k}" for k in range(len(folders))]:
        raise ExchangeError(f"{folder} has {', '.join(path.name for path in folders)}; domains are numbered from 0 on")
    first, *others = domains = [read_peft(path, backbone, config) for path in folders]
    for k, other in enumerate(others, start=1):
        for name, mine in first.settings.items():
            if other.settings[name] != mine:
                its = f"{name} {other.settings[name]}, domain-0 {mine}"
                raise ExchangeError(f"{folder}: domain-{k} has {its}; all domains of a model share it")
    stacked = {
        key: torch.cat([domain.tensors[key] for domain in domains], dim=0 if key.endswith("lora_a") else 1)
        for key in first.tensors
    }
    return Adapters(first.settings, stacked), len(domains)


def read_peft(folder: Path, backbone: str, config: ViTConfig) -> Adapters:
    """The LoRA in a PEFT folder for the preset `backbone`; ExchangeError names the first thing that does not fit."""
    found = _read_settings(folder / CONFIG)
    if not (folder / TENSORS).is_file():
        raise ExchangeError(f"{folder} has no {TENSORS}; save it with PEFT's save_pretrained, as safetensors")
    layers = _read_layers(folder / TENSORS, found, backbone, config)
    fused = {layer: _fuse(parts, config.embed_dim) for layer, parts in layers.items()}
    rank, scaling = max(len(a) for a, _ in fused.values()), "rslora" if found["use_rslora"] else "lora"
    targets = "attn+mlp" if any(".mlp." in layer for layer in layers) else "attn"
    grown = rank / found["r"]
    settings = {
        "lora_rank": rank,
        "lora_alpha": found["lora_alpha"] * (grown if scaling == "lora" else math.sqrt(grown)),
        "lora_scaling": scaling,
        "lora_targets": targets,
    }
    return Adapters(settings, _padded(fused, rank, targets, config))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            settings = json.loads(file.read(MAX_CONFIG_BYTES))
    except FileNotFoundError:
        raise ExchangeError(f"{path.parent} is no PEFT folder: it has no {CONFIG}") from None
    except (ValueError, RecursionError):  # no JSON, or nested to do harm
        settings = None
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ExchangeError(f"{path} is not the configuration of a LoRA")
    for name in sorted(settings.keys() - HARMLESS):
        if settings[name]:
            raise ExchangeError(f"{path}: {name} is {str(settings[name])[:60]}, which the LoRA here has not")
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


def _read_layers(path: Path, settings: dict[str, Any], backbone: str, config: ViTConfig) -> dict[str, Parts]:
    """Our layer -> its parts; every tensor of the file is in one of them."""
    modules = _pair(path, load_tensors(path))
    _check_targets(path, settings.get("target_modules"), list(modules))
    shapes = {key: tensor.shape for key, tensor in expected_tensors(config).items()}
    layers: dict[str, Parts] = {}
    for module, target in _name(path, list(modules), backbone).items():
        layer, _, mark = target.partition(".weight")
        if layer.split(".", 2)[2] not in TARGETS["attn+mlp"] or f"{layer}.weight" not in shapes:
            raise ExchangeError(f"{path}: {module} is no layer of {backbone} that gets adapters")
        out_features, in_features = shapes[f"{layer}.weight"]
        wanted = (settings["r"], in_features), (out_features // (3 if mark else 1), settings["r"])
        for side, tensor, want in zip("AB", modules[module], wanted, strict=True):
            if tensor.shape != want or not tensor.is_floating_point() or not tensor.isfinite().all():
                raise ExchangeError(
                    f"{path}: lora_{side} of {module} is {tensor.dtype} {tuple(tensor.shape)}, expected finite floats "
                    f"{want}"
                )
        a, b = modules[module]
        layers.setdefault(layer, {})[mark] = a.float(), b.float()
    _check_blocks(path, layers, config.depth)
    return layers


def _pair(path: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> its A and B."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ExchangeError(f"{path}: {key} is unknown in a LoRA; nothing was read")
        modules.setdefault(match[1], {})[match[2]] = tensor
    for module, sides in modules.items():
        if len(sides) < 2:
            raise ExchangeError(f"{path}: {module} has lora_{min(sides)} alone")
    if not modules:
        raise ExchangeError(f"{path} holds no adapter")
    return {module: (sides["A"], sides["B"]) for module, sides in modules.items()}


def _name(path: Path, modules: list[str], backbone: str) -> dict[str, str]:
    """Module -> our tensor with its mark, in the one layout that knows them all."""
    unknown = []
    for family in (META_TIMM, transformers_family(backbone)):
        for prefix in family.prefixes:
            names = {m: family.target(f"{m.removeprefix(prefix)}.weight") for m in modules if m.startswith(prefix)}
            known = {module: target for module, target in names.items() if target and target.startswith("blocks.")}
            unknown.append([module for module in modules if module not in known])
            if not unknown[-1]:
                if len(set(known.values())) < len(known):
                    raise ExchangeError(f"{path} names a layer as transformers 4 and as transformers 5 does")
                return known
    first = min(unknown, key=len)[0]
    raise ExchangeError(
        f"{path}: {first} is no block's layer in a {backbone} of timm or transformers; nothing was read"
    )


def _check_targets(path: Path, targets: Any, modules: list[str]) -> None:
    """What the configuration says was adapted is what there is; a pattern, for PEFT's own use, is not run."""
    for target in targets if isinstance(targets, list) else ():
        if not any(f".{module}".endswith(f".{target}") for module in modules):
            raise ExchangeError(f"{path}: {CONFIG} has the target {str(target)[:60]}, the file no such layer")
    for module in modules if isinstance(targets, list) else ():
        if not any(f".{module}".endswith(f".{target}") for target in targets):
            raise ExchangeError(f"{path}: {module} is none of the targets in {CONFIG}")


def _check_blocks(path: Path, layers: dict[str, Parts], depth: int) -> None:
    adapted = {(layer.split(".", 2)[2], mark) for layer, parts in layers.items() for mark in parts}
    for block in range(depth):
        for target, mark in sorted(adapted):
            if mark not in layers.get(f"blocks.{block}.{target}", {}):
                raise ExchangeError(f"{path}: block {block} has no adapter on {target}{mark}, other blocks have one")


def _fuse(parts: Parts, embed_dim: int) -> tuple[Tensor, Tensor]:
    """One layer's parts -> its A (R, I) and B (O, R)."""
    if "" in parts:
        return parts[""]
    pairs = [parts[mark] for mark in MARKS if mark in parts]
    if len(pairs) == 3 and all(torch.equal(pairs[0][0], a) for a, _ in pairs):
        return pairs[0][0], torch.cat([b for _, b in pairs])
    zero = torch.zeros(embed_dim, len(pairs[0][0]))
    present = [mark for mark in MARKS if mark in parts]
    rows = [[parts[mark][1] if mark == column else zero for column in present] for mark in MARKS[1:]]
    return torch.cat([a for a, _ in pairs]), torch.cat([torch.cat(row, dim=1) for row in rows])


def _padded(fused: dict[str, tuple[Tensor, Tensor]], rank: int, targets: str, config: ViTConfig) -> dict[str, Tensor]:
    """The tensors of a model with one rank and all of `targets`; what is added is zero."""
    shapes = {key: tensor.shape for key, tensor in expected_tensors(config).items()}
    tensors = {}
    for layer in (f"blocks.{block}.{target}" for block in range(config.depth) for target in TARGETS[targets]):
        out_features, in_features = shapes[f"{layer}.weight"]
        a, b = fused.get(layer, (torch.zeros(0, in_features), torch.zeros(out_features, 0)))
        tensors[f"{layer}.lora_a"] = torch.cat([a, torch.zeros(rank - len(a), in_features)])
        tensors[f"{layer}.lora_b"] = torch.cat([b, torch.zeros(out_features, rank - len(a))], dim=1)
    return tensors


def adapted_backbone(
    adapter: Path, backbone: str, weights: str | None, image_size: int
) -> tuple[FaceModel, str | Path]:
    """A preset with the adapter of a PEFT folder, its embedding the CLS token; and the backbone file it takes."""
    name = backbone_name(backbone)
    vit = load_backbone(name, weights, image_size)
    adapters, domains = read_domains(adapter, name, vit.config)
    if domains > 1:
        raise ExchangeError(f"{adapter} has {domains} domains, and no router comes with them: name one with --into")
    file = weights if weights else find_backbone(name)
    frozen = FaceConfig(name, weights_sha256(name, weights), vit.config, image_size, embedding_dim=vit.config.embed_dim)
    model = FaceModel(vit, dataclasses.replace(frozen, **adapters.settings))
    vit.load_state_dict({**vit.state_dict(), **adapters.tensors})
    return model.eval(), file


def adapters_into(adapter: Path, path: Path, weights: str | None) -> tuple[FaceModel, str | Path]:
    """The face model of a checkpoint with the adapters of a PEFT folder in the place of its own; and its backbone file.

    It has no thresholds: those of the model before are not its own.
    """
    checkpoint = open_checkpoint(path, weights)
    old = checkpoint.load()
    adapters, domains = read_domains(adapter, old.config.backbone, old.config.vit)
    if domains != old.config.num_domains:
        raise ExchangeError(f"{adapter} has {domains} domains, {path} {old.config.num_domains}")
    config = dataclasses.replace(old.config, **adapters.settings)
    model = FaceModel(load_backbone(config.backbone, checkpoint.backbone, config.image_size), config)
    kept = {key: tensor for key, tensor in trained_tensors(old).items() if not key.endswith(("lora_a", "lora_b"))}
    new = {f"vit.{key}": tensor for key, tensor in adapters.tensors.items()}
    model.load_state_dict({**model.state_dict(), **kept, **new})
    return model.eval(), checkpoint.backbone
