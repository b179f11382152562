"""What the commands share: how they are described, and the model they use."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from vitface.data.faces.detect import FaceDetector
from vitface.data.faces.photos import CropReader
from vitface.device import resolve_device
from vitface.errors import CheckpointError, ConfigError
from vitface.gallery.parts import Settings
from vitface.model.face import FaceModel
from vitface.model.inference import prepare_inference
from vitface.store.faces import load_face, model_sha256, newest_run
from vitface.store.thresholds import choose_threshold

NO_THRESHOLD = (
    "no threshold was calibrated for this model: training does it with --holdout-people, where they have enough images "
    "(FAR 0.01 takes 3,000 pairs of different people); or pass your own --threshold COSINE"
)


def command_parser(name: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser that shows its examples as they are written, and takes no abbreviated flags."""
    return argparse.ArgumentParser(
        f"vitface {name}", description=description, epilog=examples, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add_model_flags(
    parser: argparse.ArgumentParser, what: str = "run (its best) or checkpoint; default: newest in runs/"
) -> None:
    """--checkpoint, which is `what`, --weights and --device."""
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="RUN", help=what)
    add("--weights", metavar="FILE", help="the frozen backbone's converted file; default: look in the usual places")
    add("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")


def add_photo_flags(parser: argparse.ArgumentParser) -> None:
    """--no-align and --detector."""
    add = parser.add_argument
    add(
        "--align",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find and align the face in every image that is not 112 x 112 pixels, which is what aligned crops are; "
        "--no-align: all images are crops",
    )
    add("--detector", type=Path, metavar="ONNX", help="YuNet's file; default: the fetched one")


def default_run() -> Path:
    """The newest run in runs/, which is said on stderr; CheckpointError says what to do where there is none."""
    try:
        run = newest_run()
    except CheckpointError:
        raise CheckpointError(
            "no trained run in runs/: name one with --checkpoint RUN, or train one:\n  python train.py --exp demo"
        ) from None
    print(f"checkpoint: {run}", file=sys.stderr)
    return run


def load_model(arguments: argparse.Namespace) -> FaceModel:
    """The model of --checkpoint, or of the newest run, on --device; sets arguments.checkpoint."""
    arguments.checkpoint = arguments.checkpoint or default_run()
    return prepare_inference(load_face(arguments.checkpoint, arguments.weights).to(resolve_device(arguments.device)))


def crop_reader(arguments: argparse.Namespace) -> CropReader:
    """How --align and --detector want images to be read."""
    if arguments.detector and not arguments.align:
        raise ConfigError("--detector is for photos, --no-align says that there are none; leave one of them out")
    return CropReader(FaceDetector(arguments.detector) if arguments.detector else arguments.align)


def gallery_settings(arguments: argparse.Namespace, model: FaceModel) -> Settings:
    """What a gallery has to know of the model that `load_model` loaded."""
    return Settings(model_sha256(arguments.checkpoint), arguments.align, model.thresholds)


def add_threshold_flags(parser: argparse.ArgumentParser) -> None:
    """--far or --threshold."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--far", type=float, metavar="RATE", help="false accept rate; default: the lowest calibrated")
    either.add_argument("--threshold", type=float, metavar="COSINE", help="your own threshold, from -1 to 1")


def threshold_of(arguments: argparse.Namespace, thresholds: Mapping[float, float]) -> tuple[float | None, float | None]:
    """(threshold, FAR) that --threshold or --far ask for; (None, None) if nothing was calibrated or asked for."""
    if arguments.threshold is None:
        return choose_threshold(thresholds, arguments.far)
    if not -1 <= arguments.threshold <= 1:
        raise ConfigError(f"--threshold is a cosine, from -1 to 1, not {arguments.threshold:g}")
    return arguments.threshold, None
