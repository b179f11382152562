"""How fast is one training step, against timm + PEFT and transformers + PEFT?

A step is forward, CosFace over 1,000 people, backward and AdamW on adapters and head, from normalised images; random
weights, the same for all. Before anything is timed, losses and adapter gradients are compared. The last line is JSON.
"""

import argparse
import dataclasses
from collections.abc import Callable
from types import ModuleType

import torch
from arguments import ceiling, inputs, make_parser, parse
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
from timing import interleave, peak_memory, report
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
  python benchmarks/train_step.py --peers none --batch-size 16
"""


@dataclasses.dataclass
class Contestant:
    """`forward` maps images to embeddings; `gradient` returns the gradient of layer `path`'s B in our layout."""

    forward: Callable[[Tensor], Tensor]
    trained: list[nn.Parameter]
    gradient: Callable[[str], Tensor]
    autocast: torch.dtype | None = None
    precision: str = "highest"  # of float32 matrix products


class TrainStep:
    """One optimiser step on fixed images each time it is called; returns the loss."""

    def __init__(self, contestant: Contestant, images: Tensor, labels: Tensor):
        self.contestant, self.images, self.labels = contestant, images, labels
        self.margin = MarginLoss(make_margin("cosface", 0.35), PEOPLE, EMBEDDING, 64.0, seed=0).to(images.device)
        self.trained = [*contestant.trained, self.margin.weight]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)

    def backward(self) -> Tensor:
        torch.set_float32_matmul_precision(self.contestant.precision)
        low = self.contestant.autocast
        with torch.autocast(self.images.device.type, low, enabled=low is not None):
            embedding = self.contestant.forward(self.images)
        loss = self.margin(embedding.float(), self.labels)
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


def ours(model: FaceModel, compiled: bool) -> Contestant:
    layers = adapted_linears(model.vit)
    call = torch.compile(model) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]
    return Contestant(lambda images: call(images)[0], trained, lambda path: layers[path].lora_b.grad)


def peft_contestant(backbone: nn.Module, kind: str, vit: ViT, args, how: dict) -> Contestant:
    """PEFT on a copy of `backbone`; `how` has dtype, cast, autocast, compiled, precision."""
    reference = our_model(vit, args, "fp32", ops)
    model = with_peft(backbone, kind, reference.vit, args.rank, ALPHA, how["dtype"], how["cast"])
    modules = dict(model.base_model.model.named_modules())
    wrapped = WithHead(model, reference.head.proj, how["dtype"]).to(args.device).train()

    def gradient(path: str) -> Tensor:
        names = [name for name, _ in peft_layers(path, kind, 0)]
        return torch.cat([modules[name].lora_B["default"].weight.grad for name in names])

    trained = [p for p in wrapped.parameters() if p.requires_grad]
    forward = torch.compile(wrapped) if how["compiled"] else wrapped
    return Contestant(forward, trained, gradient, how["autocast"], how["precision"])


def domain_contestant(kind: type[nn.Module], vit: ViT, args, fused_attention: bool, compiled: bool) -> Contestant:
    """DA-LoRA on timm's ViT in the frozen dtype, adapters' masters and router in float32, as ours."""
    reference = our_model(vit, args, "fp32", ops)
    dtype = DTYPES[args.dtype]
    backbone = timm_backbone(vit, args.backbone, fused_attention).to(dtype)
    model = TimmDALoRA(backbone, kind, reference.vit, reference.router, args)
    wrapped = WithHead(model, reference.head.proj, dtype).to(args.device).train()
    layers = dict(zip(adapted_linears(reference.vit), model.layers, strict=True))

    def gradient(path: str) -> Tensor:
        b = layers[path].b
        return b.grad if isinstance(b, nn.Parameter) else torch.cat([part.grad for part in b], dim=1)

    trained = [p for p in wrapped.parameters() if p.requires_grad]
    return Contestant(torch.compile(wrapped) if compiled else wrapped, trained, gradient)


