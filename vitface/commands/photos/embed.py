"""Embed a folder of images into a gallery, for `search` and `cluster`. Exit code 1: some images could not be read."""

import argparse
import dataclasses
import sys
from pathlib import Path

from vitface.commands.parser import MODEL_FLAGS, PHOTO_FLAGS, CommandParser, add_shared, print_result

EXAMPLES = """examples:
  vitface embed photos people                      photos/ANY/DEPTH/1.jpg -> a gallery in the folder people
  vitface embed aligned people --no-align --checkpoint runs/a

Embeddings are written every half minute. A second call embeds only the images that the gallery does not have yet, so
the same command continues a stopped run and adds new photos. In Python:

  gallery = vitface.Gallery.load("people")
  gallery.names, gallery.embeddings                          a list, and float32 (N, E)
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("src", type=Path, metavar="FOLDER", help="folder of images, at any depth")
    parser.add_argument("out", type=Path, metavar="OUT", help="the gallery, a new folder or one to add to")
    add_shared(parser, *PHOTO_FLAGS, *MODEL_FLAGS, "--num-workers", "--json")


def run(arguments: argparse.Namespace) -> int:
    from vitface.commands.inputs import crop_reader, load_model
    from vitface.gallery.from_folder import embed_folder
    from vitface.gallery.parts import Settings

    crops = crop_reader(arguments)
    model, checkpoint = load_model(arguments)
    settings = Settings(checkpoint.sha256, arguments.align, checkpoint.thresholds)
    done = embed_folder(model, arguments.src, arguments.out, settings, crops, arguments.num_workers)
    counts = f"{done.total:,} images, {done.new:,} of them new, {len(done.skipped):,} skipped"
    text = f"{arguments.out}: {counts}\nnext: vitface search {arguments.out} PHOTO, or cluster {arguments.out}"
    print_result(arguments, dataclasses.asdict(done), text)
    for why in done.skipped:
        print(f"skipped {why}", file=sys.stderr)
    return 1 if done.skipped else 0
