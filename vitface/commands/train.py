"""Adapt a frozen ViT to face recognition."""

from typing import Any

from vitface.commands.parser import command_parser
from vitface.config import add_flags
from vitface.errors import exit_code
from vitface.training.run import run
from vitface.training.runs.resume import configure

EXAMPLES = """examples:
  vitface train --exp demo                                     procedural faces, no download, under 3 minutes
  vitface train --exp exp_003 --dry-run                        two steps and the parameter table, needs no data
  vitface train --backbone dinov2 --train-data data/my-people  one folder of aligned faces per person
  vitface train --use-dalora --num-domains 3 --save-dir runs/a
  vitface train --save-dir runs/a --resume auto                continues it with its own settings
  vitface train --save-dir runs/a --resume auto --epochs 30 --allow-changed
"""


def train(given: dict[str, Any]) -> None:
    run(configure(given))


def main(argv: list[str] | None = None) -> int:
    parser = command_parser("train", __doc__, EXAMPLES)
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    return exit_code(lambda: train(given))
