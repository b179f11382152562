"""The settings of a training run as flags of `train` and `study`."""

import argparse
import dataclasses
import types
import typing
from typing import Any, Literal

from vitface.config import TrainConfig, to_flag


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds one flag for each field of `TrainConfig`, in its groups; a bool gets --x and --no-x, a Literal its choices.

    A flag that is not given leaves no attribute in the parsed arguments.
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
    """Returns argparse's options for the type of a field."""
    if isinstance(hint, types.UnionType):  # X | None
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    return {"type": hint, "metavar": hint.__name__.upper()}