def lora_peers(args, vit: ViT, groups: dict[str, list[str]]) -> dict[str, Contestant]:
    """The documented ways (group "peers") and an expert's (group "tuned_peers"), eager and compiled."""
    half = DTYPES[args.dtype]
    plain = {"dtype": torch.float32, "cast": True, "autocast": None, "precision": "highest"}
    if args.dtype != "fp32":
        ways = {
            "autocast": {**plain, "autocast": half},
            f"{args.dtype}, fp32 adapters": {**plain, "dtype": half},
            args.dtype: {**plain, "dtype": half, "cast": False},
        }
        tuned = {f"{args.dtype}, non-fused attention": ways[args.dtype]}
    else:
        ways, tuned = {"fp32": plain}, {"fp32, non-fused attention, oneDNN": {**plain, "precision": "medium"}}
    kinds = [kind for kind in args.peers if kind == "timm" or args.backbone.startswith("dinov2")]
    found = {}
    for group, table in (("peers", ways), ("tuned_peers", tuned)):
        for kind in kinds:
            for way, how in table.items():
                for compiled in (False, True) if args.compiled else (False,):
                    backbone = peer_backbone(kind, vit, args, fused_attention=group == "peers")
                    name = f"{kind} + PEFT, {way}{', compiled' if compiled else ''}"
                    found[name] = peft_contestant(backbone, kind, vit, args, {**how, "compiled": compiled})
                    groups[group].append(name)
    return found


def peer_backbone(kind: str, vit: ViT, args, fused_attention: bool) -> nn.Module:
    if kind == "timm":
        return timm_backbone(vit, args.backbone, fused_attention)
    attention = "sdpa" if fused_attention else "eager"
    return PooledCLS(transformers_backbone(args.backbone, args.image_size, attention)[0])


def domain_peers(args, vit: ViT, groups: dict[str, list[str]]) -> dict[str, Contestant]:
    """The K-loop (group "peers") and the concatenated form (group "tuned_peers"), with SDPA as they come, and both with
    non-fused attention (group "expert_peers")."""
    found = {}
    for group, kind, label, fused_attention in (
        ("peers", LoopedDomains, "K-loop", True),
        ("tuned_peers", ConcatenatedDomains, "concatenated", True),
        ("expert_peers", LoopedDomains, "K-loop, non-fused attention", False),
        ("expert_peers", ConcatenatedDomains, "concatenated, non-fused attention", False),
    ):
        for compiled in (False, True) if args.compiled else (False,):
            name = f"timm, {label}{', compiled' if compiled else ''}"
            found[name] = domain_contestant(kind, vit, args, fused_attention, compiled)
            groups.setdefault(group, []).append(name)
    return found


def check(steps: dict[str, TrainStep], exact: TrainStep, layers: list[str], dtype: str) -> None:
    """Losses within 2 % (1e-4 in fp32), gradients of the first and last B within 10 % (1e-3) of the fp32 reference."""
    loss_limit, gradient_limit = (1e-4, 1e-3) if dtype == "fp32" else (0.02, 0.1)
    want_loss = exact.backward()
    want = [exact.contestant.gradient(path).float() for path in layers]
    for name, step in steps.items():
        loss = step.backward()
        got = [step.contestant.gradient(path).float() for path in layers]
        off = max(((g - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True))
        assert abs(loss / want_loss - 1) < loss_limit, f"{name}: loss {loss:.4f}, reference {want_loss:.4f}"
        assert off < gradient_limit, f"{name}: gradient off by {off:.3f}"
        step.optimizer.zero_grad(set_to_none=True)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("train_step.py", __doc__, EXAMPLES)
    parser.add_argument("--adapter", choices=("lora", "dalora"), default="lora")
    parser.add_argument("--domains", type=int, default=3, help="K of DA-LoRA (default: 3)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--router-depth", type=int, default=3)
    return parse(parser, argv)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    generator = torch.Generator().manual_seed(0)
    images, vit = inputs(args, generator)
    labels = torch.randint(PEOPLE, (args.batch_size,), generator=generator).to(args.device)
    groups: dict[str, list[str]] = {"peers": [], "tuned_peers": []}
    model = our_model(vit, args, args.dtype, fused)
    contestants = {"vitface": ours(model, False)}
    if args.compiled:
        contestants["vitface, compiled"] = ours(our_model(vit, args, args.dtype, fused), True)
    contestants["reference"] = ours(our_model(vit, args, args.dtype, ops), False)
    if args.peers:
        contestants.update((lora_peers if args.adapter == "lora" else domain_peers)(args, vit, groups))
    steps = {name: TrainStep(contestant, images, labels) for name, contestant in contestants.items()}
    exact = TrainStep(ours(our_model(vit, args, "fp32", ops), False), images, labels)
    last = len(vit.blocks) - 1
    check(steps, exact, ["blocks.0.attn.qkv", f"blocks.{last}.attn.proj"], args.dtype)
    rates = interleave(steps, args.batch_size, args.repetitions, warmup=2)
    print(
        f"training step, {args.adapter}, {args.backbone} at {args.image_size} px, batch {args.batch_size}, {args.dtype}"
    )
    limit = ceiling(args, forward_and_step(model.config)[1])
    print(report(rates, groups, limit, peak_memory(steps)))


if __name__ == "__main__":
    main()
