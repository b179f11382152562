"""The parser of every command, and the flags that several of them share."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vitface.errors import did_you_mean


class CommandParser(argparse.ArgumentParser):
    """A parser that shows its examples as they are written, and answers a mistake in one line instead of its usage.

    Flags cannot be abbreviated. A mistake ends the process with exit code 2.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Looks for unknown flags first: argparse would rather complain of the required one that was misspelt."""
        words, known = list(args or ()), self._option_string_actions
        if self._subparsers is None:  # a parser with subcommands has no flags of its own
            for word in words[: words.index("--") if "--" in words else None]:
                flag = word.partition("=")[0]
                if flag.startswith("--") and flag not in known:
                    self.error(f"unknown flag {flag}{did_you_mean(flag, known)}")
        namespace, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unexpected {' '.join(unknown)}")
        return namespace, []

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nsee {self.prog} --help\n")


def output_file(text: str) -> Path:
    """An argument's `type`: a path in a folder that exists."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: its folder does not exist")
    return path


def new_path(text: str) -> Path:
    """An argument's `type`: a file or folder that does not exist yet, in a folder that does."""
    path = output_file(text)
    if path.exists() or path.is_symlink():
        raise argparse.ArgumentTypeError(f"{path} exists; name one that does not")
    return path


SHARED: dict[str, dict[str, Any]] = {
    "--checkpoint": dict(type=Path, metavar="RUN", help="run (its best) or checkpoint; default: newest in runs/"),
    "--weights": dict(metavar="FILE", help="the frozen backbone's converted file; default: look in the usual places"),
    "--device": dict(default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)"),
    "--align": dict(
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find and align the face in every image that is not 112 x 112 pixels, which is what aligned crops are; "
        "--no-align: all images are crops",
    ),
    "--detector": dict(type=Path, metavar="ONNX", help="YuNet's file; default: the fetched one"),
    "--landmarks": dict(type=Path, metavar="CSV", help="file, x1, y1, ... x5, y5; such photos need no detector"),
    "--num-workers": dict(type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"),
    "--far": dict(type=float, metavar="RATE", help="false accept rate; default: the lowest calibrated"),
    "--threshold": dict(type=float, metavar="COSINE", help="your own threshold, from -1 to 1"),
}
MODEL_FLAGS = ("--checkpoint", "--weights", "--device")  # see `inputs.load_model`
PHOTO_FLAGS = ("--align", "--detector")  # see `inputs.crop_reader`
FINDER_FLAGS = ("--landmarks", "--detector", "--num-workers")  # see `inputs.make_finder`
THRESHOLD_FLAGS = ("--far", "--threshold")  # see `inputs.threshold_of`


def add_shared(parser: argparse._ActionsContainer, *flags: str) -> None:
    """Adds some of the SHARED flags to a parser, or to a group of its flags."""
    for flag in flags:
        parser.add_argument(flag, **SHARED[flag])
