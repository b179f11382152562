"""Align a folder of photos: find the face in each, write its 112 x 112 crop under the same name."""

import argparse
from pathlib import Path

from vitface.commands.parser import FINDER_FLAGS, CommandParser, add_shared
from vitface.errors import command

EXAMPLES = """examples:
  vitface fetch yunet                      the detector, once
  vitface align photos aligned                     photos/PERSON/1.jpg -> aligned/PERSON/1.jpg
  vitface align photos aligned --landmarks mine.csv
  vitface align photos aligned --prune             also deletes the crops of photos that are gone

OUT/align.csv has the result for each photo, and why: ok; several (the large one near the middle was taken); tiny, none,
damaged, left out (no crop). --landmarks takes a file with the same columns, so you can correct landmarks in a copy. A
second call continues with the photos that have no crop yet, were replaced or have other landmarks in that file.
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of photos, at any depth")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the crops, under the same names")
    add_shared(parser, "--prune", *FINDER_FLAGS)


def run(arguments: argparse.Namespace) -> int:
    from vitface.commands.inputs import make_finder, print_gone
    from vitface.data.faces.detect import MIN_FACE
    from vitface.data.faces.folder import align_folder, summary

    finder, out = make_finder(arguments, MIN_FACE), arguments.out
    done = align_folder(arguments.src, out, finder, arguments.num_workers, arguments.prune)
    print("\n".join(summary(done)))
    print_gone(arguments, done.gone)
    people = any(path.is_dir() for path in out.iterdir())
    flat = f"training needs a folder per person, such as {arguments.src / 'PERSON' / 'IMAGE.jpg'}"
    then = f"look at the crops, then: {command('data', 'check', out)}" if people else flat
    print(f"each photo is listed in {out / 'align.csv'}; {then}")
    return 0 if done.statuses["ok"] + done.statuses["several"] else 1
