"""Every choice as data: the backbones, a face model's settings, a training run, the recorded experiments.

A run's configuration is one flat frozen dataclass. Its fields are the command line's flags; precedence is
class default < `--exp` preset < explicit flag.
"""

import argparse
import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vitface.credentials import find_secret
from vitface.errors import CheckpointError, ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
MAX_SIZE, MAX_IMAGE_SIZE = 1 << 13, 1 << 10  # of anything in a model, of its images; larger model files are refused
Dtype = Literal["fp32", "bf16", "fp16"]  # of the frozen backbone and its activations


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer's sizes and conventions, as they were when it was pretrained.

    `native_size` is the image side in pixels whose patch grid `pos_embed` was learned on. `pos_interp` names the rule
    that resamples it to another grid (see `vitface.model.vit.resample_pos_embed`). `mean` and `std` are RGB, for images
    in [0, 1].
    """

    native_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    act: Literal["gelu", "quick_gelu"] = "gelu"
    layer_scale: bool = False
    norm_pre: bool = False
    patch_bias: bool = True
    norm_eps: float = 1e-6
    pos_interp: Literal["scale_offset", "size", "size_antialias"] = "size_antialias"
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def grid(self, image_size: int) -> int:
        """Patches along one side of a square image of `image_size` pixels; ConfigError unless the patch divides it."""
        if image_size <= 0 or image_size % self.patch_size:
            below = max(image_size // self.patch_size, 1) * self.patch_size
            raise ConfigError(
                f"image size {image_size} is not a multiple of the patch size {self.patch_size}; "
                f"use {below} or {below + self.patch_size}"
            )
        return image_size // self.patch_size


def _dinov2(embed_dim: int, depth: int, num_heads: int) -> ViTConfig:
    return ViTConfig(
        518, 14, embed_dim, depth, num_heads,
        layer_scale=True, pos_interp="scale_offset", mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip


def _clip(patch_size: int, embed_dim: int, depth: int, num_heads: int) -> ViTConfig:
    return ViTConfig(
        224, patch_size, embed_dim, depth, num_heads,
        act="quick_gelu", norm_pre=True, patch_bias=False, norm_eps=1e-5,
        pos_interp="size", mean=CLIP_MEAN, std=CLIP_STD,
    )  # fmt: skip


VIT_PRESETS: dict[str, ViTConfig] = {
    "dinov2_vits14": _dinov2(384, 12, 6),
    "dinov2_vitb14": _dinov2(768, 12, 12),
    "dinov2_vitl14": _dinov2(1024, 24, 16),
    "clip_vitb16": _clip(16, 768, 12, 12),
    "clip_vitl14": _clip(14, 1024, 24, 16),
    "vit_tiny_patch16": ViTConfig(224, 16, 192, 12, 3),
    "vit_nano": ViTConfig(112, 16, 128, 4, 4),
}
VIT_ALIASES = {"dinov2": "dinov2_vits14", "clip": "clip_vitb16"}


def backbone_name(name: str) -> str:
    """The preset that `name` (a preset or an alias such as "dinov2") means; ConfigError lists the known ones."""
    name = VIT_ALIASES.get(name, name)
    if name not in VIT_PRESETS:
        raise ConfigError(f"unknown backbone {name!r}; known: {', '.join([*VIT_ALIASES, *VIT_PRESETS])}")
    return name


@dataclass(frozen=True)
class FaceConfig:
    """Everything that shapes a face model; stored beside its tensors, so that no script can contradict it.

    `num_domains` 1 is plain LoRA, without a router; `lora_rank` 0 is the frozen backbone. Each `gate` but "learned" is
    a control (see `vitface.model.face.FaceModel.gate`). `weights_sha256` is that of the converted backbone file, or
    "random".
    """

    backbone: str
    weights_sha256: str
    vit: ViTConfig
    image_size: int
    lora_rank: int = 0
    lora_alpha: float = 16
    lora_scaling: Literal["lora", "rslora"] = "lora"
    lora_targets: Literal["attn", "attn+mlp"] = "attn"
    num_domains: int = 1
    gate: Literal["learned", "uniform", "random", "shuffled"] = "learned"
    router_depth: int = 3
    gate_temperature: float = 1.0
    head: Literal["cls", "linear", "bn", "patches"] = "cls"
    head_levels: int = 1
    embedding_dim: int = 512
    train_patch_embed: bool = False
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    dtype: Dtype = "fp32"


_RECORDED: dict[str, Any] = {
    "lora_alpha": 16.0, "head": "linear", "lr": 1e-4, "identity_lr": 1e-4, "batch_size": 128, "epochs": 40,
}  # fmt: skip
_DEMO: dict[str, Any] = {
    "backbone": "vit_nano", "image_size": 112, "train_data": "synthetic", "use_dalora": True, "router_depth": 2,
    "head": "bn", "embedding_dim": 128, "margin": 0.2, "scale": 32.0, "augment": "flip", "epochs": 3, "lr": 2e-3,
    "identity_lr": 1e-2, "num_workers": 0, "val_data": None,
}  # fmt: skip
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "demo": _DEMO,
    "exp_001": {**_RECORDED, "backbone": "dinov2", "use_dalora": False},
    "exp_002": {**_RECORDED, "backbone": "clip", "use_dalora": False},
    "exp_003": {**_RECORDED, "backbone": "dinov2", "use_dalora": True},
    "exp_004": {**_RECORDED, "backbone": "clip", "use_dalora": True},
    # the controls of exp_003: LoRA with as many parameters and the same alpha / rank, and gates that choose nothing
    "exp_003_lora48": {**_RECORDED, "backbone": "dinov2", "use_dalora": False, "lora_rank": 48, "lora_alpha": 48.0},
    "exp_003_uniform": {**_RECORDED, "backbone": "dinov2", "use_dalora": True, "gate": "uniform"},
    "exp_003_random": {**_RECORDED, "backbone": "dinov2", "use_dalora": True, "gate": "random"},
    "exp_003_shuffled": {**_RECORDED, "backbone": "dinov2", "use_dalora": True, "gate": "shuffled"},
}


def flag(default: Any, text: str) -> Any:
    """A field of `TrainConfig` with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """One training run, flat. Every field is a flag of train.py; the resolved values are saved in the run directory."""

    exp: str | None = flag(None, f"preset to start from: {', '.join(EXPERIMENTS)}; explicit flags win over it")
    backbone: str = flag("dinov2", "backbone preset or alias")
    weights: str | None = flag(None, "converted backbone file, or 'random'; default: look in the usual places")
    image_size: int = flag(224, "input side in pixels, a multiple of the patch")
    train_data: str = flag(
        "data/casia-webface", "RecordIO, packed or image folder (one per person); synthetic, synthetic_shift"
    )
    pack: bool = flag(True, "decode the training images once, into $VITFACE_HOME; --no-pack: in every epoch")
    val_data: str | None = flag("data", "folder of benchmark files, evaluated once at the end")
    use_dalora: bool = flag(False, "DA-LoRA: several adapters per layer, mixed per image by a domain classifier")
    num_domains: int = flag(3, "adapters per layer with --use-dalora")
    gate: Literal["learned", "uniform", "random", "shuffled"] = flag(
        "learned", "DA-LoRA's mix: the router's; controls: 1/K each, random for all, another image's"
    )
    lora_rank: int = flag(16, "rank of each adapter")
    lora_alpha: float = flag(64.0, "adapter strength; W' = W + alpha / rank · B A")
    lora_targets: Literal["attn", "attn+mlp"] = flag("attn", "layers that get adapters")
    router_depth: int = flag(3, "frozen blocks the domain classifier looks through")
    gate_temperature: float = flag(1.0, "of the softmax over domains: below 1 one adapter per image, above 1 all alike")
    balance_loss_weight: float = flag(0.01, "keeps DA-LoRA from using one domain only")
    domain_labels: str | None = flag(
        None,
        "CSV with the columns image,domain: the domain of each training image; none: not even those of synthetic faces",
    )
    train_patch_embed: bool = flag(False, "also train the patch convolution (as the recorded experiments did)")
    head: Literal["bn", "linear", "patches"] = flag("patches", "embedding head")
    head_levels: int = flag(1, "evenly spaced depths whose tokens the head 'patches' reads; 1: the last block alone")
    embedding_dim: int = flag(512, "size of the embedding")
    loss: Literal["cosface", "arcface", "adaface"] = flag("cosface", "margin softmax")
    margin: float = flag(0.35, "margin m")
    scale: float = flag(64.0, "scale s of the cosines")
    partial_fc: float | None = flag(
        None, "cut the identity matrix over the GPUs and compare with this share of the other people in a step; 1: all"
    )
    augment: Literal["none", "flip", "strong"] = flag("strong", "augmentation of the training images")
    holdout_people: int = flag(10, "training people kept aside to choose the best epoch by; 0: the last epoch")
    max_samples: int | None = flag(None, "use at most this many training images")
    batch_size: int = flag(64, "images per step, over all GPUs and --grad-accum")
    grad_accum: int = flag(1, "forward and backward passes per step, each on an equal part of a GPU's images")
    epochs: int = flag(20, "passes over the data")
    save_every: int | None = flag(None, "also save after every so many steps, not only after each epoch")
    patience: int = flag(0, "stop after this many epochs without improvement; 0: never")
    lr: float = flag(5e-4, "peak learning rate of the adapters, the router and the embedding head")
    identity_lr: float = flag(5e-3, "peak learning rate of the identity matrix")
    weight_decay: float = flag(0.05, "AdamW weight decay; never on biases and norms")
    clip_grad: float = flag(5.0, "largest norm of the gradient")
    num_workers: int = flag(2, "processes that decode images")
    seed: int = flag(0, "seeds initialisation, order and augmentation")
    save_dir: str | None = flag(None, "run directory; default runs/EXP-DATE")
    resume: str | None = flag(None, "'auto' continues the run in --save-dir, a path the run or checkpoint there")
    allow_changed: bool = flag(False, "resume although settings or data changed; the epoch under way starts again")
    device: str = flag("auto", "'auto', 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto", "of the frozen backbone; adapters stay fp32. fp16, with a scaled loss: for GPUs without bf16"
    )
    impl: Literal["auto", "reference", "fused"] = flag("auto", "of the layers; auto: fused on the CPU, else reference")
    compile: bool = flag(False, "torch.compile the model")
    memory_budget: float | None = flag(None, "GB a step may take; blocks are recomputed until it fits")
    wandb: bool = flag(False, "also log to Weights & Biases (extra: vitface[wandb])")
    tensorboard: bool = flag(False, "also log for TensorBoard (extra: vitface[tensorboard])")
    dry_run: bool = flag(False, "two steps on synthetic images with random weights: needs no data, writes nothing")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind = find_secret(value) if isinstance(value, str) else None
            if kind:
                raise ConfigError(f"{to_flag(name)} holds {kind}; settings are saved with the run, so they hold none")
        backbone_name(self.backbone)
        positive = ("image_size", "num_domains", "lora_rank", "lora_alpha", "embedding_dim", "scale", "batch_size")
        positive += ("epochs", "lr", "identity_lr", "clip_grad", "max_samples")
        positive += ("grad_accum", "save_every", "gate_temperature")
        for name in (*positive, "memory_budget"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{to_flag(name)} must be positive, not {value}")
        not_negative = ("margin", "weight_decay", "holdout_people", "patience", "num_workers", "seed")
        for name in (*not_negative, "balance_loss_weight"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"{to_flag(name)} must not be negative, not {getattr(self, name)}")
        for name in ("image_size", "num_domains", "lora_rank", "embedding_dim"):
            limit = MAX_IMAGE_SIZE if name == "image_size" else MAX_SIZE
            if getattr(self, name) > limit:
                raise ConfigError(f"{to_flag(name)} must be at most {limit}, not {getattr(self, name)}")
        if self.seed >= 1 << 63:
            raise ConfigError(f"--seed must be below 2^63, not {self.seed}")
        if self.use_dalora and self.num_domains < 2:
            raise ConfigError("--use-dalora needs --num-domains of at least 2; one domain is plain LoRA")
        if self.gate != "learned" and not self.use_dalora:
            raise ConfigError(f"--gate {self.gate} is a control for DA-LoRA; add --use-dalora")
        if self.holdout_people == 1 or (self.patience and not self.holdout_people):
            raise ConfigError("--holdout-people must be 0 or at least 2, and not 0 with --patience")
        if self.batch_size % self.grad_accum:
            raise ConfigError(f"--batch-size {self.batch_size} is no multiple of --grad-accum {self.grad_accum}")
        if self.batch_size // self.grad_accum < 2 and self.head != "linear":
            raise ConfigError(
                "--batch-size must be at least 2, and that times --grad-accum: the batch norm of the embedding head "
                "needs two images"
            )
        if self.partial_fc is not None and not 0 < self.partial_fc <= 1:
            raise ConfigError(f"--partial-fc must be above 0 and at most 1, not {self.partial_fc}")
        vit = VIT_PRESETS[backbone_name(self.backbone)]
        vit.grid(self.image_size)
        if not 1 <= self.router_depth <= vit.depth:
            raise ConfigError(f"--router-depth must be 1 to {vit.depth} for {self.backbone}, not {self.router_depth}")
        if not 1 <= self.head_levels <= vit.depth:
            raise ConfigError(f"--head-levels must be 1 to {vit.depth} for {self.backbone}, not {self.head_levels}")
        if self.head_levels > 1 and self.head != "patches":
            raise ConfigError("--head-levels goes with --head patches")


# fields that do not shape what is trained (the backbone's weights are known by their SHA-256)
BOOKKEEPING = frozenset({
    "save_dir", "resume", "allow_changed", "device", "num_workers", "pack", "memory_budget", "weights",
    "val_data", "save_every", "wandb", "tensorboard",
})  # fmt: skip


def to_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `TrainConfig`; bools get --x and --no-x, Literals become choices."""
    hints = typing.get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        hint, options = hints[item.name], {}
        if isinstance(hint, types.UnionType):  # X | None
            hint = next(arm for arm in typing.get_args(hint) if arm is not types.NoneType)
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is Literal:
            options["choices"] = typing.get_args(hint)
        else:
            options.update(type=hint, metavar=hint.__name__.upper())
        text = item.metadata["help"] + ("" if item.default in (None, False) else f" (default: {item.default})")
        parser.add_argument(to_flag(item.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)


def resolve(given: dict[str, Any]) -> TrainConfig:
    """Class default < preset named by `exp` < the explicitly `given` flags."""
    exp = given.get("exp")
    if exp is not None and exp not in EXPERIMENTS:
        raise ConfigError(f"unknown experiment {exp!r}; known: {', '.join(EXPERIMENTS)}")
    return TrainConfig(**{**EXPERIMENTS.get(exp or "", {}), **given})


def read_config(run_dir: Path) -> dict[str, Any]:
    """The settings that a run was started with; empty where there is no run, CheckpointError if they are damaged."""
    path = run_dir / "config.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} is damaged; start afresh in another --save-dir")
    return settings
