"""What this machine can do at most: how fast memory is copied, and how fast large matrices are multiplied.

    python benchmarks/ceilings.py [--device cuda] [--dtype bf16]

Copies are counted as bytes read plus bytes written. Both sizes are large for their device, so that caches and launches
do not count. Medians with their spread; the last line is JSON.
"""

import argparse
import json
import statistics

import torch
from timing import interleave, machine

from vitface.device import DTYPES, resolve_device, resolve_dtype

SIDE = {"cuda": 8192, "cpu": 1024}  # of the square matrices
COPIED = {"cuda": 2**30, "cpu": 2**27}  # bytes, read and written each
REPETITIONS = 15


def gemm_rates(device: torch.device, dtype: str, side: int) -> list[float]:
    """TFLOP/s of (side, side) times (side, side), a multiply-add being two, of each repetition."""
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    rates = interleave({"gemm": lambda: a @ b}, 1, REPETITIONS, warmup=3)["gemm"]
    return [2 * side**3 * rate / 1e12 for rate in rates]


def copy_rates(device: torch.device, size: int) -> list[float]:
    """GB/s, 10^9 bytes read or written, of a copy of `size` bytes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    rates = interleave({"copy": lambda: target.copy_(source)}, 1, REPETITIONS, warmup=3)["copy"]
    return [2 * size * rate / 1e9 for rate in rates]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--side", type=int, help="of the matrices; default: 8192 on CUDA, 1024 on the CPU")
    parser.add_argument("--copied", type=int, help="bytes; default: 1 GiB on CUDA, 128 MiB on the CPU")
    args = parser.parse_args(argv)
    device = resolve_device(args.device)
    side, copied = args.side or SIDE[device.type], args.copied or COPIED[device.type]
    dtype = resolve_dtype(args.dtype, device, side)
    measured = {
        f"copy of {copied:,} bytes, GB/s": copy_rates(device, copied),
        f"product of {side} x {side} matrices, {dtype}, TFLOP/s": gemm_rates(device, dtype, side),
    }
    print(machine())
    for name, rates in measured.items():
        print(f"{name}: {statistics.median(rates):.4g} ({min(rates):.4g} to {max(rates):.4g})")
    copy, gemm = (float(f"{statistics.median(rates):.4g}") for rates in measured.values())
    print(json.dumps({"copy_gb_per_s": copy, f"{dtype}_tflop_per_s": gemm, "side": side, "copied": copied}))


if __name__ == "__main__":
    main()
