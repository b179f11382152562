"""Who in a gallery is most like these photos? Exit code 1: nobody reaches the threshold; 2: for a photo, no answer."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vitface.commands.parser import (
    MODEL_FLAGS,
    PHOTO_FLAGS,
    THRESHOLD_FLAGS,
    CommandParser,
    add_shared,
    number,
    print_result,
)
from vitface.errors import ConfigError, ImageError, in_one_line

if TYPE_CHECKING:
    import numpy as np

    from vitface.gallery.gallery import Gallery, Match

EXAMPLES = """examples:
  vitface search people NEW.jpg                    the five people most alike of the gallery that `embed` made
  vitface search people A.jpg B.jpg --top 1 --json

A person is the folder of a photo, as in anna/1.jpg, and counts by the photo that is most alike; a photo without a
folder is a person of its own. A false accept rate is per comparison: at FAR 0.001, a stranger has one false match on
average among 1,000 photos.
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("gallery", type=Path, metavar="GALLERY", help="folder that `embed` wrote")
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO", help="photos, or aligned crops")
    parser.add_argument("--top", type=number(int), default=5, metavar="K", help="how many people to show (default: 5)")
    add_shared(parser.add_mutually_exclusive_group(), *THRESHOLD_FLAGS)
    add_shared(parser, *PHOTO_FLAGS, *MODEL_FLAGS, "--json")


def run(arguments: argparse.Namespace) -> int:
    from vitface.commands.inputs import crop_reader, load_model, read_crop, threshold_of
    from vitface.gallery.gallery import Gallery

    if arguments.top < 1:
        raise ConfigError(f"--top must be at least 1, not {arguments.top}")
    reader, read, failed = crop_reader(arguments), {}, {}
    for place, photo in enumerate(arguments.photos):
        try:
            read[place] = read_crop(reader, photo)
        except ImageError as error:
            failed[place] = {"photo": str(photo), "error": str(error)}
    if not read:
        raise ImageError("\n".join(entry["error"] for entry in failed.values()))
    gallery = Gallery.load(arguments.gallery)
    model, checkpoint = load_model(arguments)
    made_by = gallery.settings.model
    if made_by not in (None, checkpoint.sha256) or gallery.embedding_dim != model.config.embedding_dim:
        raise ConfigError(
            f"{arguments.gallery} was made by another model than {checkpoint.path}; "
            "name that with --checkpoint or --backbone"
        )
    threshold, _ = threshold_of(arguments, model.thresholds)
    found = best_of_people(gallery, model.embed([crop for crop, _ in read.values()]), arguments.top)
    answers = [(arguments.photos[place], matches) for place, matches in zip(read, found, strict=True)]
    text = "\n".join(_text(photo, matches, threshold) for photo, matches in answers)
    counts = (count for _, count in read.values())
    each = [{**_entry(*answer, threshold), "faces": count} for answer, count in zip(answers, counts, strict=True)]
    entries = failed | dict(zip(read, each, strict=True))
    print_result(arguments, [entry for _, entry in sorted(entries.items())], text)
    for entry in failed.values():
        print(f"error: {entry['error']}", file=sys.stderr)
    return 2 if failed else int(threshold is not None and any(matches[0].score < threshold for matches in found))


def person_of(name: str) -> str:
    """The folder of a photo; its own name if it has none."""
    return name.rpartition("/")[0] or name


def best_of_people(gallery: "Gallery", rows: "np.ndarray", top: int) -> list[list["Match"]]:
    """For each of the rows (Q, E) the most similar photo of each of the `top` people who are most alike."""
    count = 4 * top
    while True:
        people: list[dict[str, Match]] = []
        for matches in gallery.search(rows, count):  # the best one first
            people.append({})
            for match in matches:
                people[-1].setdefault(person_of(match.name), match)
        if count >= len(gallery) or all(len(found) >= top for found in people):
            return [[*found.values()][:top] for found in people]
        count *= 8


def _entry(photo: Path, matches: list["Match"], threshold: float | None) -> dict:
    rows = [
        {
            "person": person_of(match.name),
            **match._asdict(),
            "same": None if threshold is None else match.score >= threshold,
        }
        for match in matches
    ]
    return {"photo": str(photo), "threshold": threshold, "matches": rows}


def _text(photo: Path, matches: list["Match"], threshold: float | None) -> str:
    """The photo, then a line per person; those below the threshold are marked."""
    word = "" if threshold is None else f", threshold {threshold:.4f}"
    lines = []
    for match in matches:
        under = "" if threshold is None or match.score >= threshold else "   (below the threshold)"
        person, name = in_one_line(person_of(match.name)), in_one_line(match.name)
        lines.append(f"  {match.score:7.4f}  {person}{f'  ({name})' if name != person else ''}{under}")
    return "\n".join([f"{in_one_line(str(photo))}: cosine and person{word}", *lines])
