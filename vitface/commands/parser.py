"""The parser of every command, and the flags that several of them share; among them the settings of a training run."""

import argparse
import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from vitface.config import MAX_NUMBER, Bounds, TrainConfig, to_flag
from vitface.errors import did_you_mean
from vitface.presets import VIT_ALIASES, VIT_PRESETS

MAX_COUNT = 2**63 - 1
OWN_FILES = ("config.json", "gallery.json", "manifest.json", "model.json", "thresholds.json", "training.json")


class CommandParser(argparse.ArgumentParser):
    """A parser that shows its examples as they are written, and answers a mistake in one line instead of its usage.

    Flags cannot be abbreviated. A mistake ends the process with exit code 2.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Looks for unknown flags first: argparse would rather complain of the required one that was misspelt.

        It expands ~ where the shell leaves it, as in --save-dir=~/runs.
        """
        words, known = [*map(_expand_home, args or ())], self._option_string_actions
        for before, word in zip(["", *words], words, strict=False):
            if "\0" in word or word == "" or (word[:2] == "--" and word[-1] == "="):
                self.error(f"an empty text or one with the character 0{before and f' after {before}'}")
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


def _expand_home(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{os.path.expanduser(value)}"


def number(kind: type[int] | type[float], bounds: Bounds | None = None) -> Callable[[str], Any]:
    """An argument's `type`: a number that any computation can take, within `bounds` if there are some."""
    most = MAX_COUNT if kind is int else MAX_NUMBER

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            what = bounds or ("a whole number" if kind is int else "a number")
            raise argparse.ArgumentTypeError(f"must be {what}, not {text[:40]}") from None
        if abs(value) > most:
            raise argparse.ArgumentTypeError(f"must be from -{most:g} to {most:g}, not {text[:40]}")
        if bounds is not None and value not in bounds:
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    return parse


def bounds_of(field: str) -> Bounds:
    """Those of a field of `TrainConfig`."""
    return TrainConfig.__dataclass_fields__[field].metadata["bounds"]


def in_a_folder(text: str) -> Path:
    """A path in a folder that exists."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path}: its folder does not exist")
    return path


def output_file(suffix: str) -> Callable[[str], Path]:
    """An argument's `type`: a path in a folder that exists, where at most a file of the same kind is replaced."""

    def file(text: str) -> Path:
        path = in_a_folder(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
        if path.is_file() and (path.suffix.lower() != suffix or path.name in OWN_FILES):
            raise argparse.ArgumentTypeError(f"{path} exists and is no {suffix} file to replace; name another")
        return path

    return file


def new_path(text: str) -> Path:
    """An argument's `type`: a file or folder that does not exist yet, in a folder that does."""
    path = in_a_folder(text)
    if path.exists() or path.is_symlink():
        raise argparse.ArgumentTypeError(f"{path} exists; name one that does not")
    return path


SHARED: dict[str, dict[str, Any]] = {
    "--checkpoint": dict(type=Path, metavar="RUN", help="run (its best) or checkpoint; default: newest in runs/"),
    "--weights": dict(metavar="FILE", help="the frozen backbone's converted file; default: look in the usual places"),
    "--backbone": dict(
        choices=[*VIT_ALIASES, *VIT_PRESETS],
        metavar="NAME",
        help="this frozen backbone as it is, such as a recogniser; `vitface backbones` lists them",
    ),
    "--image-size": dict(
        type=number(int, bounds_of("image_size")),
        help="input side in pixels, with --backbone only (default: 224, or what it takes)",
    ),
    "--device": dict(default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)"),
    "--align": dict(
        action=argparse.BooleanOptionalAction,
        default=True,
        help="find and align the face in every image that is not 112 x 112 pixels, which is what aligned crops are; "
        "--no-align: all images are crops",
    ),
    "--prune": dict(action="store_true", help="delete what OUT has of photos that are no longer there"),
    "--detector": dict(type=Path, metavar="ONNX", help="YuNet's file; default: the fetched one"),
    "--landmarks": dict(type=Path, metavar="CSV", help="file, x1, y1, ... x5, y5; such photos need no detector"),
    "--num-workers": dict(
        type=number(int, bounds_of("num_workers")), default=os.cpu_count() or 1, help="processes (default: all cores)"
    ),
    "--dry-run": dict(action="store_true", help="say how long it will take, from a measured second; writes nothing"),
    "--far": dict(type=number(float), metavar="RATE", help="false accept rate; default: the lowest calibrated"),
    "--threshold": dict(type=number(float), metavar="COSINE", help="your own threshold, from -1 to 1"),
    "--docs": dict(type=output_file(".md"), metavar="FILE.md", help="also put the table there, between two markers"),
    "--json": dict(action="store_true", help="print the result as JSON"),  # see `print_result`
}
MODEL_FLAGS = ("--checkpoint", "--backbone", "--image-size", "--weights", "--device")  # see `inputs.open_model`
PHOTO_FLAGS = ("--align", "--detector")  # see `inputs.crop_reader`
FINDER_FLAGS = ("--landmarks", "--detector", "--num-workers")  # see `inputs.make_finder`
THRESHOLD_FLAGS = ("--far", "--threshold")  # see `inputs.threshold_of`


def add_shared(parser: argparse._ActionsContainer, *flags: str) -> None:
    """Adds some of the SHARED flags to a parser, or to a group of its flags."""
    for flag in flags:
        parser.add_argument(flag, **SHARED[flag])


def print_result(arguments: argparse.Namespace, result: Any, text: str) -> None:
    """Prints the `result` of a command as JSON if --json is given, otherwise as `text`."""
    print(json.dumps(result, indent=1) if arguments.json else text)


def add_settings(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Adds one flag for each field of `TrainConfig`, in its groups, but none for those `without`.

    A bool gets --x and --no-x, a Literal its choices.

    A flag that is not given leaves no attribute in the parsed arguments.
    """
    hints, group = typing.get_type_hints(TrainConfig), parser.add_argument_group("settings")
    for item in dataclasses.fields(TrainConfig):
        if item.metadata["group"]:
            group = parser.add_argument_group(item.metadata["group"])
        if item.name in without:
            continue
        default = "on" if item.default is True else item.default
        text = item.metadata["help"] + ("" if default is None or default is False else f" (default: {default})")
        options = _options(hints[item.name])
        group.add_argument(to_flag(item.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)


def _options(hint: Any) -> dict[str, Any]:
    """Returns argparse's options for the type of a field."""
    if hint == int | str:
        return {"type": lambda text: text if ":" in text else number(int)(text), "metavar": "SIDE[:EPOCHS,...]"}
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    return {"type": hint if hint is str else number(hint), "metavar": hint.__name__.upper()}
