"""Download a backbone, check its sha256 and convert it; or the face detector."""

import argparse

from vitface.commands.models.convert import next_command, report
from vitface.commands.parser import CommandParser
from vitface.files import cache_home
from vitface.presets import VIT_PRESETS, backbone_name
from vitface.store.sources import SOURCES

EXAMPLES = f"""examples:
  vitface fetch dinov2
  vitface fetch yunet                                the face detector, which `vitface align` uses
  VITFACE_HOME=/data/vitface vitface fetch clip

backbones: {", ".join(name for name, source in SOURCES.items() if source.url)}
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("name", metavar="NAME", help="dinov2, clip or one of the list below; yunet, the face detector")


def run(arguments: argparse.Namespace) -> None:
    from vitface.weights.download import fetch_backbone, fetch_detector

    if arguments.name == "yunet":
        print(f"{fetch_detector()} is there\nnext      vitface align SRC OUT")
        return
    name = backbone_name(arguments.name)
    out = cache_home() / f"{name}.safetensors"
    if name in SOURCES and SOURCES[name].url and not out.is_file():
        print(about(name), flush=True)
    done = fetch_backbone(name)
    print(report(done) if done else f"{out} is there already\nnext      {next_command(name, out)}")


def about(name: str) -> str:
    """What will be downloaded: whose it is and how large, its licence, and the sha256 that is expected."""
    from vitface.store.backbone import expected_tensors

    source = SOURCES[name]
    megabytes = sum(4 * tensor.numel() for tensor in expected_tensors(VIT_PRESETS[name]).values()) / 1e6
    return f"{name}: {source.origin}, about {megabytes:,.0f} MB\nlicence   {source.licence}\nsha256    {source.sha256}"
