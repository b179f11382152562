"""Check, pack, index, build and show training data and benchmarks."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from vitface.commands.parser import (
    FINDER_FLAGS,
    CommandParser,
    add_shared,
    bounds_of,
    new_path,
    number,
    output_file,
    print_result,
)
from vitface.config import Bounds, TrainConfig
from vitface.errors import ConfigError, DataError, command

RELEASES = ("lfw", "calfw", "cplfw", "cfp_fp", "cfp_ff", "agedb_30", "xqlfw")  # PAIR_LISTS, without numpy
MAX_DRAWN = 1_000_000
SEED = number(int, bounds_of("seed"))
EXAMPLES = """examples:
  vitface data check data                         everything in the folder; exit code 1 if something is wrong
  vitface data check data/my-people --against data/lfw.bin --checkpoint runs/a
  vitface data pack data/casia-webface data/casia-packed
  vitface data index data/casia-webface           train.idx is missing or cut: made again from train.rec
  vitface data build cplfw downloads/cplfw data
  vitface data show data/casia-webface --augment strong --out sheet.png
  vitface data draw faces --people 5 --images 60  drawn faces, to try commands on
"""


def _pack_flags(parser: CommandParser) -> None:
    parser.add_argument("src", type=Path, metavar="SRC", help="folder with train.rec, or with a folder per person")
    parser.add_argument("out", type=Path, metavar="OUT", help="the packed folder; --train-data OUT trains on it")
    add_shared(parser, "--num-workers")


def _pack(arguments: argparse.Namespace) -> None:
    from vitface.data.checks.check_images import size_alarm
    from vitface.data.formats.packed import PackedSamples
    from vitface.data.formats.packing import pack
    from vitface.data.formats.samples import load_samples

    samples = load_samples(arguments.src)
    if isinstance(samples, PackedSamples):
        raise DataError(f"{arguments.src} is packed already; train on it with --train-data {arguments.src}")
    print("".join(f"{note}\n" for note in samples.notes), end="")
    if alarm := size_alarm(samples, str(arguments.src)):
        print(f"ALARM {alarm}", file=sys.stderr)
    packed = pack(samples, arguments.out, arguments.num_workers)
    print(f"{arguments.out}: {len(packed):,} images of {len(packed.names):,} people, {len(packed.skipped)} skipped")
    for why in packed.skipped[:10]:
        print(f"  skipped {why}")
    if packed.skipped[10:]:
        print(f"  and {len(packed.skipped) - 10} more, listed in {arguments.out / 'manifest.json'}")
    print(f"next: {command('train', '--train-data', arguments.out)}")


def _index_flags(parser: CommandParser) -> None:
    parser.add_argument("set", type=Path, metavar="SET", help="folder with train.rec")


def _index(arguments: argparse.Namespace) -> None:
    from vitface.data.formats.record_set import rebuild_index

    print(rebuild_index(arguments.set))


def _check_flags(parser: CommandParser) -> None:
    unseen = "benchmarks that training must not have seen: .bin files, or published pair lists (names are compared)"
    parser.add_argument("path", type=Path, metavar="PATH", help="training set, .bin, or a folder of them")
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="FILE", help=unseen)
    model = "trained run whose model looks for training people's faces in the benchmarks, too"
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help=model)
    add_shared(parser, "--weights", "--device", "--num-workers", "--json")
    parser.set_defaults(backbone=None, image_size=None)  # a model that was trained, no backbone


def _check(arguments: argparse.Namespace) -> int:
    from vitface.commands.inputs import load_model
    from vitface.data.checks.doctor import check, report_text

    for file in arguments.against:
        if not file.is_file():
            raise ConfigError(f"--against {file}: {_no_benchmark(file)}")
    embed = load_model(arguments)[0].embed if arguments.checkpoint else None
    reports = check(arguments.path, arguments.against, arguments.num_workers, embed)
    print_result(arguments, list(map(dataclasses.asdict, reports)), "\n".join(map(report_text, reports)))
    return int(any(report.problems for report in reports))


def _no_benchmark(path: Path) -> str:
    """Why a path names no benchmark, and what to name instead."""
    if not path.is_dir():
        return "no such file"
    from vitface.data.formats.published import is_bin, is_list

    inside = [str(file) for file in sorted(path.rglob("*")) if file.is_file() and (is_bin(file) or is_list(file))]
    more = f" and {len(inside) - 3:,} more" if inside[3:] else ""
    return f"a folder; name files in it: {shlex.join(inside[:3])}{more}" if inside else "a folder without a benchmark"


def _build_flags(parser: CommandParser) -> None:
    parser.add_argument("name", choices=RELEASES, help="the benchmark")
    parser.add_argument("src", type=Path, metavar="SRC", help="folder of the release, as it unpacks")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for NAME.bin and, in NAME, the aligned crops")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="the pair list, where SRC does not hold it")
    add_shared(parser, *FINDER_FLAGS)


def _build(arguments: argparse.Namespace) -> None:
    from vitface.commands.inputs import make_finder
    from vitface.data.faces.build import build

    finder = make_finder(arguments, min_face=0)
    pairs = build(arguments.name, arguments.src, arguments.out, finder, arguments.pairs, arguments.num_workers)
    print(f"wrote {arguments.out / arguments.name}.bin: {len(pairs.issame):,} pairs, {int(pairs.issame.sum()):,} same")
    print(f"next: {command('data', 'check', arguments.out / f'{arguments.name}.bin')}")


def _show_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="training set")
    add("--out", type=output_file(".png"), default=Path("sheet.png"), metavar="PNG", help="default: sheet.png")
    add("--augment", choices=["none", "flip", "strong"], default="strong", help="as in training (default: strong)")
    add("--degrade", metavar="SENSORS", help="as in training, such as lowres:12-28,nir or all; default: none")
    add("--count", type=number(int, Bounds(least=1)), default=8, help="images, a row each (default: 8)")
    add(
        "--epochs",
        type=number(int, Bounds(least=1)),
        default=6,
        help="columns: what these epochs make of it (default: 6)",
    )
    add(
        "--image-size",
        type=number(int, bounds_of("image_size")),
        default=112,
        help="input side of the model (default: 112)",
    )
    add("--seed", type=SEED, default=0, help="chooses the images and their augmentation (default: 0)")


def _show(arguments: argparse.Namespace) -> None:
    from vitface.data.degrade import parse_sensors
    from vitface.data.formats.samples import load_samples
    from vitface.data.images import encode_image
    from vitface.data.show import contact_sheet
    from vitface.files import write_output

    sensors = () if arguments.degrade is None else parse_sensors(arguments.degrade)
    sheet = contact_sheet(
        load_samples(arguments.path),
        arguments.count,
        arguments.augment,
        arguments.epochs,
        arguments.image_size,
        arguments.seed,
        sensors,
    )
    write_output(arguments.out, encode_image(sheet, "PNG"))
    print(f"wrote {arguments.out}: as stored, then as epochs 1 to {arguments.epochs} show it to the model")


def _draw_flags(parser: CommandParser) -> None:
    parser.add_argument("out", type=new_path, metavar="OUT", help="a new folder")
    parser.add_argument("--people", type=number(int, Bounds(least=1)), default=5, help="how many (default: 5)")
    parser.add_argument("--images", type=number(int, Bounds(least=1)), default=60, help="of each (default: 60)")
    parser.add_argument("--seed", type=SEED, default=0, help="chooses their photos (default: 0)")


def _draw(arguments: argparse.Namespace) -> None:
    from vitface.data.faces.folder import write_crop
    from vitface.data.synthetic.worlds import SyntheticSamples

    if arguments.people * arguments.images > MAX_DRAWN:
        raise ConfigError(f"more than {MAX_DRAWN:,} photos: lower --people or --images")
    samples = SyntheticSamples(arguments.people, arguments.images, arguments.seed)
    for i in range(len(samples)):
        name = f"person-{samples.labels[i] + 1:02d}/{i % arguments.images + 1:03d}.jpg"
        write_crop(arguments.out / name, samples.read(i))
    print(f"wrote {len(samples):,} crops of {arguments.people:,} people, who do not exist, to {arguments.out}")
    if arguments.people < 2:
        print("one person cannot be trained on: draw two or more into another folder")
        return
    usual = TrainConfig.holdout_people
    held_out = min(arguments.people // 5, usual)
    held_out = held_out if held_out > 1 else 0
    flags = ["--holdout-people", held_out] if held_out < usual else []
    images = arguments.images * (arguments.people - held_out)
    flags += ["--batch-size", images] if images < TrainConfig.batch_size else []
    small = ("--backbone", "vit_nano", "--image-size", 112)
    print(f"next: {command('train', '--train-data', arguments.out, *small, *flags)}")


ACTIONS = {
    "pack": (_pack, _pack_flags, "decode a training set once, into a folder that training maps into memory"),
    "index": (_index, _index_flags, "make train.idx of an InsightFace set again, from train.rec"),
    "check": (_check, _check_flags, "what is wrong with training sets and benchmarks; exit code 1 if anything is"),
    "build": (_build, _build_flags, "a benchmark's .bin from its official release: photos and pair list"),
    "show": (_show, _show_flags, "draw what the model sees of a training set, before and after augmentation"),
    "draw": (_draw, _draw_flags, "procedural faces as files, a folder per person, to try commands on"),
}


def add_flags(parser: CommandParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (action, add_action_flags, text) in ACTIONS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(action=action)
        add_action_flags(command)


def run(arguments: argparse.Namespace) -> int | None:
    return arguments.action(arguments)
