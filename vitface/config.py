"""Every choice as data: a face model's settings, a training run, the recorded experiments.

A run's configuration is one flat frozen dataclass, and each of its fields is a flag of `vitface train` (see
`vitface.commands.parser`). A flag that is given wins over the preset that `--exp` names, the preset over the default.
"""

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vitface.credentials import find_secret
from vitface.errors import ConfigError, did_you_mean
from vitface.presets import EXPERIMENTS, VIT_PRESETS, ViTConfig, backbone_name, usual_settings

MAX_SIZE, MAX_IMAGE_SIZE, MAX_NUMBER = 1 << 13, 1 << 10, 1e6  # of a model, its images; files with more are refused
LEAST_TEMPERATURE = 1e-6  # of the router's softmax; below it float32 overflows
Dtype = Literal["fp32", "bf16", "fp16"]  # of the frozen backbone and its activations


@dataclass(frozen=True)
class FaceConfig:
    """Everything that shapes a face model; stored beside its tensors, so that no script can contradict it.

    `num_domains` 1 is plain LoRA, without a router; `lora_rank` 0 is the frozen backbone. `weights_sha256` is the
    SHA-256 of the converted backbone file, or "random".
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
    router_depth: int = 3
    gate_temperature: float = 1.0
    head: Literal["pretrained", "linear", "bn", "patches"] = "pretrained"
    head_levels: int = 1
    embedding_dim: int = 512
    train_patch_embed: bool = False
    train_head: bool = False
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    dtype: Dtype = "fp32"


@dataclass(frozen=True)
class Bounds:
    """The finite numbers from `least`, or from what is `above`, to `most`."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return abs(value) < math.inf and self.above < value and self.least <= value <= self.most

    def __str__(self) -> str:
        lower = f"at least {self.least}" if self.least > self.above else f"above {self.above}"
        return lower if self.most == math.inf else f"{lower} and at most {self.most}"


def flag(default: Any, text: str, *, group: str = "", bookkeeping: bool = False, **bounds: float) -> Any:
    """A field of `TrainConfig`, with its help text and, for a number, its `Bounds`.

    A `group` begins a section of --help, which the fields after it belong to as well. A field of `bookkeeping` does not
    shape what is trained.
    """
    about = {"help": text, "group": group, "bookkeeping": bookkeeping, "bounds": Bounds(**bounds) if bounds else None}
    return field(default=default, metadata=about)


class Phase(NamedTuple):
    """Training on images of one size, until `end` epochs are done."""

    side: int
    end: int


