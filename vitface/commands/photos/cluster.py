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
compared: 10,000 images take about a minute, more than 20,000 are refused.
This needs SciPy: pip install scipy
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("gallery", type=Path, metavar="GALLERY", help="folder that `embed` wrote")
    add_shared(parser.add_mutually_exclusive_group(), *THRESHOLD_FLAGS)
    columns = "also write the columns name,cluster there; for spreadsheets, =name and the like become '=name"
    parser.add_argument("--out", type=output_file(".csv"), metavar="CSV", help=columns)
    add_shared(parser, "--json")


def run(arguments: argparse.Namespace) -> None:
    import numpy as np

    from vitface.commands.inputs import NO_THRESHOLD, threshold_of
    from vitface.data.tables import table_text
    from vitface.gallery.clusters import cluster
    from vitface.gallery.gallery import Gallery

    gallery = Gallery.load(arguments.gallery)
    threshold, _ = threshold_of(arguments, gallery.thresholds)
    if threshold is None:
        raise ConfigError(NO_THRESHOLD)
    groups = cluster(gallery.embeddings, threshold)
    members = [[gallery.names[i] for i in np.flatnonzero(groups == g)] for g in range(groups.max() + 1)]
    if arguments.out:
        names = map(in_one_line, gallery.names)
        text = table_text([("name", "cluster"), *zip(names, groups, strict=True)])
        write_output(arguments.out, text.encode())
    print_result(arguments, dict(enumerate(members)), _text(members, threshold))


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
