"""Embed a folder of images into a gallery, for `search` and `cluster`. Exit code 1: some images could not be used."""

import argparse
import dataclasses
import sys
from pathlib import Path

from vitface.commands.parser import MODEL_FLAGS, PHOTO_FLAGS, CommandParser, add_shared, print_result

EXAMPLES = """examples:
  vitface embed photos people                      photos/ANY/DEPTH/1.jpg -> a gallery in the folder people
  vitface embed aligned people --no-align --checkpoint runs/a
  vitface embed photos people --prune              also removes whoever is no longer in photos

Embeddings are written every half minute. A second call embeds only the images that the gallery does not have yet, or
that were replaced, so the same command continues a stopped run and adds new photos. In Python:

  gallery = vitface.Gallery.load("people")
  gallery.names, gallery.embeddings                          a list, and float32 (N, E)
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("src", type=Path, metavar="FOLDER", help="folder of images, at any depth")
    parser.add_argument("out", type=Path, metavar="OUT", help="the gallery, a new folder or one to add to")
    add_shared(parser, *PHOTO_FLAGS, *MODEL_FLAGS, "--prune", "--num-workers", "--json")


def run(arguments: argparse.Namespace) -> int:
    from vitface.commands.inputs import crop_reader, load_model, print_gone
    from vitface.data.folders import HARMLESS, left_out_lines, some
    from vitface.gallery.from_folder import embed_folder
    from vitface.gallery.parts import Settings

    crops = crop_reader(arguments)
    model, checkpoint = load_model(arguments)
    settings = Settings(checkpoint.sha256, arguments.align, checkpoint.thresholds)
    done = embed_folder(model, arguments.src, arguments.out, settings, crops, arguments.num_workers, arguments.prune)
    changed = f" ({len(done.changed):,} replaced since: {some(done.changed)})" if done.changed else ""
    counts = f"{done.total:,} images, {done.new:,} of them new{changed}, {len(done.skipped):,} skipped"
    text = f"{arguments.out}: {counts}\nnext: vitface search {arguments.out} PHOTO, or cluster {arguments.out}"
    print_result(arguments, dataclasses.asdict(done), text)
    for why in (*(f"skipped {why}" for why in done.skipped), *left_out_lines(done.left_out)):
        print(why, file=sys.stderr)
    if done.several:
        taken = "the large one near the middle was taken"
        print(f"several faces in {len(done.several):,}, {taken}: {some(done.several)}", file=sys.stderr)
    if done.copies:
        pairs = some([f"{name} = {other}" for name, other in done.copies])
        print(f"the same file under two names, {len(done.copies):,} times: {pairs}", file=sys.stderr)
    print_gone(arguments, done.gone)
    return 1 if done.skipped or done.left_out.keys() - set(HARMLESS) else 0
