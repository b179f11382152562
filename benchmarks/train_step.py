"""How fast is one training step, against timm + PEFT and transformers + PEFT?

A step is forward, CosFace over 1,000 people, backward and AdamW on adapters and head, from normalised images; random
weights, the same for all. Before a contestant is timed, its loss and adapter gradients are compared with the reference.
Each runs in every dtype, and the fastest of ours is compared with the fastest of each group. The last line is JSON.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from arguments import inputs, make_parser, parse, run
from contest import Contestant
from flops import forward_and_step
from peers import (
    ConcatenatedDomains,
    LoopedDomains,
    PooledCLS,
    TimmDALoRA,
    peft_layers,
    timm_backbone,
    transformers_backbone,
    with_peft,
)
from torch import Tensor, nn

from vitface.config import FaceConfig
from vitface.device import DTYPES
from vitface.kernels import fused
from vitface.model import ops
from vitface.model.face import FaceModel
from vitface.model.lora import adapted_linears
from vitface.model.margin import MarginLoss, make_margin
from vitface.model.vit import ViT

PEOPLE, EMBEDDING, ALPHA = 1000, 512, 16.0
EXAMPLES = """examples:
  python benchmarks/train_step.py                              LoRA on DINOv2 ViT-S/14, against every peer installed
  python benchmarks/train_step.py --adapter dalora --domains 3 against the K-loop and the concatenated form
  python benchmarks/train_step.py --peers none --batch-size 16 --dtypes fp32
"""


@dataclasses.dataclass
class Learner:
    """`forward` maps images to embeddings; `gradient` returns the gradient of layer `path`'s B in our layout; `mode` is
    torch.compile's, None for eager."""

    forward: Callable[[Tensor], Tensor]
    trained: list[nn.Parameter]
    gradient: Callable[[str], Tensor]
    mode: str | None = None
    autocast: torch.dtype | None = None
    precision: str = "highest"  # of float32 matrix products


class TrainStep:
    """One optimiser step on fixed images each time it is called; returns the loss."""

    def __init__(self, learner: Learner, images: Tensor, labels: Tensor):
        self.learner, self.images, self.labels = learner, images, labels
        self.margin = MarginLoss(make_margin("cosface", 0.35), PEOPLE, EMBEDDING, 64.0, seed=0).to(images.device)
        self.trained = [*learner.trained, self.margin.weight]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)
        mode = learner.mode  # model and margin are compiled as one graph, of every contestant
        self.loss = self.eager_loss if mode is None else torch.compile(self.eager_loss, mode=mode)

    def eager_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        low = self.learner.autocast
        with torch.autocast(images.device.type, low, enabled=low is not None):
            embedding = self.learner.forward(images)
        return self.margin(embedding.float(), labels)

    def backward(self) -> Tensor:
        torch.set_float32_matmul_precision(self.learner.precision)
        loss = self.loss(self.images, self.labels)
        loss.backward()
        return loss.detach()

    def __call__(self) -> Tensor:
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


class WithHead(nn.Module):
    """A peer's backbone and the same linear head as ours; pure bf16 backbones get bf16 images."""

    def __init__(self, backbone: nn.Module, head: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.backbone, self.dtype = backbone, dtype
        self.head = nn.Linear(head.in_features, head.out_features)
        self.head.load_state_dict(head.state_dict())

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images.to(self.dtype)).float())


def our_model(vit: ViT, args: argparse.Namespace, dtype: str, module: ModuleType) -> FaceModel:
    """A fresh copy of `vit` with adapters whose B is not zero, so that every gradient is exercised."""
    own = ViT(vit.config, vit.image_size)
    own.load_state_dict(vit.state_dict())
    domains = args.domains if args.adapter == "dalora" else 1
    config = FaceConfig(
        args.backbone,
        "random",
        vit.config,
        vit.image_size,
        lora_rank=args.rank,
        lora_alpha=ALPHA,
        num_domains=domains,
        router_depth=args.router_depth,
        head="linear",
        embedding_dim=EMBEDDING,
        dtype=dtype,
    )
    model = FaceModel(own, config).to(args.device)
    model.use_ops(module)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_linears(model.vit).values():
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.02)
    return model.train()


Build = Callable[[ViT], Learner]  # from a backbone, which a learner may not change


