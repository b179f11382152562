"""The held-out people, on whom a run is not trained: they decide its best epoch, its alarms and its thresholds.

A threshold is for the cosine of two embeddings of `Recogniser.embed`: the same person if it is >= the threshold. The
file is the run's thresholds.json (see `vitface.store.thresholds`).
"""

from collections.abc import Iterator, Sequence

import numpy as np

from vitface.data.formats.stored import Samples
from vitface.data.loader import read_batches
from vitface.data.progress import Progress
from vitface.files import json_bytes, replace_file
from vitface.model.face import FaceModel
from vitface.model.inference import embed_batches, split
from vitface.store.faces import Checkpoint
from vitface.store.thresholds import THRESHOLDS_FILE, calibrate_scores
from vitface.training.batches import TrainingData
from vitface.training.ranks.parallel import in_turns
from vitface.training.ranks.process_group import rank

HOLDOUT_IMAGES = 2000
COLLAPSED = 0.99  # mean cosine of different images above which embeddings have collapsed,
USELESS = 0.7  # if the AUC is below this as well: an offset that all embeddings share does no harm
UNUSED = 0.01  # mean weight of a domain below which it is unused, as a fraction of the even share 1 / K


def embed_held_out(
    model: FaceModel, samples: Samples, held_out: np.ndarray, flip: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings (n, E), domain weights (n, K) and people (n,) of at most HOLDOUT_IMAGES of these samples."""
    held_out = held_out[:: -(-len(held_out) // HOLDOUT_IMAGES)]
    embeddings, gates = embed_samples(model, samples, held_out, flip, "held-out people")
    return embeddings, gates, samples.labels[held_out]


def embed_samples(
    model: FaceModel, samples: Samples, indices: np.ndarray, flip: bool, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, E) and domain weights (n, K) of samples, over all ranks; `what` they are called on the screen."""
    positions = np.array_split(np.arange(len(indices)), -(-len(indices) // 128))

    def embed(turns: Sequence[int]) -> Iterator[np.ndarray]:
        read = read_batches(samples, indices, [positions[turn] for turn in turns])
        for turn, (_, crops) in zip(turns, read, strict=True):
            yield np.hstack(embed_batches(model, split(model, crops, flip), flip))
            bar.update(turn + 1 - bar.n)

    with Progress(desc=what, total=len(positions), unit="batch", leave=False, dynamic_ncols=True) as bar:
        rows = in_turns(embed, len(positions))
    embeddings, gates = np.split(rows, [model.config.embedding_dim], axis=1)
    return embeddings, gates


def all_pairs(embeddings: np.ndarray, people: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, issame) of each of the n (n - 1) / 2 pairs of unit-norm embeddings (n, E)."""
    first, second = np.triu_indices(len(people), 1)
    return (embeddings @ embeddings.T)[first, second], people[first] == people[second]


def alarms(embeddings: np.ndarray, auc: float, gates: np.ndarray | None) -> dict[str, str]:
    """Unit-norm embeddings (n, E), the AUC of their pairs, and domain weights (n, K) or None -> {alarm: sentence}.

    They find a run whose losses are finite, but which no longer learns. A sentence has the likely cause and what to
    change; {} if all is well. The embeddings must be of eval mode: in train mode, the head's batch norm spreads even
    constant ones.
    """
    found, n = {}, len(embeddings)
    cosine = (np.square(embeddings.sum(axis=0, dtype=np.float64)).sum() - n) / (n * (n - 1))
    if cosine > COLLAPSED and auc < USELESS:
        found["collapse"] = (
            f"the embeddings are nearly constant (mean cosine {cosine:.4f} between held-out images, AUC {auc:.3f}); "
            f"likely causes: --lr or --identity-lr too high, or a --margin too hard for so early an epoch"
        )
    if gates is not None:
        usage = gates.mean(axis=0, dtype=np.float64)
        dead = np.flatnonzero(usage < UNUSED / len(usage))
        if len(dead):
            found["dead router"] = (
                f"domain {', '.join(map(str, dead))} of {len(usage)} gets almost no image (mean gates "
                f"{', '.join(f'{share:.4f}' for share in usage)}); its adapter no longer learns; "
                f"raise --balance-loss-weight or lower --num-domains"
            )
    return found


def calibrate(data: TrainingData, checkpoint: Checkpoint, model: FaceModel) -> str:
    """Writes the thresholds of a run's checkpoint, whose model is `model`; returns them in words, a line per FAR."""
    assert checkpoint.run is not None
    if not len(data.split.held_out):
        return "thresholds: none, nobody was held out"
    embeddings, _, people = embed_held_out(model, data.samples, data.split.held_out, flip=True)
    calibration, lines = calibrate_scores(*all_pairs(embeddings, people))
    if rank() == 0:
        written = {"model": checkpoint.sha256, **calibration}
        replace_file(checkpoint.run / THRESHOLDS_FILE, json_bytes(written))
    same, different = calibration["pairs"].values()
    first = f"thresholds on the cosine, from {same:,} same and {different:,} different pairs held out"
    return "\n".join([first, *lines])
