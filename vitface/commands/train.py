"""Adapt a frozen ViT to face recognition."""

import argparse

from vitface.commands.parser import CommandParser, add_settings
from vitface.presets import EXPERIMENTS

PRESETS = "\n".join(f"  --exp {name:<14} {preset.text}" for name, preset in EXPERIMENTS.items())
EXAMPLES = f"""presets:
{PRESETS}

examples:
  vitface train --exp demo                                     procedural faces, no download, a minute
  vitface train --exp exp_003 --dry-run                        two steps and the parameter table, needs no data
  vitface train --backbone dinov2 --train-data data/my-people  one folder of aligned faces per person
  vitface train --use-dalora --num-domains 3 --save-dir runs/a
  vitface train --save-dir runs/a --resume auto                continues it with its own settings
  vitface train --save-dir runs/a --resume auto --epochs 30 --allow-changed
  vitface train --image-size 112:16,224 --epochs 20            16 epochs on small images, a quarter of the work each
"""


def add_flags(parser: CommandParser) -> None:
    parser.usage = "vitface train [flags]"
    add_settings(parser)


def run(arguments: argparse.Namespace) -> None:
    from vitface.training.run import run as train
    from vitface.training.runs.resume import configure

    train(configure(vars(arguments)))
