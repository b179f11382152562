"""How fast are embeddings, against timm, transformers, ONNX Runtime and OpenVINO?

From normalised images to the CLS embedding of a LoRA model that is merged into its backbone, or was never adapted: the
same function for all, with the same random weights. Before a contestant is timed, its embeddings are compared with the
reference. Each runs in every dtype, and the fastest of ours is compared with the fastest of each group. The last line
is JSON.
"""

import argparse
import functools
import io
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from arguments import inputs, listed, make_parser, parse, run
from contest import Contestant
from flops import forward_and_step
from peers import TIMM, PooledCLS, timm_backbone, transformers_backbone, transformers_kind
from torch import Tensor, nn

from vitface.config import FaceConfig
from vitface.device import DTYPES
from vitface.kernels import fused
from vitface.model import ops
from vitface.model.face import FaceModel
from vitface.model.inference import prepare_inference
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS

MINIMUM_COSINE = {"bf16": 0.999, "fp16": 0.999, "fp32": 0.99999}
EXAMPLES = """examples:
  python benchmarks/embed.py                           DINOv2 ViT-S/14, batch 8, against everything installed
  python benchmarks/embed.py --dtypes fp32 --batch-size 16
  python benchmarks/embed.py --peers none --runtimes openvino
"""
Embed = Callable[[], Tensor]
Build = Callable[[ViT, Tensor], Embed]


def our_model(vit: ViT, args: argparse.Namespace, dtype: str, module: ModuleType) -> FaceModel:
    own = ViT(vit.config, vit.image_size)
    own.load_state_dict(vit.state_dict())
    config = FaceConfig(args.backbone, "random", vit.config, vit.image_size, dtype=dtype)
    model = FaceModel(own, config).to(args.device).eval()
    model.use_ops(module)
    return model


def ours(args: argparse.Namespace, dtype: str, prepared: bool, vit: ViT, images: Tensor) -> Embed:
    model = our_model(vit, args, dtype, fused)
    if prepared:
        prepare_inference(model)
    return torch.no_grad()(lambda: model(images)[0])


def by_torch(args: argparse.Namespace, kind: str, dtype: str, tuned: bool, how: str, vit: ViT, images: Tensor) -> Embed:
    """A peer as it comes, or tuned: with non-fused attention on the CPU. `how`: eager, compiled, frozen, graphs."""
    import torch._inductor.config as inductor

    fused_attention = not tuned or args.device.type == "cuda"
    if kind == "timm":
        model = timm_backbone(vit, args.backbone, fused_attention)
    else:
        attention = "sdpa" if fused_attention else "eager"
        model = PooledCLS(transformers_backbone(args.backbone, args.image_size, attention)[0])
    model, images = model.to(args.device, DTYPES[dtype]).eval(), images.to(DTYPES[dtype])
    inductor.freezing = how == "frozen"
    call = model if how == "eager" else torch.compile(model, mode="reduce-overhead" if how == "graphs" else None)
    return torch.no_grad()(lambda: call(images))


class _Plain(nn.Module):
    def __init__(self, model: FaceModel):
        super().__init__()
        self.vit = model.vit.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit.pool(self.vit(images))


def by_onnx_runtime(args: argparse.Namespace, vit: ViT, images: Tensor) -> Embed:
    import onnxruntime

    file, model = io.BytesIO(), _Plain(our_model(vit, args, "fp32", ops))
    torch.onnx.export(model, (images,), file, dynamo=False, opset_version=17, input_names=["images"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def by_openvino(args: argparse.Namespace, dtype: str, vit: ViT, images: Tensor) -> Embed:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    exported = openvino.convert_model(_Plain(our_model(vit, args, "fp32", ops)), example_input=images)
    request = openvino.Core().compile_model(exported, "CPU", settings).create_infer_request()
    return lambda: torch.from_numpy(np.array(request.infer([images.numpy()])[0]))


def torch_peers(args: argparse.Namespace, dtype: str) -> dict[str, tuple[str, tuple[str, ...], Build]]:
    """As they come (group "peers") and as an expert would run them ("tuned_peers"): (group, modules needed, build)."""
    tuned_ways = ["graphs"] if args.device.type == "cuda" else ["eager", "compiled", "frozen"]
    found = {}
    has = {
        "timm": args.backbone in TIMM,
        "transformers": transformers_kind(args.backbone, VIT_PRESETS[args.backbone])[0],
    }
    for kind in (kind for kind in args.peers if has[kind]):
        for group, ways in (("peers", ["eager", "compiled"]), ("tuned_peers", tuned_ways)):
            for way in ways if args.compiled else ["eager"]:
                name = f"{kind}, {dtype}{', tuned' * (group == 'tuned_peers')}, {way}"
                found[name] = group, (kind,), functools.partial(by_torch, args, kind, dtype, group != "peers", way)
    return found


def contestants(args: argparse.Namespace) -> dict[str, Contestant]:
    """Ours, peers and runtimes, each in every dtype; ONNX Runtime has float32 alone on the CPU."""
    found = {}
    for dtype in args.dtypes:
        builds: dict[str, tuple[str, tuple[str, ...], Build]] = {
            f"vitface, {dtype}, prepared": ("vitface", (), functools.partial(ours, args, dtype, True)),
            f"not prepared, {dtype}": ("reference", (), functools.partial(ours, args, dtype, False)),
        }
        builds |= torch_peers(args, dtype)
        if "onnxruntime" in args.runtimes and dtype == "fp32":
            needs = ("onnxruntime", "onnx")
            builds["ONNX Runtime, fp32"] = "runtimes", needs, functools.partial(by_onnx_runtime, args)
        if "openvino" in args.runtimes:
            builds[f"OpenVINO, {dtype}"] = "runtimes", ("openvino",), functools.partial(by_openvino, args, dtype)
        for name, (group, needs, build) in builds.items():
            found[name] = Contestant(group, dtype, functools.partial(checked_embed, args, dtype, build), needs)
    return found


def checked_embed(args: argparse.Namespace, dtype: str, build: Build) -> Embed:
    """An embedding whose rows have a cosine of at least MINIMUM_COSINE with the reference in float32."""
    images, vit = inputs(args)
    embed = build(vit, images)
    with torch.no_grad():
        exact = our_model(vit, args, "fp32", ops)(images)[0]
    cosine = F.cosine_similarity(embed().float().cpu(), exact.float().cpu()).min().item()
    if not cosine >= MINIMUM_COSINE[dtype]:
        raise SystemExit(f"its cosine with the float32 reference is {cosine:.6f}")
    return embed


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("embed.py", __doc__, EXAMPLES)
    parser.add_argument("--runtimes", default="onnxruntime,openvino", help="comma list, on a CPU; or none")
    args = parse(parser, argv)
    args.runtimes = listed(args.runtimes) if args.device.type == "cpu" else []
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    multiply_adds = forward_and_step(our_model(inputs(args)[1], args, "fp32", ops).config)[0]
    run("embed.py", "embedding", args, argv, contestants(args), multiply_adds)


if __name__ == "__main__":
    main()
