"""What the parsers of all commands share: their answer to a mistake, and the flags that several of them have."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vitface.errors import did_you_mean, exit_code


class CommandParser(argparse.ArgumentParser):
    """A parser that shows its examples as they are written, and answers a mistake in one line instead of its usage.

    Flags cannot be abbreviated. A mistake ends the process with exit code 2.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Looks for unknown flags first: argparse would rather complain of the required one that was misspelt."""
        words = list(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # a parser with subcommands has no flags of its own
            for word in words[: words.index("--") if "--" in words else None]:
                self._check_flag(word.partition("=")[0])
        namespace, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unexpected {' '.join(unknown)}")
        return namespace, []

    def _check_flag(self, flag: str) -> None:
        known = self._option_string_actions
        if flag.startswith("--") and flag not in known:
            self.error(f"unknown flag {flag}{did_you_mean(flag, known)}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nsee {self.prog} --help\n")

    def run(self, action: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None) -> int:
        """The exit code of `action` on the parsed arguments (see `exit_code`)."""
        arguments = self.parse_args(argv)
        return exit_code(lambda: action(arguments))


def add_weights_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", metavar="FILE", help="the frozen backbone's converted file; default: look in the usual places"
    )


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")


def add_model_flags(
    parser: argparse.ArgumentParser, what: str = "run (its best) or checkpoint; default: newest in runs/"
) -> None:
    """--checkpoint, which is `what`, --weights and --device."""
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help=what)
    add_weights_flag(parser)
    add_device_flag(parser)


def add_photo_flags(parser: argparse.ArgumentParser) -> None:
    """--no-align and --detector."""
    parser.add_argument(
        "--align",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find and align the face in every image that is not 112 x 112 pixels, which is what aligned crops are; "
        "--no-align: all images are crops",
    )
    add_detector_flag(parser)


def add_finder_flags(parser: argparse.ArgumentParser) -> None:
    """How the faces in a folder of photos are found: --landmarks, --detector, --num-workers."""
    landmarks = "file, x1, y1, ... x5, y5; such photos need no detector"
    parser.add_argument("--landmarks", type=Path, metavar="CSV", help=landmarks)
    add_detector_flag(parser)
    add_workers_flag(parser)


def add_detector_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detector", type=Path, metavar="ONNX", help="YuNet's file; default: the fetched one")


def add_workers_flag(parser: argparse.ArgumentParser) -> None:
    cores = os.cpu_count() or 1
    parser.add_argument("--num-workers", type=int, default=cores, help="processes (default: all cores)")


def add_threshold_flags(parser: argparse.ArgumentParser) -> None:
    """--far or --threshold."""
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--far", type=float, metavar="RATE", help="false accept rate; default: the lowest calibrated")
    either.add_argument("--threshold", type=float, metavar="COSINE", help="your own threshold, from -1 to 1")
