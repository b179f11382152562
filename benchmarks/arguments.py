"""What the model benchmarks share: their flags, their images and weights, and the contest itself."""

import argparse
import math
import statistics
from pathlib import Path

import contest
import torch
from ceilings import SIDE, gemm_rates
from peers import transformers_backbone, transformers_kind
from timing import machine
from torch import Tensor

from vitface.device import DTYPES, resolve_device, resolve_dtype
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS, backbone_name
from vitface.store.backbone import load_backbone

HERE = Path(__file__).parent


def make_parser(name: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        name, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="dinov2", help="backbone preset (default: dinov2)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    choices = ("auto", *DTYPES)
    parser.add_argument("--dtypes", nargs="+", choices=choices, help="of all; default: fp32 bf16 on a CPU, else auto")
    parser.add_argument("--peers", default="timm,transformers", help="comma list of timm, transformers; or none")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="also compiled forms")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=math.inf, help="on a GPU, after which no contestant is begun")
    parser.add_argument("--only", metavar="CONTESTANT", help=argparse.SUPPRESS)  # see `contest`
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """With every "auto" resolved and lists as lists."""
    args = parser.parse_args(argv)
    args.backbone, args.device = backbone_name(args.backbone), resolve_device(args.device)
    width = VIT_PRESETS[args.backbone].embed_dim
    dtypes = args.dtypes or (["fp32", "bf16"] if args.device.type == "cpu" else ["auto"])
    args.dtypes = list(dict.fromkeys(resolve_dtype(dtype, args.device, width) for dtype in dtypes))
    args.peers = listed(args.peers)
    return args


def listed(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def inputs(args: argparse.Namespace) -> tuple[Tensor, ViT]:
    """Normalised images (B, 3, S, S), and a backbone that every peer can be given the weights of; always the same."""
    size = (args.batch_size, 3, args.image_size, args.image_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(args.device)
    if "transformers" in args.peers and transformers_kind(args.backbone, VIT_PRESETS[args.backbone])[0]:
        return images, transformers_backbone(args.backbone, args.image_size, "sdpa")[1]
    return images, load_backbone(args.backbone, "random", args.image_size)


def run(
    script: str, title: str, args: argparse.Namespace, argv: list[str], contestants: dict, multiply_adds: int
) -> None:
    """Serves as the contestant of --only; else holds the contest and prints its table and its line of JSON.

    `multiply_adds` are those of an image in the products of the model.
    """
    if args.only is not None:
        contest.serve(contestants[args.only])
        return
    on_gpu = args.device.type == "cuda"
    command = [str(HERE / script), *argv]
    results = contest.hold(command, contestants, args.batch_size, args.repetitions, args.minutes, on_gpu)
    limits = {}
    for dtype in args.dtypes:
        rate = statistics.median(gemm_rates(args.device, dtype, SIDE[args.device.type]))
        limits[dtype] = rate * 1e12 / (2 * multiply_adds)
    print(f"{title}, {args.backbone} at {args.image_size} px, batch {args.batch_size}")
    print(contest.report(results, contestants, limits, machine()))
