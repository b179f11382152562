"""Make a face model from adapters that PEFT trained."""

import argparse
import sys
from pathlib import Path

from vitface.commands.parser import SHARED, CommandParser, add_shared
from vitface.errors import ConfigError

EXAMPLES = """examples:
  vitface import-peft tuned --into runs/a --out b                new adapters; head and router of runs/a
  vitface import-peft adapter --backbone dinov2 --out models/a   the embedding is the adapted CLS token

ADAPTER is a folder with adapter_config.json and adapter_model.safetensors, with the names of timm or transformers; or
a folder of such folders, domain-0, domain-1, ..., as `export --format peft-timm` writes for DA-LoRA.
"""


def add_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="PEFT folder, or a folder of domain-0, domain-1, ...")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the new face model, for vitface.load")
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--into", type=Path, metavar="CHECKPOINT", help="face model whose adapters are replaced")
    text = "the frozen backbone that the adapters were trained on; `vitface backbones` lists them"
    base.add_argument("--backbone", **{**SHARED["--backbone"], "help": text})
    add_shared(parser, "--weights", "--image-size")


def run(arguments: argparse.Namespace) -> None:
    from vitface.evaluation.benchmarks import next_command
    from vitface.exchange.bundle import face_files, write_folder
    from vitface.exchange.from_peft import adapted_backbone, adapters_into

    if arguments.into and arguments.image_size:
        raise ConfigError("a checkpoint knows its image size; --image-size goes with --backbone")
    if arguments.into:
        model, weights, notes = adapters_into(arguments.adapter, arguments.into, arguments.weights)
    else:
        model, weights, notes = adapted_backbone(
            arguments.adapter, arguments.backbone, arguments.weights, arguments.image_size
        )
    write_folder(arguments.out, {"": face_files(model, weights)})
    print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
    config = model.config
    print(
        f"wrote {arguments.out}: rank {config.lora_rank} on {config.lora_targets}, alpha {config.lora_alpha:g} "
        f"({config.lora_scaling}), {config.num_domains} domain{'s' * (config.num_domains > 1)}\n"
        f"next: {next_command(arguments.out, 'data')}"
    )