@dataclass(frozen=True)
class TrainConfig:
    """One training run, flat. Every field is a flag; the resolved values are saved in the run directory."""

    exp: str | None = flag(None, "preset to start from, see below; flags win over it", group="preset")

    backbone: str = flag("dinov2", "backbone preset or alias", group="model")
    weights: str | None = flag(
        None, "converted backbone file, or random; default: where fetch puts it", bookkeeping=True
    )
    image_size: int | str = flag(
        224,
        "input side in pixels, a multiple of the patch; 64:6,112: the first 6 epochs at 64",
        least=1,
        most=MAX_IMAGE_SIZE,
    )
    train_patch_embed: bool = flag(False, "also train the patch convolution, as the recorded experiments did")
    head: Literal["bn", "linear", "patches", "pretrained"] = flag("patches", "embedding head; of a recogniser: its own")
    train_head: bool = flag(False, "also train the pretrained head")
    head_levels: int = flag(1, "how many blocks, evenly spaced, the head patches reads; 1: the last block", least=1)
    embedding_dim: int = flag(512, "size of the embedding", least=1, most=MAX_SIZE)

    lora_rank: int = flag(16, "rank of an adapter", group="adapters", least=1, most=MAX_SIZE)
    lora_alpha: float = flag(64.0, "strength of adapters: W' = W + alpha / rank · B A", above=0, most=MAX_NUMBER)
    lora_targets: Literal["attn", "attn+mlp"] = flag("attn", "layers that get adapters")
    use_dalora: bool = flag(False, "DA-LoRA: several adapters per layer, mixed per image by a router")
    num_domains: int = flag(3, "DA-LoRA's adapters per layer", least=1, most=MAX_SIZE)
    router_depth: int = flag(3, "frozen blocks that the router looks through", least=1)
    gate_temperature: float = flag(1.0, "router's softmax temperature; low: fewer adapters", least=LEAST_TEMPERATURE)
    balance_loss_weight: float = flag(0.01, "weight of the loss that keeps all domains in use", least=0)
    domain_labels: str | None = flag(None, "CSV with columns image, domain; none: no labels, not even synthetic ones")

    train_data: str = flag(
        "data/casia-webface", "RecordIO, packed or a folder per person; synthetic, synthetic_shift", group="data"
    )
    val_data: str | None = flag("data", "folder of benchmarks, evaluated once at the end", bookkeeping=True)
    holdout_people: int = flag(10, "training people kept aside to choose the epoch by; 0: the last epoch", least=0)
    max_samples: int | None = flag(None, "train on at most this many images", least=1)
    augment: Literal["none", "flip", "strong"] = flag("strong", "random changes to training images")
    degrade: str | None = flag(None, "training images as sensors give them: lowres,blur:1-4,jpeg,nir or all")
    pack: bool = flag(True, "decode the images once, into $VITFACE_HOME, not in every epoch", bookkeeping=True)
    num_workers: int = flag(2, "processes that decode images", least=0, most=1024, bookkeeping=True)

    loss: Literal["cosface", "arcface", "adaface"] = flag("cosface", "margin softmax", group="loss")
    margin: float = flag(0.35, "margin m", least=0)
    scale: float = flag(64.0, "scale s of the cosines", above=0)
    partial_fc: float | None = flag(
        None, "split the identity matrix over the GPUs; share of the other people in a step, 1: all", above=0, most=1
    )

    epochs: int = flag(20, "passes over the data", group="optimisation", least=1)
    batch_size: int = flag(64, "images per step, over all GPUs and --grad-accum", least=1)
    grad_accum: int = flag(1, "passes per step, each on an equal part of the images", least=1)
    lr: float = flag(5e-4, "peak learning rate of adapters, router and head", above=0)
    identity_lr: float = flag(5e-3, "peak learning rate of the identity matrix", above=0)
    weight_decay: float = flag(0.05, "AdamW's weight decay, of matrices only", least=0)
    clip_grad: float = flag(5.0, "largest norm of the gradient", above=0)
    patience: int = flag(0, "stop after this many epochs without improvement; 0: never", least=0)
    seed: int = flag(0, "seed of initialisation, order and augmentation", least=0, most=2**63 - 1)

    save_dir: str | None = flag(None, "run directory; default: runs/EXP-DATE", group="run", bookkeeping=True)
    resume: str | None = flag(None, "auto: continue the run in --save-dir; or the path of a run", bookkeeping=True)
    allow_changed: bool = flag(False, "resume although settings or data have changed", bookkeeping=True)
    save_every: int | None = flag(None, "also save a checkpoint after every so many steps", least=1, bookkeeping=True)
    wandb: bool = flag(False, "also log to Weights & Biases", bookkeeping=True)
    tensorboard: bool = flag(False, "also log for TensorBoard", bookkeeping=True)
    dry_run: bool = flag(False, "two steps on synthetic faces with random weights; writes nothing")

    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...", group="device", bookkeeping=True)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "precision of the frozen backbone, auto: the fastest")
    compile: bool = flag(False, "torch.compile model and loss, half a minute at the start; it needs a C++ compiler")
    memory_budget: float | None = flag(
        None, "GB that a step may take; blocks are recomputed until it fits", above=0, bookkeeping=True
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value, bounds = getattr(self, item.name), item.metadata["bounds"]
            if bounds is not None and isinstance(value, int | float) and value not in bounds:
                raise ConfigError(f"{to_flag(item.name)} must be {bounds}, not {value}")
            kind = find_secret(value) if isinstance(value, str) else None
            if kind:
                raise ConfigError(
                    f"{to_flag(item.name)} holds {kind}; settings are saved with the run, so they hold none"
                )
        self._check_model(VIT_PRESETS[backbone_name(self.backbone)])
        self._check_batch()

    @property
    def phases(self) -> list[Phase]:
        """Images of one size after another (progressive resizing), in the order of training; ConfigError if wrong."""
        text = str(self.image_size)
        if not re.fullmatch(r"(\d{1,9}:\d{1,9},)*\d{1,9}(:[1-9]\d{0,8})?", text, re.ASCII):
            raise ConfigError(f"--image-size is a number, or SIDE:EPOCHS,...,SIDE such as 64:6,112; not {text!r:.60}")
        sides, epochs = zip(*(map(int, f"{part}:0".split(":")[:2]) for part in text.split(",")), strict=True)
        epochs = [*epochs[:-1], epochs[-1] or self.epochs - sum(epochs)]
        if min(epochs) < 1 or sum(epochs) != self.epochs:
            raise ConfigError(f"--image-size {text} must leave each size at least one of the {self.epochs} --epochs")
        return [Phase(side, end) for side, end in zip(sides, itertools.accumulate(epochs), strict=True)]

    @property
    def side(self) -> int:
        """The input side of the finished model."""
        return self.phases[-1].side

    def _check_model(self, vit: ViTConfig) -> None:
        bounds = self.__dataclass_fields__["image_size"].metadata["bounds"]
        for side in {phase.side for phase in self.phases}:
            if side not in bounds:
                raise ConfigError(f"--image-size must be {bounds}, not {side}")
            vit.grid(side)
        if self.use_dalora and self.num_domains < 2:
            raise ConfigError("--use-dalora needs --num-domains of at least 2; one domain is plain LoRA")
        blocks = f"as {self.backbone} has {vit.depth} blocks"
        if self.use_dalora and self.router_depth >= vit.depth:  # the last one computes no more than the head reads
            raise ConfigError(f"--router-depth must be at most {vit.depth - 1}, {blocks}, not {self.router_depth}")
        vit.check_head(self.head, self.head_levels, self.embedding_dim, self.train_head)

    def _check_batch(self) -> None:
        if self.holdout_people == 1 or (self.patience and not self.holdout_people):
            raise ConfigError("--holdout-people must be 0 or at least 2, and not 0 with --patience")
        if self.batch_size % self.grad_accum:
            raise ConfigError(f"--batch-size {self.batch_size} is no multiple of --grad-accum {self.grad_accum}")
        if self.batch_size // self.grad_accum < 2 and (self.head in ("bn", "patches") or self.loss == "adaface"):
            who = "AdaFace" if self.loss == "adaface" else "the batch norm of the embedding head"
            least = f"at least {2 * self.grad_accum}, twice --grad-accum"
            raise ConfigError(f"--batch-size must be {least}: {who} needs two images")


BOOKKEEPING = frozenset(item.name for item in dataclasses.fields(TrainConfig) if item.metadata["bookkeeping"])


def to_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def resolve(given: dict[str, Any]) -> TrainConfig:
    """The configuration of the explicitly `given` settings, on top of the preset that "exp" among them names."""
    exp = given.get("exp")
    if exp is not None and exp not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        raise ConfigError(f"unknown experiment {exp!r}; known: {known}{did_you_mean(exp, EXPERIMENTS)}")
    given = {**(EXPERIMENTS[exp].settings if exp else {}), **given}
    return TrainConfig(**{**usual_settings(given.get("backbone", TrainConfig.backbone), given.get("head")), **given})


def differences(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of a run's `settings` that its preset, or the defaults where it has none, would not give.

    What "auto" stood for is left out.
    """
    expected = dataclasses.asdict(resolve({"exp": settings.get("exp")}))
    differ = [name for name in expected if expected[name] != "auto" and settings.get(name) != expected[name]]
    return {name: settings.get(name) for name in differ}
