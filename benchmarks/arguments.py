"""What the model benchmarks share: their flags, and the images and weights that all contestants get."""

import argparse
import statistics

import torch
from ceilings import SIDE, gemm_rates
from peers import transformers_backbone
from torch import Tensor

from vitface.config import VIT_PRESETS, backbone_name
from vitface.device import DTYPES, resolve_device, resolve_dtype
from vitface.model.vit import ViT
from vitface.store.backbones import load_backbone


def make_parser(name: str, description: str | None, examples: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        name, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="dinov2", help="backbone preset (default: dinov2)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--peers", default="timm,transformers", help="comma list of timm, transformers; or none")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="also compiled forms")
    parser.add_argument("--repetitions", type=int, default=15)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """With every "auto" resolved and lists as lists."""
    args = parser.parse_args(argv)
    args.backbone, args.device = backbone_name(args.backbone), resolve_device(args.device)
    args.dtype = resolve_dtype(args.dtype, args.device, VIT_PRESETS[args.backbone].embed_dim)
    args.peers = listed(args.peers)
    return args


def listed(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def inputs(args: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, ViT]:
    """Normalised images (B, 3, S, S), and a backbone that every peer can be given the weights of."""
    size = (args.batch_size, 3, args.image_size, args.image_size)
    images = torch.randn(size, generator=generator).to(args.device)
    if "transformers" in args.peers and args.backbone.startswith("dinov2"):
        return images, transformers_backbone(args.backbone, args.image_size, "sdpa")[1]
    return images, load_backbone(args.backbone, "random", args.image_size)


def ceiling(args: argparse.Namespace, multiply_adds: int) -> float:
    """img/s at which `multiply_adds` an image would run as fast as one large product does here."""
    rate = statistics.median(gemm_rates(args.device, args.dtype, SIDE[args.device.type]))
    return rate * 1e12 / (2 * multiply_adds)
