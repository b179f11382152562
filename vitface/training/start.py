"""The start of a run whose head is pretrained: what the backbone knows already is where training begins.

With the head "pretrained" and adapters that are zero, the model is the frozen recogniser. So the prototype of each
person starts at the mean embedding of some photos, and the first held-out figure is the recogniser's own.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch

from vitface.config import TrainConfig
from vitface.model.face import FaceModel
from vitface.training.batches import TrainingData
from vitface.training.holdout import embed_samples
from vitface.training.ranks.identities import ShardedMargin
from vitface.training.ranks.process_group import print0
from vitface.training.runs.log import RunLog
from vitface.training.runs.state import Margin

if TYPE_CHECKING:
    from vitface.training.loop import Trainer

PHOTOS = 10  # of each person, at most


def start_from_recogniser(trainer: "Trainer", log: RunLog | None) -> None:
    """Fills the identity matrix, and prints and logs the held-out AUC of the recogniser as epoch 0."""
    trainer.model.eval()
    means = mean_embeddings(trainer.model, trainer.data)
    put_prototypes(trainer.margin, torch.from_numpy(means))
    print0(f"the identity matrix starts at the mean embeddings of {len(means):,} people")
    score, _ = trainer.judge_held_out()
    if score is None:
        return
    print0(f"epoch 0/{trainer.config.epochs}  held-out AUC {score:.4f}, of the frozen {trainer.model.config.backbone}")
    if log is not None and not log.epochs:
        log.epoch(step=0, epoch=0, loss=None, holdout_auc=score, alarms="", img_per_s=None)


def mean_embeddings(model: FaceModel, data: TrainingData) -> np.ndarray:
    """The direction of each training person, float32 (C, E), rows of unit length: the mean of at most PHOTOS embeddings
    of unit length, evenly spaced among the person's photos."""
    labels = data.split.labels
    order = np.argsort(labels, kind="stable")
    first, count = np.unique(labels[order], return_index=True, return_counts=True)[1:]
    places = np.arange(len(order)) - np.repeat(first, count)
    step = np.repeat(-(-count // PHOTOS), count)
    chosen = order[places % step == 0]
    rows, _ = embed_samples(model, data.samples, data.split.indices[chosen], False, "people")
    means = np.zeros((data.split.num_people, rows.shape[1]), np.float32)
    np.add.at(means, labels[chosen], rows)
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)


@torch.no_grad()
def put_prototypes(margin: Margin, rows: torch.Tensor) -> None:
    """Writes the prototypes (C, E), of a matrix that lies on several ranks this one's part of them."""
    if isinstance(margin, ShardedMargin):
        rows = rows[margin.first : margin.end]
        place = margin.weight if margin.sample_rate == 1 else margin.get_buffer("all_weight")
    else:
        place = margin.weight
    place.copy_(rows)


def worse_than_frozen(config: TrainConfig, epochs: list[dict[str, str]]) -> str | None:
    """An alarm if no epoch of a run's log is above the recogniser that it started from, on the held-out people."""
    scores = [(int(float(row["epoch"])), float(row["holdout_auc"])) for row in epochs if row["holdout_auc"]]
    before = next((score for epoch, score in scores if epoch == 0), None)
    after = max((score for epoch, score in scores if epoch), default=None)
    if before is None or after is None or after > before:
        return None
    return (
        f"no epoch is above the frozen {config.backbone} on the held-out people (AUC {after:.4f} after {before:.4f}): "
        f"use it as it is, with --backbone {config.backbone}, or train on more people, with a lower --lr"
    )
