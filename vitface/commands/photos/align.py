"""Align a folder of photos: find the face in each, write its 112 x 112 crop under the same name."""

import argparse
import os
from pathlib import Path

from vitface.commands.parser import command_parser
from vitface.data.faces.detect import MIN_FACE, FaceDetector
from vitface.data.faces.folder import Finder, align_folder, read_landmarks, summary
from vitface.errors import exit_code

EXAMPLES = """examples:
  vitface fetch yunet                      the detector, once
  vitface align photos aligned                     photos/PERSON/1.jpg -> aligned/PERSON/1.jpg
  vitface align photos aligned --landmarks mine.csv

OUT/align.csv says what became of each photo: ok; several (the large one near the middle was taken); tiny, none, damaged
(no crop). Its columns are those --landmarks takes, so landmarks can be mended in a copy of it. A second call goes on
with the photos that have no crop yet.
"""


def add_finder_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--landmarks", type=Path, metavar="CSV", help="file, x1, y1, ... x5, y5; such photos need no detector")
    add("--detector", type=Path, metavar="ONNX", help="YuNet's file; default: the fetched one")
    add("--num-workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")


def make_finder(arguments: argparse.Namespace, min_face: float) -> Finder:
    """With --landmarks alone, nothing is detected."""
    landmarks = read_landmarks(arguments.landmarks) if arguments.landmarks else {}
    detector = FaceDetector(arguments.detector) if arguments.detector or not landmarks else None
    return Finder(landmarks, detector, min_face)


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("align", __doc__, EXAMPLES)
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of photos, at any depth")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the crops, under the same names")
    add_finder_flags(parser)
    return parser


def align(arguments: argparse.Namespace) -> int:
    finder, out = make_finder(arguments, MIN_FACE), arguments.out
    statuses = align_folder(arguments.src, out, finder, arguments.num_workers)
    print("\n".join(summary(statuses)))
    print(f"each photo is listed in {out / 'align.csv'}; look at the crops, then: vitface data check {out}")
    return 0 if statuses["ok"] + statuses["several"] else 1


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    return exit_code(lambda: align(arguments))
