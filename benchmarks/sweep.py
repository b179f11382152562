"""Training step and embedding over batch sizes, backbones, adapters and numbers of domains, one table at the end.

    python benchmarks/sweep.py sweep.json [--device cuda] [--docs kernels/README.md]

Each row is one call of train_step.py or embed.py in a process of its own, and is written to the JSON file when it is
done: a sweep that was stopped goes on with what is missing, and `--docs` alone writes the table of what is there. A row
that does not fit into memory says so. Peers take most of the time, so they run at `--peers-at` these batch sizes only.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from vitface.documents import put_between_markers
from vitface.files import replace_file

HERE = Path(__file__).parent
BATCHES = (8, 16, 32, 64, 128, 256, 512)
BACKBONES = ("dinov2", "clip")  # ViT-S/14, ViT-B/16
DOMAINS = (1, 2, 3, 4, 8)  # at the batch sizes with peers; 3 at all
TITLE = "Sweep"


def rows(args: argparse.Namespace) -> list[list[str]]:
    """The commands, without the interpreter."""
    found = []
    for backbone in args.backbones:
        for batch in args.batches:
            peers = "timm" if batch in args.peers_at else "none"
            common = ["--backbone", backbone, "--batch-size", str(batch), "--device", args.device, "--peers", peers]
            common += ["--repetitions", str(args.repetitions), "--image-size", str(args.image_size)]
            common += [] if args.compiled else ["--no-compiled"]
            found.append(["embed.py", *common])
            found.append(["train_step.py", *common, "--adapter", "lora"])
            counts = [count for count in args.domains if batch in args.peers_at or count == 3]
            found += [["train_step.py", *common, "--adapter", "dalora", "--domains", str(count)] for count in counts]
    return found


def measure(command: list[str]) -> dict:
    """The last line of what the benchmark prints, or {"error": "out of memory"}; SystemExit if it failed otherwise."""
    done = subprocess.run([sys.executable, HERE / command[0], *command[1:]], capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if any(word in done.stderr for word in ("OutOfMemoryError", "CUDA out of memory", "DefaultCPUAllocator")):
        return {"error": "out of memory"}
    raise SystemExit(f"python benchmarks/{' '.join(command)}\n{done.stderr}")


def table(results: dict[str, dict]) -> str:
    """Markdown; a row for each command, in the order in which they were measured."""
    machines = sorted({row["machine"] for row in results.values() if "machine" in row})
    lines = [f"`python benchmarks/sweep.py`; {'; '.join(machines) or 'nothing was measured'}.", ""]
    lines += ["| benchmark | img/s | of the ceiling | peak GB | times the fastest peer |", "|---|---|---|---|---|"]
    for command, row in results.items():
        if "error" in row:
            cells = [row["error"], "", "", ""]
        else:
            ratio = row.get("ratio_to_fastest_peer")
            cells = [
                f"{row['vitface']:,.1f}",
                f"{row['ceiling_share']:.1%}",
                row["peak_gb"],
                f"{ratio} x" * bool(ratio),
            ]
        lines.append(f"| `{command}` | {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="JSON file of the rows; continued if it is there")
    parser.add_argument("--docs", type=Path, help="also put the table there, between two markers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--domains", type=int, nargs="+", default=DOMAINS)
    parser.add_argument("--peers-at", type=int, nargs="*", default=[128], help="batch sizes (default: 128)")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    for command in rows(args):
        name = " ".join(command)
        if name not in results:
            results[name] = measure(command)
            replace_file(args.results, (json.dumps(results, indent=1) + "\n").encode())
            print(f"{name}: {results[name].get('vitface', results[name].get('error'))}")
    if args.docs is not None:
        put_between_markers(args.docs, TITLE, table(results))


if __name__ == "__main__":
    main()