def ours(args: argparse.Namespace, dtype: str, module: ModuleType, mode: str | None, vit: ViT) -> Learner:
    """`mode` is torch.compile's, None for eager."""
    model = our_model(vit, args, dtype, module)
    layers = adapted_linears(model.vit)
    trained = [p for p in model.parameters() if p.requires_grad]
    return Learner(lambda images: model(images)[0], trained, lambda path: layers[path].lora_b.grad, mode)


def ours_packed(args: argparse.Namespace, dtype: str, vit: ViT) -> Learner:
    """The fused operations with attention in Triton, compiled."""
    from vitface.kernels import fused_packed  # it needs triton

    return ours(args, dtype, fused_packed, "default", vit)


@dataclasses.dataclass(frozen=True)
class Way:
    """How a peer is trained: its backbone and products in `dtype`; with `cast`, PEFT keeps the adapters in float32."""

    dtype: torch.dtype
    cast: bool = True
    autocast: torch.dtype | None = None
    precision: str = "highest"
    fused_attention: bool = True


def with_peft_by(args: argparse.Namespace, kind: str, way: Way, mode: str | None, vit: ViT) -> Learner:
    """PEFT on the backbone of `kind`; `mode` is torch.compile's, None for eager."""
    reference = our_model(vit, args, "fp32", ops)
    if kind == "timm":
        backbone = timm_backbone(vit, args.backbone, way.fused_attention)
    else:
        attention = "sdpa" if way.fused_attention else "eager"
        backbone = PooledCLS(transformers_backbone(args.backbone, args.image_size, attention)[0])
    model = with_peft(backbone, kind, reference.vit, args.rank, ALPHA, way.dtype, way.cast)
    modules = dict(model.base_model.model.named_modules())
    wrapped = WithHead(model, reference.head.proj, way.dtype).to(args.device).train()

    def gradient(path: str) -> Tensor:
        names = [name for name, _ in peft_layers(path, kind, 0)]
        return torch.cat([modules[name].lora_B["default"].weight.grad for name in names])

    trained = [p for p in wrapped.parameters() if p.requires_grad]
    return Learner(wrapped, trained, gradient, mode, way.autocast, way.precision)


def domains_by_timm(
    args: argparse.Namespace, kind: type[nn.Module], dtype: str, fused_attention: bool, mode: str | None, vit: ViT
) -> Learner:
    """DA-LoRA on timm's ViT in the frozen dtype, adapters' masters and router in float32, as ours."""
    reference = our_model(vit, args, "fp32", ops)
    backbone = timm_backbone(vit, args.backbone, fused_attention).to(DTYPES[dtype])
    model = TimmDALoRA(backbone, kind, reference.vit, reference.router, args)
    wrapped = WithHead(model, reference.head.proj, DTYPES[dtype]).to(args.device).train()
    layers = dict(zip(adapted_linears(reference.vit), model.layers, strict=True))

    def gradient(path: str) -> Tensor:
        b = layers[path].b
        return b.grad if isinstance(b, nn.Parameter) else torch.cat([part.grad for part in b], dim=1)

    return Learner(wrapped, [p for p in wrapped.parameters() if p.requires_grad], gradient, mode)


def modes(args: argparse.Namespace, tuned: bool) -> dict[str, str | None]:
    """The ways to call a model: eager, compiled, and for ours and tuned peers on a GPU compiled with CUDA graphs."""
    graphs: dict[str, str | None] = {", CUDA graphs": "reduce-overhead"} if args.device.type == "cuda" else {}
    if not args.compiled:
        return {"": None}
    return {"": None, ", compiled": "default", **(graphs if tuned else {})}


def lora_peers(args: argparse.Namespace, dtype: str) -> dict[str, tuple[str, tuple[str, ...], Build]]:
    """The documented ways (group "peers") and an expert's ("tuned_peers"): (group, modules that it needs, build)."""
    half, tuned_attention = DTYPES[dtype], args.device.type == "cuda"
    if dtype == "fp32":
        ways = {"fp32": Way(half)}
        tuned = {"fp32, oneDNN": Way(half, precision="medium", fused_attention=tuned_attention)}
    else:
        pure = Way(half, cast=False)
        ways = {f"{dtype} autocast": Way(torch.float32, autocast=half), f"{dtype}, fp32 adapters": Way(half)}
        ways[dtype] = pure
        tuned = {dtype: dataclasses.replace(pure, fused_attention=tuned_attention)}
    found = {}
    for kind in (kind for kind in args.peers if kind == "timm" or args.backbone.startswith("dinov2")):
        for group, table in (("peers", ways), ("tuned_peers", tuned)):
            for (label, way), (suffix, mode) in itertools.product(table.items(), modes(args, table is tuned).items()):
                suffix = f"{', tuned' * (table is tuned)}{suffix}"
                build = functools.partial(with_peft_by, args, kind, way, mode)
                found[f"{kind} + PEFT, {label}{suffix}"] = group, (kind, "peft"), build
    return found


