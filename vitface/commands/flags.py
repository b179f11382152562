"""The settings of a run as flags of a command line."""

import argparse
import dataclasses
import types
import typing
from typing import Any, Literal

from vitface.config import EXPERIMENTS, TrainConfig, to_flag


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of `TrainConfig`, in its groups; a flag that is not given leaves no trace in the result.

    A bool gets --x and --no-x, a Literal its choices.
    """
    hints, group = typing.get_type_hints(TrainConfig), parser.add_argument_group("settings")
    for item in dataclasses.fields(TrainConfig):
        if item.metadata["group"]:
            group = parser.add_argument_group(item.metadata["group"])
        default = "on" if item.default is True else item.default
        text = item.metadata["help"] + ("" if default is None or default is False else f" (default: {default})")
        options = _options(hints[item.name])
        group.add_argument(to_flag(item.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)


def _options(hint: Any) -> dict[str, Any]:
    """What argparse has to know of a field's type."""
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    return {"type": hint, "metavar": hint.__name__.upper()}


def experiments_text() -> str:
    """The presets, a line each."""
    return "\n".join(["presets:", *(f"  --exp {name:<14} {preset.text}" for name, preset in EXPERIMENTS.items())])
