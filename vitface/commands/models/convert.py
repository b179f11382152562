"""Convert a published checkpoint into a backbone file."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from vitface.commands.parser import CommandParser
from vitface.errors import ConfigError, WeightsError, command
from vitface.presets import VIT_PRESETS, Act, backbone_name
from vitface.store.sources import SOURCES

if TYPE_CHECKING:
    from vitface.weights.conversion import Conversion

ACTS = get_args(Act)
EXAMPLES = f"""examples:
  vitface convert clip --src ViT-B-16.pt
  vitface convert dinov2 --src dinov2_vits14_pretrain.pth --out dinov2.safetensors
  vitface convert clip --src laion/open_clip_model.safetensors --act gelu
  vitface convert vit_tiny_patch16 --src deit_tiny.pth --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225

backbones: {", ".join(SOURCES)}
"""


def add_flags(parser: CommandParser) -> None:
    parser.add_argument("name", metavar="NAME", help="the backbone: dinov2, clip or one of the list below")
    parser.add_argument("--src", type=Path, required=True, metavar="FILE", help=".pth, .pt, .bin, .safetensors or .npz")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: weights/NAME.safetensors")
    parser.add_argument("--act", choices=ACTS, help="the activation, if it is not the preset's")
    for name in ("mean", "std"):
        help_ = f"the {name} of red, green and blue, from 0 to 1, if it is not the preset's"
        parser.add_argument(f"--{name}", type=float, nargs=3, metavar=("R", "G", "B"), help=help_)

    bgr = "the source takes blue first; default: what a recogniser's config.yaml beside it says"
    parser.add_argument("--bgr", action=argparse.BooleanOptionalAction, default=None, help=bgr)


def run(arguments: argparse.Namespace) -> None:
    from vitface.store.backbone import read_backbone
    from vitface.weights.conversion import convert_backbone

    out = arguments.out or Path("weights") / f"{backbone_name(arguments.name)}.safetensors"
    if out.is_file():
        try:
            read_backbone(out)
        except WeightsError:
            raise ConfigError(f"--out {out} exists and is no backbone file to replace; name another") from None
    given = {name: tuple(value) for name in ("mean", "std") if (value := getattr(arguments, name))}
    print(report(convert_backbone(arguments.name, arguments.src, out, arguments.bgr, act=arguments.act, **given)))


def report(done: "Conversion") -> str:
    """The lines to print: the tensors that were read, used and dropped, the file written, and the next command."""
    config = done.config
    pinned = "the published original" if done.published else "not a file with a pinned sha256"
    dropped = ", ".join(f"{names} ({count})" if "*" in names else names for names, count in done.dropped.items())
    source = ", ".join(done.settings_from)
    if not source and not done.published:
        source = "assumed as the preset's; --act, --mean and --std if the weights were trained with others"
    lines = [
        f"read      {done.src}: {done.family}, sha256 {done.sha256}, {pinned}",
        *([f"          its entry {done.entry}"] if done.entry else []),
        f"used      {done.used} of {done.used + sum(done.dropped.values())} tensors, each once",
        f"dropped   {dropped or 'none'}",
        f"settings  activation {config.act}, LayerNorm eps {config.norm_eps:g}, native size {config.native_size} px, "
        f"positions {config.pos_interp}, mean {config.mean}, std {config.std}{', colours turned from BGR' * done.bgr}",
        *([f"          {'from ' * bool(done.settings_from)}{source}"] if source else []),
        f"wrote     {done.out} ({done.out.stat().st_size / 1e6:.1f} MB)",
        f"next      {next_command(done.name, done.out)}",
    ]
    return "\n".join(lines)


def next_command(name: str, path: Path) -> str:
    """The command for the backbone file `path`: a recogniser is calibrated, others are trained on. It names the file
    only if it is not found without that."""
    from vitface.store.backbone import find_backbone

    try:
        found = find_backbone(name).resolve() == path.resolve()
    except WeightsError:
        found = False
    use = ("calibrate", "--bench", "lfw") if VIT_PRESETS[name].pool == "tokens" else ("train",)
    return command(*use, "--backbone", name, *([] if found else ["--weights", path]))
