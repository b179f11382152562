"""Adapt a frozen ViT to face recognition."""

from typing import Any

from vitface.commands.flags import add_flags, experiments_text
from vitface.commands.parser import CommandParser

EXAMPLES = """examples:
  vitface train --exp demo                                     procedural faces, no download, under 3 minutes
  vitface train --exp exp_003 --dry-run                        two steps and the parameter table, needs no data
  vitface train --backbone dinov2 --train-data data/my-people  one folder of aligned faces per person
  vitface train --use-dalora --num-domains 3 --save-dir runs/a
  vitface train --save-dir runs/a --resume auto                continues it with its own settings
  vitface train --save-dir runs/a --resume auto --epochs 30 --allow-changed
"""


def make_parser() -> CommandParser:
    parser = CommandParser(
        "vitface train",
        usage="vitface train [flags]",
        description=__doc__,
        epilog=f"{experiments_text()}\n\n{EXAMPLES}",
    )
    add_flags(parser)
    return parser


def train(given: dict[str, Any]) -> None:
    """One run with the `given` flags, by the names of `TrainConfig`'s fields."""
    from vitface.training.run import run
    from vitface.training.runs.resume import configure

    run(configure(given))


def main(argv: list[str] | None = None) -> int:
    return make_parser().run(lambda arguments: train(vars(arguments)), argv)
