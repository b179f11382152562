"""All measurements for whoever has a GPU, in one command and in so many minutes.

    python benchmarks/gpu.py --minutes 10 --out gpu.json

Runs the tests for a GPU and the other benchmarks, the most telling first, each in a process of its own. What the time
did not allow is named, as is what failed, with its last line. At the end come the table for kernels/README.md and one
line of JSON. vitface does not have to be installed; torch 2.11 or later, numpy, einops, safetensors, pillow, tqdm and
jinja2 do.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import machine

ROOT = Path(__file__).parents[1]
LIGHT = 60  # seconds; less is not worth starting anything


@dataclass(frozen=True)
class Row:
    """A row of the table; `aim` is what kernels/README.md hopes for."""

    title: str
    command: tuple[str, ...]  # without the interpreter
    aim: str = ""
    whole: bool = False  # only with half an hour or more


def benchmark(script: str, *flags: str) -> tuple[str, ...]:
    return (f"benchmarks/{script}", *flags)


LORA, DALORA = ("--adapter", "lora"), ("--adapter", "dalora", "--domains", "3")
ROWS = (
    Row("ceilings: copies, products", benchmark("ceilings.py")),
    Row("training step, LoRA, ViT-S", benchmark("train_step.py", *LORA, "--batch-size", "128"), "1.15 x"),
    Row("training step, DA-LoRA, ViT-S", benchmark("train_step.py", *DALORA, "--batch-size", "128"), "1.75 x"),
    Row("the tests", ("-m", "pytest", "-m", "gpu", "-q"), "all pass"),
    Row("SDPA's backends, ViT-S", benchmark("attention.py")),
    Row(
        "real training, ViT-S", benchmark("end_to_end.py", "--batch-size", "128", "--seconds", "30"), "loader below 3 %"
    ),
    Row("embedding, ViT-S", benchmark("embed.py", "--batch-size", "256"), "1.2 x"),
    Row("SDPA's backends, ViT-B", benchmark("attention.py", "--heads", "12"), whole=True),
    Row(
        "memory, ViT-B, batch 128",
        benchmark("end_to_end.py", "--backbone", "clip", "--batch-size", "128", "--seconds", "30"),
        "peak within 8 GB",
        whole=True,
    ),
    Row(
        "training step, LoRA, ViT-B",
        benchmark("train_step.py", *LORA, "--backbone", "clip", "--batch-size", "128"),
        "1.15 x",
        whole=True,
    ),
    Row(
        "training step, DA-LoRA, ViT-B",
        benchmark("train_step.py", *DALORA, "--backbone", "clip", "--batch-size", "128"),
        "1.6 x",
        whole=True,
    ),
    Row("embedding, ViT-B", benchmark("embed.py", "--backbone", "clip", "--batch-size", "256"), "1.2 x", whole=True),
    *(
        Row(
            f"training step, {name}, ViT-S, batch {batch}, without peers",
            benchmark("train_step.py", *adapter, "--batch-size", str(batch), "--peers", "none"),
            whole=True,
        )
        for batch in (64, 256, 512)
        for name, adapter in (("LoRA", LORA), ("DA-LoRA", DALORA))
    ),
)


def measure(row: Row, seconds: float) -> dict:
    """The last line of a benchmark, or {"passed": its last line} of the tests, or {"error": why there is neither}."""
    timed = row.command[0] in ("benchmarks/train_step.py", "benchmarks/embed.py")
    limit = ("--minutes", f"{0.8 * seconds / 60:.2f}") if timed else ()  # the rest is for the last one and the ceiling
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": seconds}
    try:
        done = subprocess.run([sys.executable, *row.command, *limit], **how)
    except subprocess.TimeoutExpired as error:
        print((error.stdout or b"").decode(), flush=True)  # bytes, whatever `text` says
        return {"error": f"not done after {seconds:.0f} s, when the time was over"}
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or lines)[-1]
        return {"error": f"exit code {done.returncode}: {last[:300]}"}
    print("\n".join(lines), flush=True)
    try:
        return {"passed": lines[-1]} if row.command[0] == "-m" else json.loads(lines[-1])
    except json.JSONDecodeError:
        return {"error": f"its last line is not JSON: {lines[-1][:300]}"}


def cell(found: dict) -> str:
    """What the table says of a result."""
    if "error" in found:
        return found["error"]
    if "passed" in found:
        return found["passed"]
    if "vitface" in found:
        ratios = [found.get(f"ratio_to_fastest_{group}") for group in ("peer", "tuned_peer")]
        against = ", ".join(f"{ratio} x" for ratio in ratios if ratio)
        return (
            f"{found['vitface']} img/s, {found['ceiling_share']:.0%} of the ceiling, {found['peak_gb']} GB; {against}"
        )
    return ", ".join(f"{name} {value}" for name, value in found.items() if isinstance(value, int | float))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="10, or 30 for all of it (default: 10)")
    parser.add_argument("--out", type=Path, help="also write the JSON there, after each row")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("torch finds no CUDA device here", file=sys.stderr)
        return 2
    end, found = time.monotonic() + 60 * args.minutes, {}
    for row in ROWS:
        left = end - time.monotonic()
        if row.whole and args.minutes < 30:
            found[row.title] = {"error": "left out; it runs with --minutes 30"}
        elif left < LIGHT:
            found[row.title] = {"error": "left out; the time was over"}
        else:
            print(f"\n== {row.title}: python {' '.join(row.command)}", flush=True)
            found[row.title] = measure(row, left)
        if args.out is not None:
            args.out.write_text(json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n", encoding="utf-8")
    print(f"\n{machine()}\n\n| | command | aim | measured |\n|---|---|---|---|")
    for row in ROWS:
        print(f"| {row.title} | `python {' '.join(row.command)}` | {row.aim} | {cell(found[row.title])} |")
    print(json.dumps({"machine": machine(), "rows": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
