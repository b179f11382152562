"""Download a backbone from its original source, check its sha256 and convert it."""

import argparse

from vitface.commands.models.convert import next_command, report
from vitface.commands.parser import command_parser
from vitface.config import backbone_name
from vitface.errors import exit_code
from vitface.home import cache_home
from vitface.weights.download import fetch_backbone, fetch_detector
from vitface.weights.sources import SOURCES

EXAMPLES = f"""examples:
  vitface fetch dinov2
  vitface fetch yunet                                the face detector, which `vitface align` uses
  VITFACE_HOME=/data/vitface vitface fetch clip

backbones: {", ".join(name for name, source in SOURCES.items() if source.url)}
"""


def make_parser() -> argparse.ArgumentParser:
    parser = command_parser("fetch", __doc__, EXAMPLES)
    parser.add_argument("name", metavar="NAME", help="dinov2, clip or one of the list below; yunet, the face detector")
    return parser


def fetch(arguments: argparse.Namespace) -> None:
    if arguments.name == "yunet":
        print(f"{fetch_detector()} is there\nnext      vitface align SRC OUT")
        return
    name = backbone_name(arguments.name)
    done, out = fetch_backbone(name), cache_home() / f"{name}.safetensors"
    print(report(done) if done else f"{out} is there already\nnext      {next_command(name, out)}")


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    return exit_code(lambda: fetch(arguments))
