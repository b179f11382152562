"""From the shared flags to objects: the model, the reader of photos, the finder of faces, the threshold."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vitface.data.faces.detect import REMARKS, FaceDetector
from vitface.data.faces.folder import Finder
from vitface.data.faces.landmarks import read_landmarks
from vitface.data.faces.photos import CropReader
from vitface.data.folders import some
from vitface.device import dtype_note, inference_dtype, resolve_device, resolve_dtype
from vitface.errors import CheckpointError, ConfigError, in_one_line
from vitface.recogniser import Recogniser
from vitface.store.faces import Checkpoint, FrozenBackbone, open_backbone, open_checkpoint, step_directories
from vitface.store.thresholds import choose_threshold
from vitface.training.ranks.process_group import broadcast

NO_THRESHOLD = (
    "no threshold was calibrated for this model: `vitface calibrate` does it with pairs, such as --bench lfw, and "
    "training with --holdout-people (FAR 0.01 needs 3,000 different pairs); or pass your own --threshold COSINE"
)


def newest_run() -> Path:
    """Returns the run in runs/ that saved a checkpoint last, and prints its name to stderr; CheckpointError if none."""
    steps = [step for run in Path("runs").glob("*/") for step in step_directories(run)]
    if not steps:
        raise CheckpointError(
            "no trained run in runs/: name one with --checkpoint RUN, or a recogniser with --backbone, or train one:\n"
            "  vitface train --exp demo"
        )
    run = max(steps, key=lambda step: step.stat().st_mtime).parent.parent
    print(f"checkpoint: {run}", file=sys.stderr)
    return run


def open_model(arguments: argparse.Namespace) -> Checkpoint:
    """The model of --checkpoint, --backbone or the newest run; ConfigError for flags that contradict each other."""
    if arguments.backbone is None:
        if arguments.image_size is not None:
            raise ConfigError("a checkpoint knows its image size; --image-size goes with --backbone")
        return open_checkpoint(arguments.checkpoint or newest_run(), arguments.weights)
    if arguments.checkpoint is not None:
        raise ConfigError("--checkpoint knows its backbone; pass either --checkpoint or --backbone")
    return open_backbone(arguments.backbone, arguments.weights, arguments.image_size)


def load_model(arguments: argparse.Namespace) -> tuple[Recogniser, Checkpoint]:
    """Loads the model of `open_model` on --device; returns its checkpoint too.

    It prints the dtype to stderr if that is not the one the model was trained in, and what a backbone is not made for.
    """
    device, checkpoint = resolve_device(arguments.device), open_model(arguments)
    trained, frozen = checkpoint.config, isinstance(checkpoint, FrozenBackbone)
    width = trained.vit.embed_dim
    here = resolve_dtype("auto", device, width) if frozen else inference_dtype(trained.dtype, device, width)
    dtype = broadcast(here)  # each rank has measured its own
    model = Recogniser.from_checkpoint(checkpoint, device, dtype).prepare()
    if frozen and trained.vit.pool != "tokens":
        print(f"note: {trained.backbone} was not trained to tell people apart; lvface_b was, for one", file=sys.stderr)
    if model.config.dtype != trained.dtype and not frozen:
        note = dtype_note(model.config.dtype, device, trained.vit.embed_dim)
        print(f"dtype: {note}; trained in {trained.dtype}", file=sys.stderr)
    return model, checkpoint


def crop_reader(arguments: argparse.Namespace) -> CropReader:
    """The reader that --align and --detector ask for; ConfigError if they contradict each other."""
    if arguments.detector and not arguments.align:
        raise ConfigError("--detector is for photos, and --no-align is for folders without any; leave one of them out")
    return CropReader(FaceDetector(arguments.detector) if arguments.detector else arguments.align)


def read_crop(reader: CropReader, path: Path) -> tuple[np.ndarray, int]:
    """(The crop of a photo, the number of faces found in it, 0 in a crop); prints what is to remark to stderr."""
    crop, faces, remarks = reader.read(path)
    for remark in remarks:
        print(in_one_line(f"{path}: {REMARKS[remark]}"), file=sys.stderr)
    return crop, faces


def make_finder(arguments: argparse.Namespace, min_face: float) -> Finder:
    """The finder that --landmarks and --detector ask for; with --landmarks alone it detects nothing."""
    landmarks = read_landmarks(arguments.landmarks) if arguments.landmarks else {}
    detector = FaceDetector(arguments.detector) if arguments.detector or not landmarks else None
    return Finder(landmarks, detector, min_face)


def threshold_of(arguments: argparse.Namespace, thresholds: Mapping[float, float]) -> tuple[float | None, float | None]:
    """(threshold, FAR) that --threshold or --far ask for; (None, None) if nothing was calibrated or asked for."""
    if arguments.threshold is None:
        return choose_threshold(thresholds, arguments.far)
    if not -1 <= arguments.threshold <= 1:
        raise ConfigError(f"--threshold is a cosine, from -1 to 1, not {arguments.threshold:g}")
    return arguments.threshold, None


def print_gone(arguments: argparse.Namespace, gone: list[str]) -> None:
    """Says which photos of OUT are not in SRC any more, and whether --prune deleted what OUT had of them."""
    if not gone:
        return
    done = "deleted" if arguments.prune else f"{arguments.out} still has them, --prune deletes them"
    print(f"{len(gone):,} gone from {arguments.src}: {some(gone)}: {done}", file=sys.stderr)
