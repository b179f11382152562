"""Embed a folder of images into a gallery, for `search` and `cluster`. Exit code 1: some images could not be used."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vitface.commands.parser import MODEL_FLAGS, PHOTO_FLAGS, CommandParser, add_shared, print_result
from vitface.errors import ConfigError, command

if TYPE_CHECKING:
    from vitface.gallery.from_folder import Embedded, Work

EXAMPLES = """examples:
  vitface embed photos people                      photos/ANY/DEPTH/1.jpg -> a gallery in the folder people
  vitface embed aligned people --no-align --checkpoint runs/a
  vitface embed photos people --backbone lvface_b  by a recogniser as it is, without training
  vitface embed photos people --prune              also removes whoever is no longer in photos
  vitface embed photos/anna people                 a person's folder: rows are named anna/1.jpg, as with photos
  vitface embed photos people --dry-run            how long will it take? writes nothing
  torchrun --nproc-per-node 2 -m vitface embed photos people     two GPUs, the same rows

Embeddings are written every half minute. A second call embeds only the images that the gallery does not have yet, or
that were replaced, so the same command continues a stopped run and adds new photos. A gallery keeps the folders its
rows are from, so others can be added, also by several processes at once; --prune is about this folder alone. In Python:

  gallery = vitface.Gallery.load("people")
  gallery.names, gallery.embeddings                          a list, and float32 (N, E)
  gallery.quality                                            {name: from 0 to 1} of photos embedded with --quality
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("src", type=Path, metavar="FOLDER", help="folder of images, at any depth")
    parser.add_argument("out", type=Path, metavar="OUT", help="the gallery, a new folder or one to add to")
    half = "of a new gallery's rows (default: float32); float16 takes half the memory, cosines change by under 0.001"
    parser.add_argument("--gallery-dtype", choices=["float32", "float16"], help=half)
    parser.add_argument("--quality", action="store_true", help="also rate new photos from 0 to 1, and name poor ones")
    add_shared(parser, *PHOTO_FLAGS, *MODEL_FLAGS, "--prune", "--num-workers", "--dry-run", "--json")


def run(arguments: argparse.Namespace) -> int:
    from vitface.training.ranks.process_group import as_one, local_device, local_share

    arguments.device = local_device(arguments.device)
    arguments.num_workers = local_share(arguments.num_workers)
    with as_one(arguments.device):
        return _embed(arguments)


def _embed(arguments: argparse.Namespace) -> int:
    from vitface.commands.inputs import crop_reader, load_model
    from vitface.gallery.from_folder import chunk_embedder, embed_folder
    from vitface.gallery.parts import Settings
    from vitface.training.ranks.parallel import over_ranks
    from vitface.training.ranks.process_group import check_same, rank

    dtype = _dtype(arguments)
    crops = crop_reader(arguments)
    model, checkpoint = load_model(arguments)
    check_same({"model": checkpoint.sha256})
    src, out, num_workers = arguments.src, arguments.out, arguments.num_workers
    work = chunk_embedder(model, src, crops, num_workers, arguments.quality)
    if arguments.dry_run:
        return _predict(work, arguments)
    if rank() > 0:
        return sum(0 for _ in over_ranks(work))
    settings = Settings(checkpoint.sha256, arguments.align, checkpoint.thresholds, dtype)
    choices = settings, crops, num_workers, arguments.prune, arguments.quality
    return _report(embed_folder(model, src, out, *choices, over_ranks), arguments)


def _predict(work: "Work", arguments: argparse.Namespace) -> int:
    """Prints how long the images without a row will take, from what all ranks do in a second."""
    from vitface.gallery.from_folder import images_per_second, without_row
    from vitface.training.estimate import duration
    from vitface.training.ranks.process_group import all_gather

    images = without_row(arguments.src, arguments.out)
    rate = sum(all_gather(images_per_second(work, images, arguments.num_workers) if images else 1.0))
    found = {"images": len(images), "images_per_second": rate, "seconds": len(images) / rate}
    text = f"{len(images):,} images to embed: about {duration(len(images) / rate)}, at {rate:,.1f} images/s"
    print_result(arguments, found, f"{text}; nothing was written")
    return 0


def _report(done: "Embedded", arguments: argparse.Namespace) -> int:
    from vitface.commands.calibrate import model_words
    from vitface.commands.inputs import print_gone
    from vitface.data.faces.detect import REMARKS
    from vitface.data.folders import HARMLESS, left_out_lines, some
    from vitface.data.quality import POOR
    from vitface.gallery.parts import remake, strangers

    changed = f" ({len(done.changed):,} replaced since: {some(done.changed)})" if done.changed else ""
    counts = f"{done.total:,} images, {done.new:,} of them new{changed}, {len(done.skipped):,} skipped"
    named = f"\nthe names of this folder's rows begin with {done.prefix}/" if done.prefix else ""
    out = arguments.out
    search = command("search", out, "PHOTO", *model_words(arguments))
    text = f"{out}: {counts}{named}\nnext: {search}, or {command('cluster', out)}"
    print_result(arguments, dataclasses.asdict(done), text)
    for why in (*(f"skipped {why}" for why in done.skipped), *left_out_lines(done.left_out)):
        print(why, file=sys.stderr)
    for remark, names in done.remarks.items():
        print(f"{REMARKS[remark]}, in {len(names):,}: {some(names)}", file=sys.stderr)
    if done.poor:
        print(f"poor, a quality below {POOR}, in {len(done.poor):,}: {some(done.poor)}", file=sys.stderr)
    if done.copies:
        pairs = some([f"{name} = {other}" for name, other in done.copies])
        print(f"the same file under two names, {len(done.copies):,} times: {pairs}", file=sys.stderr)
    if others := strangers(arguments.out):
        print(f"{arguments.out} also holds {some(others)}: nothing reads it, delete it", file=sys.stderr)
    if done.lost_parts:
        print(f"{some(done.lost_parts)} was lost; if it held rows of other folders, {remake(out)}", file=sys.stderr)
    for folder, names in done.lost.items():
        print(
            f"{len(names):,} rows are of photos in {folder}, which is not there: {some(names)}; if these were deleted, "
            f'delete the rows in Python: gallery = vitface.Gallery.load("{out}"), gallery.remove(NAME) of each, '
            f'gallery.save("{out}")',
            file=sys.stderr,
        )
    print_gone(arguments, done.gone)
    return 1 if done.skipped or done.left_out.keys() - set(HARMLESS) else 0


def _dtype(arguments: argparse.Namespace) -> str:
    """That of the gallery; of a new one, what --gallery-dtype asks for."""
    from vitface.gallery.parts import is_gallery, read_settings

    out, wanted = arguments.out, arguments.gallery_dtype
    there = read_settings(out).dtype if is_gallery(out) else wanted or "float32"
    if wanted not in (None, there):
        how = f"vitface.Gallery.load({str(out)!r}, dtype={wanted!r}).save({str(out)!r})"
        raise ConfigError(f"{out} has rows in {there}; this converts it, in Python:\n  {how}")
    return there