def domain_peers(args: argparse.Namespace, dtype: str) -> dict[str, tuple[str, tuple[str, ...], Build]]:
    """The K-loop (group "peers") and the concatenated form ("tuned_peers") on timm, as `lora_peers`; on a CPU the
    second with non-fused attention, too, which is the faster one there."""
    kinds = [("peers", "K-loop", LoopedDomains, True), ("tuned_peers", "concatenated", ConcatenatedDomains, True)]
    if args.device.type == "cpu":
        kinds.append(("tuned_peers", "concatenated, non-fused attention", ConcatenatedDomains, False))
    found = {}
    for group, label, kind, fused_attention in kinds if "timm" in args.peers else []:
        for suffix, mode in modes(args, group == "tuned_peers").items():
            build = functools.partial(domains_by_timm, args, kind, dtype, fused_attention, mode)
            found[f"timm, {label}, {dtype}{suffix}"] = group, ("timm",), build
    return found


def contestants(args: argparse.Namespace) -> dict[str, Contestant]:
    """Ours, the formulas, and the peers, each in every dtype."""
    found = {}
    for dtype in args.dtypes:
        builds: dict[str, tuple[str, tuple[str, ...], Build]] = {}
        for suffix, mode in modes(args, tuned=True).items():
            build = functools.partial(ours, args, dtype, fused, mode)
            builds[f"vitface, {dtype}{suffix}"] = "vitface", (), build
        if args.device.type == "cuda" and args.compiled and dtype != "fp32":  # a group of its own: it may fail
            build = functools.partial(ours_packed, args, dtype)
            builds[f"vitface, packed attention, {dtype}, compiled"] = "packed", ("triton",), build
        for suffix, mode in modes(args, tuned=False).items():
            build = functools.partial(ours, args, dtype, ops, mode)
            builds[f"the formulas, {dtype}{suffix}"] = "reference", (), build
        builds |= (lora_peers if args.adapter == "lora" else domain_peers)(args, dtype)
        for name, (group, needs, build) in builds.items():
            found[name] = Contestant(group, dtype, functools.partial(checked_step, args, dtype, build), needs)
    return found


def checked_step(args: argparse.Namespace, dtype: str, build: Build) -> TrainStep:
    """A step whose loss is within 2 % (in fp32 1e-4) of the reference in float32, and whose gradients of the first and
    the last B are within 10 % (1e-3)."""
    images, vit = inputs(args)
    labels = torch.randint(PEOPLE, (args.batch_size,), generator=torch.Generator().manual_seed(1)).to(args.device)
    step = TrainStep(build(vit), images, labels)
    exact = TrainStep(ours(args, "fp32", ops, None, vit), images, labels)
    loss, want_loss = step.backward(), exact.backward()
    off = 0.0
    for path in ("blocks.0.attn.qkv", f"blocks.{len(vit.blocks) - 1}.attn.proj"):
        got, want = step.learner.gradient(path).float(), exact.learner.gradient(path).float()
        off = max(off, ((got - want).norm() / want.norm()).item())
    loss_limit, gradient_limit = (1e-4, 1e-3) if dtype == "fp32" else (0.02, 0.1)
    if not abs(loss / want_loss - 1) < loss_limit or not off < gradient_limit:
        raise SystemExit(f"its loss is {loss:.4f}, the reference's {want_loss:.4f}; its gradients are off by {off:.3f}")
    step.optimizer.zero_grad(set_to_none=True)
    return step


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("train_step.py", __doc__, EXAMPLES)
    parser.add_argument("--adapter", choices=("lora", "dalora"), default="lora")
    parser.add_argument("--domains", type=int, default=3, help="K of DA-LoRA (default: 3)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--router-depth", type=int, default=3)
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    multiply_adds = forward_and_step(our_model(inputs(args)[1], args, "fp32", ops).config)[1]
    run("train_step.py", f"training step, {args.adapter}", args, argv, contestants(args), multiply_adds)


if __name__ == "__main__":
    main()
