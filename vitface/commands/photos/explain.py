"""Draw what a model makes of a photo: the aligned face, where CLS looks in it, and its domain weights."""

import argparse
import json
from pathlib import Path

from vitface.commands.parser import CommandParser, add_model_flags, add_photo_flags
from vitface.errors import ConfigError

EXAMPLES = """examples:
  vitface explain A.jpg -o out.png
  vitface explain A.jpg -o out.png --block 0 --json

Attention shows what CLS reads in one block, by default the last; it is not why two faces are called alike. A model with
the head "patches" reads every patch besides.
"""


def make_parser() -> CommandParser:
    parser = CommandParser("vitface explain", description=__doc__, epilog=EXAMPLES)
    parser.add_argument("photo", type=Path, metavar="PHOTO", help="a photo, or an aligned crop")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PNG", help="the picture")
    parser.add_argument("--block", type=int, default=-1, help="block whose attention is shown (default: the last)")
    add_photo_flags(parser)
    add_model_flags(parser)
    parser.add_argument("--json", action="store_true", help="print the domain weights and the attention as JSON")
    return parser


def explain(arguments: argparse.Namespace) -> int:
    from vitface.commands.inputs import crop_reader, load_model
    from vitface.evaluation.explanation import explanation

    if not arguments.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: its folder does not exist")
    crop = crop_reader(arguments)(arguments.photo)
    model, _ = load_model(arguments)
    depth = model.config.vit.depth
    if not -depth <= arguments.block < depth:
        raise ConfigError(f"--block must be 0 to {depth - 1}, or -1 for the last, not {arguments.block}")
    picture, attention, weights = explanation(model, crop, arguments.block)
    picture.save(arguments.out, "PNG")
    if arguments.json:
        print(json.dumps({"domain_weights": weights.tolist(), "attention": attention.tolist()}))
        return 0
    print(f"wrote {arguments.out}")
    if len(weights) == 1:
        print("plain LoRA: there are no domains")
    else:
        print("domain weights: " + ", ".join(f"{weight:.3f}" for weight in weights))
    if model.config.head == "patches":
        print('the head "patches" reads every patch: CLS, whose attention is shown, is one token of many to it')
    return 0


def main(argv: list[str] | None = None) -> int:
    return make_parser().run(explain, argv)
