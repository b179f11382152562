"""The bytes that a LoRA training step keeps for its backward pass, against timm + PEFT, by the same count.

Counted are the storages that autograd saves in an eager forward pass, but for parameters, without recomputed blocks: in
float32, and as each trains in bf16 (ours a bf16 backbone; the peer autocast over float32, as its users write it). They
grow with the images, so two are enough. A CPU counts them: attention is torch's here, as on a GPU, and an adapted layer
keeps the same numbers there, side by side in one tensor.
"""

import sys
from types import ModuleType

import torch
from peers import timm_backbone, with_peft
from torch import nn
from train_step import ALPHA, EMBEDDING, PEOPLE, WithHead, arguments, our_model

from vitface.kernels import fused
from vitface.model import ops
from vitface.model.margin import MarginLoss, make_margin
from vitface.store.backbone import load_backbone
from vitface.training.memory import GB, saved_bytes

IMAGES = 2
AS_ON_A_GPU = ModuleType("as_on_a_gpu")
vars(AS_ON_A_GPU).update({**vars(fused), "attention": ops.attention})


def saved(model: nn.Module, side: int, autocast: bool) -> int:
    """The bytes that autograd saves for an image."""
    images, labels = torch.randn(IMAGES, 3, side, side), torch.zeros(IMAGES, dtype=torch.long)
    margin = MarginLoss(make_margin("cosface", 0.35), PEOPLE, EMBEDDING, 64.0, seed=0)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = model(images)
        return margin((found if isinstance(found, torch.Tensor) else found[0]).float(), labels)

    return saved_bytes(loss, nn.ModuleList([model, margin])) // IMAGES


def main(argv: list[str]) -> None:
    args = arguments(argv)
    vit = load_backbone(args.backbone, "random", args.image_size)
    print(f"{args.backbone} at {args.image_size} px, GB for {args.batch_size} images, torch {torch.__version__}")
    for dtype in ("fp32", "bf16"):
        ours = our_model(vit, args, dtype, AS_ON_A_GPU)
        head = ours.head.proj
        assert isinstance(head, nn.Linear)
        peer = with_peft(
            timm_backbone(vit, args.backbone, True), "timm", ours.vit, args.rank, ALPHA, torch.float32, True
        )
        theirs = WithHead(peer, head, torch.float32).train()
        sizes = saved(ours, args.image_size, False), saved(theirs, args.image_size, dtype == "bf16")
        mine, theirs = (args.batch_size * size / GB for size in sizes)
        print(f"{dtype}  vitface {mine:.2f}  timm + PEFT {theirs:.2f}  {mine / theirs:.2f} x", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
