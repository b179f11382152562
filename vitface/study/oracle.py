"""Where a gate can pay: adapters that are chosen by what is known of each photo, an oracle, against other arms.

In the study "sensors" a photo's kind is its sensor (see `vitface.data.degrade`), in "poses" how far the face is turned.
Each cell is an ordinary run directory, FOLDER/SETTING/ARM-sSEED; it is judged on people who were kept back from all
runs, and not trained or judged again. FOLDER/map.md, map.svg and map.json have the leads of the oracle.
Letters: n photos, M pairs, K domains.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitface.config import TrainConfig
from vitface.data.degrade import degrade_crops, parse_sensors
from vitface.data.faces.detect import FaceDetector
from vitface.errors import CheckpointError, ConfigError
from vitface.evaluation.judging import judged
from vitface.evaluation.protocol import Verification, pair_distance, verify
from vitface.evaluation.scores import SCORES, load_scores, save_scores
from vitface.files import check_output, make_folder, sha256_bytes
from vitface.lock import waiting_lock
from vitface.recogniser import Recogniser
from vitface.store.faces import open_checkpoint
from vitface.study.controls import KnownRouter, known_gate, known_gate_shuffled, uniform_gate
from vitface.study.map import Arms, write_map
from vitface.study.strangers import (
    EDGES,
    RANDOM,
    YAW,
    Judged,
    fixed_domain,
    judged_anyhow,
    judged_by_yaw,
    keep_people_back,
    label_at_random,
    label_yaw,
)
from vitface.training.run import run
from vitface.training.setup import read_samples, resolve_choices

SOME, MOST_PAIRS = 50, 3000  # people of the smaller training set; same pairs, and different ones, of a set
RANKS, EPOCHS = (4, 2, 1), (3, 10, 20)
Control = Callable[..., None]
NOTHING: dict[str, Any] = {"domain_labels": "none"}


def arms(base: TrainConfig) -> dict[str, tuple[dict[str, Any], Control | None]]:
    """{arm: (its settings that differ from `base`, its control)}, those that tell most first.

    "lora_wide" and all arms of DA-LoRA but the learned gate have equally many trained parameters. "lora_wide_low" and
    "uniform" are the same function of the same parameters; "lora_low" has its scale at the rank of "lora".
    """
    one, k = {**NOTHING, "use_dalora": False}, base.num_domains
    several = {"use_dalora": True}
    wide = {**one, "lora_rank": k * base.lora_rank}
    random = RANDOM.format(k)
    return {
        "oracle": (several, known_gate),
        "lora_wide": ({**wide, "lora_alpha": k * base.lora_alpha}, None),
        "lora_wide_low": ({**wide, "lora_alpha": base.lora_alpha}, None),
        "lora": (one, None),
        "lora_low": ({**one, "lora_alpha": base.lora_alpha / k}, None),
        "uniform": ({**several, **NOTHING}, uniform_gate),
        "shuffled": (several, known_gate_shuffled),
        "fixed": ({**several, "domain_labels": random}, known_gate),
        "dalora": ({**several, **NOTHING}, None),
        "dalora_labelled": (several, None),
    }


def settings(base: TrainConfig, photos: int, photos_of_some: int) -> dict[str, dict[str, Any]]:
    """{setting: what differs from `base`}, along one axis each: epochs, rank, people; all with as many steps per epoch
    and person, and fewer people with as many steps in all."""
    scale = base.lora_alpha / base.lora_rank
    return {
        "base": {},
        **{f"epochs_{number}": {"epochs": number} for number in EPOCHS if number != base.epochs},
        **{f"rank_{rank}": {"lora_rank": rank, "lora_alpha": rank * scale} for rank in RANKS if rank < base.lora_rank},
        f"people_{SOME}": {"train_data": f"train-{SOME}", "epochs": round(base.epochs * photos / photos_of_some)},
    }


@dataclasses.dataclass(frozen=True)
class OracleStudy:
    """A study, "sensors" or "poses", of a recipe `base` in a `folder`."""

    name: str
    base: TrainConfig
    folder: Path

    @functools.cached_property
    def judged(self) -> Judged:
        how = judged_anyhow if self.name == "sensors" else judged_by_yaw
        return how(self.folder / "people" / "judged", MOST_PAIRS)

    def prepare(self) -> None:
        """Writes the people who train and are judged, and the domains of their photos."""
        people = self.folder / "people"
        keep_people_back(read_samples(self.base), people, SOME)
        for name in ("train", f"train-{SOME}"):
            label_at_random(people / name, self.base.num_domains)
        if self.name == "poses":
            detector = FaceDetector()
            for name in ("train", f"train-{SOME}", "judged"):
                label_yaw(people / name, detector)

    def config(self, setting: dict[str, Any], arm: str, cell: Path, seed: int) -> TrainConfig:
        """The settings of one cell."""
        base = dataclasses.replace(self.base, train_data="train")
        base = dataclasses.replace(base, **setting)
        changes = arms(base)[arm][0]
        people = self.folder / "people" / base.train_data
        labels = changes.get("domain_labels", YAW if self.name == "poses" else None)
        if labels not in (None, "none"):
            labels = str(people.with_name(f"{people.name}-{labels}"))
        changes = {**changes, "domain_labels": labels, "train_data": str(people), "seed": seed}
        return dataclasses.replace(base, **changes, save_dir=str(cell), resume="auto")

    def conditions(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, photos uint8 (n, 112, 112, 3), their known domains (n,)), one after the other."""
        samples = self.judged.samples
        crops = np.stack([samples.read(i) for i in range(len(samples))])
        yield "", crops, self.judged.domains
        for number, sensor in enumerate(parse_sensors(self.base.degrade) if self.base.degrade else (), 1):
            yield sensor.kind, degrade_crops(crops, (sensor,), np.arange(len(crops))), np.full(len(crops), number)

    def results(self, model: Recogniser, fixed: bool) -> dict[str, Verification]:
        """A model's result on each set of pairs: with `fixed`, photos have the domains of `fixed_domain`."""
        kept, found, plain = self.judged, {}, np.zeros(0)
        names = kept.samples.image_names()
        random = np.array([fixed_domain(name, self.base.num_domains) for name in names])
        for kind, crops, known in self.conditions():
            rows = embed_known(model, crops, random if fixed else known)
            plain = plain if kind else rows
            for name, (first, second, issame) in kept.pairs.items():
                named = {name: rows} if self.name == "poses" else {kind or "plain": rows}
                named |= {f"plain-{kind}": plain} if kind else {}
                for label, other in named.items():
                    result = verify(pair_distance(other[first], rows[second]), issame)
                    people = np.stack([kept.people[first], kept.people[second]], axis=1)
                    about = f"{kept.samples.files} {label} {self.base.degrade} {first.tolist()} {second.tolist()}"
                    found[label] = dataclasses.replace(result, people=people, data=sha256_bytes(about.encode()))
        return found


