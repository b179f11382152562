"""What a run is made of: the choices that "auto" stands for, the samples, the model, and how large it is."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vitface.config import FaceConfig, TrainConfig, backbone_name
from vitface.data.formats.packed import PackedSamples
from vitface.data.formats.packing import cached
from vitface.data.formats.samples import FolderSamples, RecordSamples, Samples, load_samples, read_domains
from vitface.data.loader import split_people
from vitface.data.synthetic.worlds import SYNTHETIC, SyntheticSamples
from vitface.device import resolve_device, resolve_dtype
from vitface.errors import ConfigError, DataError, VitfaceError
from vitface.evaluation.benchmarks import available
from vitface.extras import require
from vitface.home import cache_home
from vitface.model.face import FaceModel, fastest_ops
from vitface.model.margin import MarginLoss, make_margin
from vitface.store.backbones import find_backbone, load_backbone, weights_sha256
from vitface.training.batches import Batch, TrainingData, micro_batch_size
from vitface.training.ranks.identities import ShardedMargin
from vitface.training.ranks.parallel import gather_rows
from vitface.training.ranks.process_group import barrier, launched, local_device
from vitface.training.runs.state import Margin
from vitface.training.step import total_loss

SYNTHETIC_PEOPLE, SYNTHETIC_IMAGES = 200, 20
T = TypeVar("T")


def resolve_choices(config: TrainConfig) -> TrainConfig:
    """Replaces every "auto" by what it means on this machine, and a dry run's inputs by ones that need no files."""
    device = resolve_device(local_device(config.device))
    dtype = resolve_dtype(config.dtype, device)
    weights = config.weights if config.weights in (None, "random") else str(Path(config.weights).absolute())
    config = dataclasses.replace(config, device=str(device), dtype=dtype, weights=weights)
    if config.dry_run:
        batch = min(config.batch_size, 8 * launched())
        config = dataclasses.replace(
            config,
            weights="random",
            train_data="synthetic",
            val_data=None,
            epochs=1,
            batch_size=batch,
            max_samples=2 * batch,
            grad_accum=1,
            holdout_people=0,
            patience=0,
            num_workers=0,
            resume=None,
            wandb=False,
            tensorboard=False,
        )
    return config


def open_inputs(config: TrainConfig) -> Samples:
    """The training samples that `--train-data` names, packed on first use unless `--no-pack`.

    ConfigError names everything that is wrong or missing at once: the backbone's weights, both kinds of data, packages.
    """
    problems: list[str] = []

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except VitfaceError as error:
            problems.append(str(error))

    attempt(lambda: config.weights or find_backbone(backbone_name(config.backbone)))
    attempt(lambda: require("tracking this run", *(name for name in ("wandb", "tensorboard") if getattr(config, name))))
    attempt(lambda: final_benchmarks(config))
    samples = attempt(lambda: read_samples(config))
    if problems or samples is None:
        raise ConfigError("\n\n".join(problems))
    if isinstance(samples, PackedSamples):
        samples.verify()
    elif config.pack and isinstance(samples, RecordSamples | FolderSamples):
        packed = cached(samples, cache_home() / "packed", config.num_workers, print)
        if samples.domains is not None and packed.skipped:
            raise ConfigError(f"--domain-labels: remove the damaged images first, such as {packed.skipped[0]}")
        packed.domains, samples = samples.domains, packed
    return samples


def read_samples(config: TrainConfig) -> Samples:
    """The samples of `--train-data`, not packed yet, with the domains of `--domain-labels`; DataError for bad ones."""
    labelled = config.domain_labels not in (None, "none")
    if config.train_data in SYNTHETIC:
        if labelled:
            raise DataError("--domain-labels is for your own images; synthetic faces come with their domains")
        return SyntheticSamples(SYNTHETIC_PEOPLE, SYNTHETIC_IMAGES, config.seed, world=config.train_data)
    samples = load_samples(config.train_data)
    if labelled and config.use_dalora:
        if isinstance(samples, PackedSamples):
            raise DataError("--domain-labels names images: pass the folder that was packed, it has the names")
        samples.domains = read_domains(str(config.domain_labels), samples.image_names())
        found = int(samples.domains.max()) + 1
        if found != config.num_domains:
            raise DataError(
                f"{config.domain_labels} has {found} different domains; pass --num-domains {found} to train with them"
            )
    return samples


def open_data(config: TrainConfig) -> TrainingData:
    """The training data of a run, on every rank once all have it; errors as `open_inputs` and `split_people`.

    ConfigError also if the images do not fill a batch.
    """
    samples = open_inputs(config)
    split = split_people(samples, config.holdout_people, config.max_samples, config.seed)
    barrier("inputs")  # packing takes one rank hours, and the others wait
    if len(split.indices) < config.batch_size:
        raise ConfigError(
            f"{len(split.indices)} training images do not fill one --batch-size {config.batch_size}; lower it"
        )
    domains = samples.domains if config.use_dalora and config.domain_labels != "none" else None
    if domains is not None and domains.max() + 1 != config.num_domains:
        domains = None
    steps = len(split.indices) // config.batch_size
    return TrainingData(samples, split, domains, steps, micro_batch_size(config))


