"""The parts of a run, from its settings: what "auto" stands for, the training data, the model and its loss."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vitface.config import FaceConfig, TrainConfig
from vitface.data.checks.check_images import size_alarm
from vitface.data.degrade import Sensors, parse_sensors
from vitface.data.formats.packed import PackedSamples
from vitface.data.formats.packing import cached
from vitface.data.formats.samples import FolderSamples, RecordSamples, load_samples, read_domains
from vitface.data.formats.stored import Samples
from vitface.data.loader import split_people
from vitface.data.synthetic.worlds import SYNTHETIC, SyntheticSamples
from vitface.device import resolve_device, resolve_dtype
from vitface.errors import ConfigError, DataError, VitfaceError, WeightsError
from vitface.evaluation.benchmarks import available
from vitface.extras import require
from vitface.files import cache_home
from vitface.model.face import FaceModel
from vitface.model.margin import MarginLoss, make_margin
from vitface.presets import VIT_PRESETS, backbone_name
from vitface.store.backbone import find_backbone, load_backbone, weights_sha256
from vitface.training.batches import TrainingData, micro_batch_size
from vitface.training.ranks.identities import ShardedMargin
from vitface.training.ranks.parallel import gather_rows
from vitface.training.ranks.process_group import barrier, local_device, print0
from vitface.training.runs.state import Margin

SYNTHETIC_PEOPLE, SYNTHETIC_IMAGES = 200, 20
DRY_RUN: dict[str, Any] = dict(weights="random", train_data="synthetic", val_data=None, holdout_people=0)
DRY_RUN |= dict(patience=0, num_workers=0, resume=None, wandb=False, tensorboard=False)


def resolve_choices(config: TrainConfig) -> TrainConfig:
    """Replaces every "auto" by its value on this machine, and a dry run's inputs by ones that need no files.

    Its batch stays: the plan and the two steps are those of the run.
    """
    device = resolve_device(local_device(config.device))
    width = VIT_PRESETS[backbone_name(config.backbone)].embed_dim
    dtype = resolve_dtype(config.dtype, device, width)
    weights = config.weights if config.weights in (None, "random") else str(Path(config.weights).absolute())
    config = dataclasses.replace(config, device=str(device), dtype=dtype, weights=weights)
    if config.dry_run:
        sides = ",".join(f"{phase.side}:1" for phase in config.phases)
        config = dataclasses.replace(
            config, **DRY_RUN, epochs=len(config.phases), image_size=sides, max_samples=2 * config.batch_size
        )
    return config


def open_inputs(config: TrainConfig) -> Samples:
    """The samples of --train-data, packed on first use unless --no-pack.

    ConfigError names all that is wrong or missing at once: the backbone's weights, both kinds of data, packages.
    """
    problems: list[str] = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except VitfaceError as error:
            problems.append(str(error))

    attempt(lambda: find_weights(config))
    attempt(lambda: require("tracking this run", *(name for name in ("wandb", "tensorboard") if getattr(config, name))))
    attempt(lambda: final_benchmarks(config))
    attempt(lambda: sensors_of(config))
    samples = attempt(lambda: read_samples(config))
    if problems:
        raise ConfigError("\n\n".join(problems))
    for note in samples.notes:
        print0(note)
    if isinstance(samples, RecordSamples | FolderSamples):
        samples.alarm = size_alarm(samples, str(samples.path))
        if samples.alarm:
            print0(f"ALARM {samples.alarm}")
    if isinstance(samples, PackedSamples):
        samples.verify()
    elif config.pack and isinstance(samples, RecordSamples | FolderSamples):
        packed = cached(samples, cache_home() / "packed", config.num_workers, print)
        if packed.skipped:
            print0(
                f"{len(packed.skipped)} images were skipped, see {packed.path / 'manifest.json'}: {packed.skipped[0]}"
            )
        if samples.domains is not None and packed.skipped:
            raise ConfigError(f"--domain-labels: remove the damaged images first, such as {packed.skipped[0]}")
        packed.domains, packed.alarm, samples = samples.domains, samples.alarm, packed
    return samples


def find_weights(config: TrainConfig) -> None:
    """WeightsError, which says how to get it or to point to it, if the backbone's file is not there."""
    if config.weights is None:
        find_backbone(backbone_name(config.backbone))
    elif config.weights != "random" and not Path(config.weights).is_file():
        moved = "if the backbone's file was moved, say where it is with --weights FILE"
        raise WeightsError(f"{config.weights} is not there; {moved}")


