"""Group the images of a gallery by person."""

import argparse
from pathlib import Path

from vitface.commands.parser import THRESHOLD_FLAGS, CommandParser, add_shared, output_file, print_result
from vitface.errors import ConfigError, in_one_line
from vitface.files import write_output

SHOWN, NAMES = 20, 4
EXAMPLES = """examples:
  vitface cluster people                           the gallery that `embed` made
  vitface cluster people --threshold 0.4 --out people.csv

Average linkage: two groups are merged while the mean cosine of their pairs reaches the threshold, by default that of
the lowest calibrated false accept rate. A higher threshold splits people, a lower one mixes them. All pairs are
compared. If all names are PERSON/FILE, it also prints how well the groups agree with the folders.
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("gallery", type=Path, metavar="GALLERY", help="folder that `embed` wrote")
    add_shared(parser.add_mutually_exclusive_group(), *THRESHOLD_FLAGS)
    columns = "also write the columns name,cluster there; for spreadsheets, =name and the like become '=name"
    parser.add_argument("--out", type=output_file(".csv"), metavar="CSV", help=columns)
    add_shared(parser, "--device", "--json")


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from vitface.commands.inputs import NO_THRESHOLD, threshold_of
    from vitface.data.tables import table_text
    from vitface.device import resolve_device
    from vitface.gallery.clusters import cluster
    from vitface.gallery.gallery import Gallery

    device = resolve_device(arguments.device)
    gallery = Gallery.load(arguments.gallery)
    threshold, _ = threshold_of(arguments, gallery.thresholds)
    if threshold is None:
        raise ConfigError(NO_THRESHOLD)
    groups = cluster(gallery.embeddings, threshold, device)
    each = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    members = [[gallery.names[i] for i in rows] for rows in each]
    if arguments.out:
        names = map(in_one_line, gallery.names)
        text = table_text([("name", "cluster"), *zip(names, groups, strict=True)])
        write_output(arguments.out, text.encode())
    print_result(arguments, dict(enumerate(members)), _text(members, threshold) + _against_folders(members))


def _text(members: list[list[str]], threshold: float) -> str:
    several = [names for names in members if len(names) > 1]
    lines = [
        f"{sum(map(len, members)):,} images; people at cosine {threshold:.4f}: {len(members):,}, "
        f"of whom with several images: {len(several):,}"
    ]
    for number, names in enumerate(several[:SHOWN]):
        more = f", and {len(names) - NAMES:,} more" if len(names) > NAMES else ""
        lines.append(f"{number:>6}  {len(names):>5} images  {', '.join(map(in_one_line, names[:NAMES]))}{more}")
    if len(several) > SHOWN:
        lines.append(f"and {len(several) - SHOWN:,} more people; --out CSV has all of them")
    return "\n".join(lines)


def _against_folders(members: list[list[str]]) -> str:
    """How well groups of names agree with the folders, if each is PERSON/FILE, of two people or more; otherwise ""."""
    from vitface.metrics import agreement

    paths = [(group, name.split("/")) for group, names in enumerate(members) for name in names]
    people = [path[0] for _, path in paths]
    if any(len(path) != 2 for _, path in paths) or len(set(people)) < 2:
        return ""
    scores = zip(("pairwise", "BCubed"), agreement([group for group, _ in paths], people), strict=True)
    each = (
        f"{name} F {score.f:.4f}, precision {score.precision:.4f}, recall {score.recall:.4f}" for name, score in scores
    )
    return f"\nif each of the {len(set(people)):,} folders is a person: {'; '.join(each)}"