def final_benchmarks(config: TrainConfig) -> list[str]:
    """What the run is evaluated on at its end; ConfigError for a `--val-data` that is none (the default may be)."""
    if config.val_data not in (None, TrainConfig.val_data) and not Path(config.val_data).is_dir():
        raise ConfigError(f"--val-data {config.val_data} is no folder; name the one of lfw.bin, cfp_fp.bin, ...")
    real = available(config.val_data) if config.val_data else []
    return [config.train_data, *real] if config.train_data in SYNTHETIC else real


Change = Callable[[FaceModel], None]  # of a model, before it is trained or evaluated; a study's control


def build_model(config: TrainConfig, num_people: int, change: Change | None = None) -> tuple[FaceModel, Margin]:
    """The face model around its frozen backbone and the loss with its identity matrix, on the device, in train mode."""
    vit = load_backbone(config.backbone, config.weights, config.image_size)
    name = backbone_name(config.backbone)
    face = FaceConfig(
        backbone=name,
        weights_sha256=weights_sha256(name, config.weights),
        vit=vit.config,
        image_size=config.image_size,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_targets=config.lora_targets,
        num_domains=config.num_domains if config.use_dalora else 1,
        router_depth=config.router_depth,
        gate_temperature=config.gate_temperature,
        head=config.head,
        head_levels=config.head_levels,
        embedding_dim=config.embedding_dim,
        train_patch_embed=config.train_patch_embed,
        dtype=config.dtype,  # type: ignore[arg-type]  # "auto" is resolved by now
    )
    model = FaceModel(vit, face, config.seed).to(config.device)
    model.use_ops(fastest_ops(torch.device(config.device)))
    if change is not None:
        change(model)
    sizes = (num_people, config.embedding_dim, config.scale, config.seed)
    if config.partial_fc is not None:  # which sees the norms of all ranks' embeddings already
        margin = ShardedMargin(make_margin(config.loss, config.margin), *sizes, config.partial_fc)
    else:
        margin = MarginLoss(make_margin(config.loss, config.margin, gather_rows), *sizes)
    return model.train(), margin.to(config.device)


def parameter_counts(model: FaceModel) -> dict[str, tuple[int, int]]:
    """(total, trainable) parameters of "backbone", "adapters", "router", "head" and "all"."""
    counts = {"backbone": [0, 0], "adapters": [0, 0], "router": [0, 0], "head": [0, 0], "all": [0, 0]}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0] if not name.startswith("vit.") else "adapters" if "lora_" in name else "backbone"
        for key in (part, "all"):
            counts[key][0] += parameter.numel()
            counts[key][1] += parameter.numel() * parameter.requires_grad
    return {key: (total, trainable) for key, (total, trainable) in counts.items()}


def parameter_table(model: FaceModel, margin: Margin) -> str:
    """The counts as text, a line per part; the identity matrix is counted apart."""
    rows = [f"{'parameters':<12}{'total':>14}{'trainable':>14}{'%':>9}"]
    for part, (total, trainable) in parameter_counts(model).items():
        if total:
            rows.append(f"{part:<12}{total:>14,}{trainable:>14,}{100 * trainable / total:>9.2f}")
    people = margin.num_identities
    rows.append(f"{'identities':<12}{people * margin.weight.shape[1]:>14,}  (training only, {people:,} people)")
    return "\n".join(rows)


def seconds_per_step(model: nn.Module, margin: nn.Module, micro_batch: int, config: TrainConfig) -> float:
    """Times one forward and backward pass on blank images, after one to warm up; leaves the model as it was.

    A step has --grad-accum of them.
    """
    kept = {name for module in (model, margin) for name in module.state_dict()}  # not what `draw` draws from
    buffers = [buffer for module in (model, margin) for name, buffer in module.named_buffers() if name in kept]
    before = [buffer.clone() for buffer in buffers]
    images = torch.zeros(micro_batch, 3, config.image_size, config.image_size, device=config.device)
    labels = torch.zeros(micro_batch, dtype=torch.long, device=config.device)
    batch = Batch(images, labels, None, np.zeros(1, int))
    start = 0.0
    if isinstance(margin, ShardedMargin):
        margin.draw(0, batch.people)
    for _ in range(2):
        _synchronise(images)
        start = time.perf_counter()
        total_loss(model, margin, batch, config)["loss"].backward()
        _synchronise(images)
    if isinstance(margin, ShardedMargin):
        margin.put_back()
    for module in (model, margin):
        module.zero_grad(set_to_none=True)
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
    return config.grad_accum * (time.perf_counter() - start)


def _synchronise(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
