"""Which of SDPA's backends is fastest for a ViT's few hundred tokens on this GPU, forward and backward?

    python benchmarks/attention.py [--batch-size 128] [--heads 6] [--tokens 257 197]

Head dimension 64, bf16, no mask. q, k and v are views of one qkv projection, as in the model, and so is their
gradient. Before anything is timed, each backend's output and gradient are compared with the formula in float32.
Backends take turns; times are medians with their spread. The last line is JSON: milliseconds, null where torch has no
such kernel here. Exit code 2 without CUDA.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable

import torch
from timing import interleave, machine
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitface.model.ops import split_heads

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
HEAD_DIM, LIMIT = 64, 0.02  # of the error beside float32, as a part of the result's size


def forward(backend: SDPBackend, qkv: Tensor, heads: int) -> Tensor:
    """(B, N, 3 D) -> (B, nh, N, hd)."""
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(*split_heads(qkv, heads))


def both(backend: SDPBackend, qkv: Tensor, dout: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Output, and gradient of qkv."""
    out = forward(backend, qkv, heads)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def usable(qkv: Tensor, dout: Tensor, heads: int) -> dict[str, SDPBackend]:
    """Those that torch runs here; SystemExit if one of them is wrong."""
    exact = both(SDPBackend.MATH, qkv.detach().float().requires_grad_(), dout.float(), heads)
    found = {}
    for name, backend in BACKENDS.items():
        try:
            with warnings.catch_warnings():  # torch says in warnings why it cannot
                warnings.simplefilter("ignore")
                got = both(backend, qkv, dout, heads)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            continue
        off = max(((g.float() - w).norm() / w.norm()).item() for g, w in zip(got, exact, strict=True))
        if not off <= LIMIT:
            raise SystemExit(f"{name} is off by {off:.3g} of the result's size")
        found[name] = backend
    return found


def measure(batch: int, tokens: int, heads: int, repetitions: int) -> dict[str, dict[str, list[float] | None]]:
    """Milliseconds of each repetition, by "forward" and "forward + backward", then by backend."""
    generator = torch.Generator("cuda").manual_seed(0)
    how = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
    qkv = torch.randn(batch, tokens, 3 * heads * HEAD_DIM, **how).requires_grad_()
    dout = torch.randn(batch, heads, tokens, HEAD_DIM, **how)
    found = usable(qkv, dout, heads)
    steps: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {name: lambda b=b: forward(b, qkv.detach(), heads) for name, b in found.items()},
        "forward + backward": {name: lambda b=b: both(b, qkv, dout, heads) for name, b in found.items()},
    }
    times = {}
    for part, contestants in steps.items():
        rates = interleave(contestants, batch, repetitions, warmup=5)
        milliseconds = {name: [1000 * batch / rate for rate in values] for name, values in rates.items()}
        times[part] = {name: milliseconds.get(name) for name in BACKENDS}
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--heads", type=int, default=6, help="6: ViT-S, 12: ViT-B (default: 6)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[257, 197])
    parser.add_argument("--repetitions", type=int, default=25)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks/attention.py measures GPU kernels, and torch finds no CUDA device here", file=sys.stderr)
        return 2
    print(f"{machine()}\n{args.batch_size} images, {args.heads} heads; ms (min to max)")
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for tokens in args.tokens:
        summary[str(tokens)] = {}
        for part, times in measure(args.batch_size, tokens, args.heads, args.repetitions).items():
            medians = {name: values and round(statistics.median(values), 4) for name, values in times.items()}
            summary[str(tokens)][part] = medians
            for name, values in times.items():
                spread = f"{medians[name]:>8} ({min(values):.4f} to {max(values):.4f})" if values else "not available"
                print(f"{tokens} tokens  {part:<20}{name:<11}{spread}")
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