def read_samples(config: TrainConfig) -> Samples:
    """The samples of --train-data, not packed yet, with the domains of --domain-labels; DataError for bad ones."""
    labelled = config.domain_labels not in (None, "none")
    if config.train_data in SYNTHETIC:
        if labelled:
            raise DataError("--domain-labels is for your own images; synthetic faces come with their domains")
        wanted = -(-(config.max_samples or 0) // SYNTHETIC_IMAGES) if config.dry_run else 0
        people = max(SYNTHETIC_PEOPLE, wanted)
        return SyntheticSamples(people, SYNTHETIC_IMAGES, config.seed, world=config.train_data)
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
    """The training data of a run; returns when all ranks have it.

    ConfigError if the images do not fill a batch, and the errors of `open_inputs` and `split_people`.
    """
    samples = open_inputs(config)
    split = split_people(samples, config.holdout_people, config.max_samples, config.seed)
    held_out = len(np.unique(samples.labels[split.held_out]))
    if held_out < config.holdout_people:
        print0(f"ALARM --holdout-people {config.holdout_people}: {held_out_text(held_out)}")
    barrier("inputs")  # one rank packs, which may take hours, while the others wait
    if len(split.indices) < config.batch_size:
        raise ConfigError(
            f"{len(split.indices)} training images do not fill one --batch-size {config.batch_size}; lower it"
        )
    domains = samples.domains if config.use_dalora and config.domain_labels != "none" else None
    if domains is not None and domains.max() + 1 != config.num_domains:
        domains = None
    steps, sensors = len(split.indices) // config.batch_size, sensors_of(config)
    by_sensor = config.use_dalora and config.domain_labels is None and config.num_domains == len(sensors) + 1
    return TrainingData(
        samples, split, domains, steps, micro_batch_size(config), sensors, by_sensor and domains is None
    )


def sensors_of(config: TrainConfig) -> Sensors:
    """Those of --degrade; ConfigError if it names none."""
    return () if config.degrade is None else parse_sensors(config.degrade)


def held_out_text(people: int) -> str:
    """What it means that so many people were held out, because no more have two images."""
    if people:
        return f"only {people} people have two images or more, so {people} were held out"
    return "fewer than two people have two images, so nobody is held out: the last epoch counts, without a threshold"


def final_benchmarks(config: TrainConfig) -> list[str]:
    """The benchmarks of the evaluation at the end; ConfigError if --val-data names no folder, except the default."""
    if config.val_data not in (None, TrainConfig.val_data) and not (path := Path(config.val_data)).is_dir():
        folder = f"its folder, {path.parent}" if path.is_file() else "the folder of lfw.bin, cfp_fp.bin, ..."
        raise ConfigError(f"--val-data {path} is no folder; name {folder}")
    real = available(config.val_data) if config.val_data else []
    return [config.train_data, *real] if config.train_data in SYNTHETIC else real


Change = Callable[[FaceModel], None]  # of a model, before it is trained or evaluated; a study's control


def build_model(config: TrainConfig, side: int | None = None, change: Change | None = None) -> FaceModel:
    """The face model for images of `side` pixels, by default the last ones, on the device and in train mode."""
    side = config.side if side is None else side
    vit = load_backbone(config.backbone, config.weights, side)
    name = backbone_name(config.backbone)
    flags, domains = vars(config) | {"image_size": side}, config.num_domains if config.use_dalora else 1
    settings = {field.name: flags[field.name] for field in dataclasses.fields(FaceConfig) if field.name in flags}
    settings |= dict(backbone=name, weights_sha256=weights_sha256(name, config.weights), vit=vit.config)
    model = FaceModel(vit, FaceConfig(**{**settings, "num_domains": domains}), config.seed).to(config.device)
    if change is not None:
        change(model)
    return model.train()


def build_margin(config: TrainConfig, num_people: int) -> Margin:
    """The loss with its identity matrix, on the device."""
    sizes = (num_people, config.embedding_dim, config.scale, config.seed)
    if config.partial_fc is not None:  # which sees the norms of all ranks' embeddings already
        margin = ShardedMargin(make_margin(config.loss, config.margin), *sizes, config.partial_fc)
    else:
        margin = MarginLoss(make_margin(config.loss, config.margin, gather_rows), *sizes)
    return margin.to(config.device)