def embed_known(model: Recogniser, crops: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """Embeddings of photos whose domains (n,) the gate is told, if it is one that has to be."""
    router = model.model.router
    if not isinstance(router, KnownRouter):
        return model.embed(crops)
    rows = np.zeros((len(crops), model.config.embedding_dim), np.float32)
    for domain in np.unique(domains).tolist():
        router.domain = domain
        rows[domains == domain] = model.embed(crops[domains == domain])
    return rows


def run_oracle(
    name: str,
    base: TrainConfig,
    chosen: list[str] | None,
    which: list[str] | None,
    seeds: list[int],
    folder: Path,
    command: str,
) -> None:
    """Trains and judges the cells that are not done yet, of the chosen arms and settings, and writes the map of all
    that are there; setting by setting, seed by seed."""
    kinds = parse_sensors(base.degrade or "") if name == "sensors" else EDGES
    base = dataclasses.replace(base, num_domains=len(kinds) + 1)
    if base.holdout_people:
        raise ConfigError(f"the study {name} keeps people of its own back; --holdout-people must be 0")
    study = OracleStudy(name, base, folder)
    check_output(folder, ("map.md", "people"))
    make_folder(folder)
    with waiting_lock(folder / ".lock"):  # several processes may share a study, each with its seeds
        study.prepare()
    grids = all_settings(study)
    for kind, given, known in (("variant", chosen, arms(base)), ("setting", which, grids)):
        for unknown in set(given or ()) - set(known):
            raise ConfigError(f"unknown {kind} {unknown!r}; known: {', '.join(known)}")
    device = torch.device(resolve_choices(base).device)
    for setting in which or list(grids):
        for seed in seeds:
            for arm in chosen or list(arms(base)):
                cell = folder / setting / f"{arm}-s{seed}"
                print(f"\n=== {cell}")
                config, control = study.config(grids[setting], arm, cell, seed), arms(base)[arm][1]
                change = control and functools.partial(control, seed=seed)
                run(config, with_frozen=False, change=change)
                judge_cell(study, cell, device, change, fixed=arm in ("fixed", "shuffled"))
                write_map(folder, name, arm_results(folder, grids, list(arms(base))), about(base, command))
    print(f"\n{(folder / 'map.md').read_text(encoding='utf-8')}")


def all_settings(study: OracleStudy) -> dict[str, dict[str, Any]]:
    photos = [len(list((study.folder / "people" / name).glob("*/*"))) for name in ("train", f"train-{SOME}")]
    return settings(study.base, *photos)


def about(base: TrainConfig, command: str) -> dict[str, Any]:
    device = resolve_choices(base).device
    return {"command": command, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "device": device}


def judge_cell(study: OracleStudy, cell: Path, device: torch.device, change: Control | None, fixed: bool) -> None:
    """Keeps a run's results, unless those of its checkpoint are kept already."""
    checkpoint = open_checkpoint(cell, study.base.weights)
    with suppress(CheckpointError):
        if load_scores(cell / SCORES)[1] == checkpoint.sha256:
            return
    save_scores(cell / SCORES, study.results(judged(checkpoint, device, change), fixed), checkpoint.sha256)


def arm_results(folder: Path, grids: dict[str, Any], names: list[str]) -> dict[str, Arms]:
    """{setting: {arm: {seed: results}}} of all cells that were judged."""
    found: dict[str, Arms] = {}
    for setting in grids:
        for arm in names:
            for cell in sorted((folder / setting).glob(f"{arm}-s[0-9]*")):
                with suppress(CheckpointError):
                    results = load_scores(cell / SCORES)[0]
                    found.setdefault(setting, {}).setdefault(arm, {})[int(cell.name.rpartition("-s")[2])] = results
    return found
