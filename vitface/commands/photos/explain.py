"""Draw a face, the attention of CLS on it, and its domain weights."""

import argparse
from pathlib import Path

from vitface.commands.parser import (
    MODEL_FLAGS,
    PHOTO_FLAGS,
    CommandParser,
    add_shared,
    number,
    output_file,
    print_result,
)
from vitface.data.images import encode_image
from vitface.errors import ConfigError
from vitface.files import write_output

EXAMPLES = """examples:
  vitface explain A.jpg -o out.png
  vitface explain A.jpg -o out.png --block 0 --json

The picture shows the attention of CLS in one block, by default the last one. It does not explain why two faces are
found alike: a model with the head "patches" reads every patch, not only CLS.
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("photo", type=Path, metavar="PHOTO", help="a photo, or an aligned crop")
    parser.add_argument("-o", "--out", type=output_file(".png"), required=True, metavar="PNG", help="the picture")
    parser.add_argument(
        "--block", type=number(int), default=-1, help="block whose attention is shown (default: the last)"
    )
    add_shared(parser, *PHOTO_FLAGS, *MODEL_FLAGS, "--json")


def run(arguments: argparse.Namespace) -> None:
    from vitface.commands.inputs import crop_reader, load_model, read_crop
    from vitface.evaluation.explanation import explanation
    from vitface.evaluation.routing import domain_names

    if arguments.out.exists() and arguments.out.samefile(arguments.photo):
        raise ConfigError(f"--out {arguments.out} is the photo itself; name another file")
    crop, faces = read_crop(crop_reader(arguments), arguments.photo)
    model, checkpoint = load_model(arguments)
    names = domain_names(checkpoint.settings, model.config.num_domains)
    picture, attention, weights = explanation(model, crop, names, arguments.block)
    write_output(arguments.out, encode_image(picture, "PNG"))
    each = (f"{name} = {weight:.3f}" for name, weight in zip(names, weights, strict=True))
    plain = (
        "plain LoRA: there are no domains" if model.config.lora_rank else "a frozen backbone: no adapters, no domains"
    )
    text = f"wrote {arguments.out}\n{'domain weights: ' + ', '.join(each) if len(weights) > 1 else plain}"
    if model.config.head == "patches":
        text += '\nthe head "patches" reads every patch; the picture shows the attention of CLS alone'
    result = {"domains": names, "domain_weights": weights.tolist(), "attention": attention.tolist(), "faces": faces}
    print_result(arguments, result, text)
