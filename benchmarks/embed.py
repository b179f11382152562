"""How fast are embeddings, against timm, transformers, ONNX Runtime and OpenVINO?

From normalised images to the CLS embedding of a LoRA model that is merged into its backbone, or was never adapted: the
same function for all, with the same random weights. Before anything is timed, embeddings are compared. The last line is
JSON. Runtimes that are not installed are left out, and said to be.
"""

import argparse
import importlib.util
import io
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from arguments import ceiling, inputs, listed, make_parser, parse
from flops import forward_and_step
from peers import PooledCLS, timm_backbone, transformers_backbone
from timing import interleave, peak_memory, report
from torch import Tensor, nn

from vitface.config import FaceConfig
from vitface.device import DTYPES
from vitface.kernels import fused
from vitface.model import ops
from vitface.model.face import FaceModel
from vitface.model.inference import prepare_inference
from vitface.model.vit import ViT

MINIMUM_COSINE = {"bf16": 0.999, "fp16": 0.999, "fp32": 0.99999}
EXAMPLES = """examples:
  python benchmarks/embed.py                           DINOv2 ViT-S/14, batch 8, against everything installed
  python benchmarks/embed.py --dtype fp32 --batch-size 16
  python benchmarks/embed.py --peers none --runtimes openvino
"""
Embed = Callable[[], Tensor]


def our_model(vit: ViT, args: argparse.Namespace, module: ModuleType = fused) -> FaceModel:
    own = ViT(vit.config, vit.image_size)
    own.load_state_dict(vit.state_dict())
    config = FaceConfig(args.backbone, "random", vit.config, vit.image_size, dtype=args.dtype)
    model = FaceModel(own, config).to(args.device).eval()
    model.use_ops(module)
    return model


def calls(model: Callable[[Tensor], Tensor], images: Tensor) -> Embed:
    def call() -> Tensor:
        with torch.no_grad():
            return model(images)

    return call


def torch_peers(vit: ViT, args: argparse.Namespace, images: Tensor, groups: dict[str, list[str]]) -> dict[str, Embed]:
    """As they come (group "peers"), and with non-fused attention and frozen graphs (group "tuned_peers")."""
    found, dtype = {}, DTYPES[args.dtype]
    for kind in args.peers:
        if kind == "transformers" and not args.backbone.startswith("dinov2"):
            continue
        for tuned in (False, True):
            model = peer(kind, vit, args, fused_attention=not tuned).to(args.device, dtype).eval()
            label = f"{kind}, {args.dtype}{', non-fused attention' if tuned else ''}"
            ways = {label: model}
            if args.compiled:
                ways[f"{label}, compiled"] = compiled(model, images.to(dtype), freezing=False)
                if tuned:
                    ways[f"{label}, compiled and frozen"] = compiled(model, images.to(dtype), freezing=True)
            found |= {name: calls(way, images.to(dtype)) for name, way in ways.items()}
            groups["tuned_peers" if tuned else "peers"] += ways
    return found


def peer(kind: str, vit: ViT, args: argparse.Namespace, fused_attention: bool) -> nn.Module:
    if kind == "timm":
        return timm_backbone(vit, args.backbone, fused_attention)
    return PooledCLS(transformers_backbone(args.backbone, args.image_size, "sdpa" if fused_attention else "eager")[0])


def compiled(model: nn.Module, images: Tensor, freezing: bool) -> Callable[[Tensor], Tensor]:
    """Compiled here and now: freezing is a global switch of inductor."""
    import torch._inductor.config as inductor

    torch.compiler.reset()
    before, inductor.freezing = inductor.freezing, freezing
    try:
        way = torch.compile(model)
        with torch.no_grad():
            way(images)
        return way
    finally:
        inductor.freezing = before


def runtimes(vit: ViT, args: argparse.Namespace, images: Tensor, groups: dict[str, list[str]]) -> dict[str, Embed]:
    """ONNX Runtime (float32 only on the CPU) and OpenVINO, from the plain model, on as many threads as torch."""
    plain, found = _Plain(our_model(vit, argparse.Namespace(**vars(args) | {"dtype": "fp32"}), ops)), {}
    for name, build in (("onnxruntime", onnx_runtime), ("openvino", openvino)):
        if name not in args.runtimes:
            continue
        if importlib.util.find_spec(name) is None or args.device.type != "cpu":
            print(f"{name} is not installed or does not serve this device: left out")
        elif name == "openvino" or args.dtype == "fp32":
            found[f"{name}, {args.dtype}"] = build(plain, images, args.dtype)
    groups["runtimes"] += found
    return found


class _Plain(nn.Module):
    def __init__(self, model: FaceModel):
        super().__init__()
        self.vit = model.vit.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)[:, 0]


def onnx_runtime(model: nn.Module, images: Tensor, dtype: str) -> Embed:
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(model, (images,), file, dynamo=False, opset_version=17, input_names=["images"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def openvino(model: nn.Module, images: Tensor, dtype: str) -> Embed:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    exported = openvino.convert_model(model, example_input=images)
    request = openvino.Core().compile_model(exported, "CPU", settings).create_infer_request()
    return lambda: torch.from_numpy(np.array(request.infer([images.numpy()])[0]))


def check(embeds: dict[str, Embed], exact: Tensor, dtype: str) -> None:
    for name, embed in embeds.items():
        cosine = F.cosine_similarity(embed().float().cpu(), exact.float().cpu()).min().item()
        assert cosine >= MINIMUM_COSINE[dtype], f"{name}: cosine {cosine:.6f} with the float32 reference"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("embed.py", __doc__, EXAMPLES)
    parser.add_argument("--runtimes", default="onnxruntime,openvino", help="comma list; or none")
    args = parse(parser, argv)
    args.runtimes = listed(args.runtimes)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    images, vit = inputs(args, torch.Generator().manual_seed(0))
    groups: dict[str, list[str]] = {"peers": [], "tuned_peers": [], "runtimes": []}
    with torch.no_grad():
        exact = our_model(vit, argparse.Namespace(**vars(args) | {"dtype": "fp32"}), ops)(images)[0]
    prepared, plain = prepare_inference(our_model(vit, args)), our_model(vit, args)
    embeds = {
        "vitface, prepared": calls(lambda x: prepared(x)[0], images),
        "unprepared": calls(lambda x: plain(x)[0], images),
    }
    embeds |= torch_peers(vit, args, images, groups)
    embeds |= runtimes(vit, args, images, groups)
    check(embeds, exact, args.dtype)
    rates = interleave(embeds, args.batch_size, args.repetitions, warmup=2)
    print(f"embedding, {args.backbone} at {args.image_size} px, batch {args.batch_size}, {args.dtype}")
    limit = ceiling(args, forward_and_step(plain.config)[0])
    print(report(rates, groups, limit, peak_memory(embeds)))


if __name__ == "__main__":
    main()
