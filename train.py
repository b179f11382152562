"""Adapt a frozen ViT to face recognition."""

import argparse
import sys
from typing import Any

from vitface.config import add_flags
from vitface.errors import exit_code
from vitface.training.run import run
from vitface.training.runs.resume import configure

EXAMPLES = """examples:
  python train.py --exp demo                                     procedural faces, no download, under 3 minutes
  python train.py --exp exp_003 --dry-run                        two steps and the parameter table, needs no data
  python train.py --backbone dinov2 --train-data data/my-people  one folder of aligned faces per person
  python train.py --use-dalora --num-domains 3 --save-dir runs/a
  python train.py --save-dir runs/a --resume auto                continues it with its own settings
  python train.py --save-dir runs/a --resume auto --epochs 30 --allow-changed
"""


def train(given: dict[str, Any]) -> None:
    run(configure(given))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "train.py", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    return exit_code(lambda: train(given))


if __name__ == "__main__":
    sys.exit(main())
