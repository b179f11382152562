"""Do two photos show the same person? Exit code 0: the same; 1: different people; 2: no answer."""

import argparse
import sys
from pathlib import Path

from vitface.commands.parser import MODEL_FLAGS, PHOTO_FLAGS, THRESHOLD_FLAGS, CommandParser, add_shared, print_result
from vitface.store.thresholds import Verdict, source_text

EXAMPLES = """examples:
  vitface verify A.jpg B.jpg                       by the newest run in runs/
  vitface verify A.jpg B.jpg --backbone lvface_b   by a recogniser as it is, see `vitface calibrate`
  vitface verify A.jpg B.jpg --checkpoint runs/a --far 0.001 --json
  vitface verify A.jpg B.jpg --threshold 0.35      for a run without calibrated thresholds

The score is the cosine of the two embeddings, from -1 to 1; it is not a probability. The threshold was calibrated on
people that training held out, or by `vitface calibrate`: at FAR 0.001, 1 in 1,000 pairs of different people is taken
for the same person. Of a photo with little detail, as one of 16 pixels, the score says little, and a line says so.
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("first", type=Path, metavar="A", help="a photo, or an aligned crop")
    parser.add_argument("second", type=Path, metavar="B", help="the other one")
    add_shared(parser.add_mutually_exclusive_group(), *THRESHOLD_FLAGS)
    add_shared(parser, *PHOTO_FLAGS, *MODEL_FLAGS, "--json")


def run(arguments: argparse.Namespace) -> int:
    from vitface.commands.inputs import NO_THRESHOLD, crop_reader, load_model, read_crop, threshold_of
    from vitface.data.quality import POOR

    reader = crop_reader(arguments)
    first, second = (read_crop(reader, photo) for photo in (arguments.first, arguments.second))
    model, checkpoint = load_model(arguments)  # which takes longer
    rows, quality = model.embed([first[0], second[0]]), model.quality([first[0], second[0]])
    verdict = Verdict(float(rows[0] @ rows[1]), *threshold_of(arguments, model.thresholds))
    source = checkpoint.calibration if verdict.far is not None else None
    lines = [str(verdict), *([f"threshold from {source_text(source)}"] if source else [])]
    for which, value in zip(("first", "second"), quality.tolist(), strict=True):
        if value < POOR:
            lines.append(f"the {which} photo is poor, quality {value:.2f} of 1: the score says little")
    fields = {name: getattr(verdict, name) for name in ("score", "threshold", "far", "far_in_words", "same")}
    about = {"threshold_from": source and source_text(source), "checkpoint": str(checkpoint.path)}
    entry = {**fields, "faces": [first[1], second[1]], "quality": quality.tolist(), **about}
    print_result(arguments, entry, "\n".join(lines))
    if verdict.same is None:
        print(f"error: {NO_THRESHOLD}", file=sys.stderr)
        return 2
    return 0 if verdict.same else 1
