"""Which backbones there are: their sizes and licences, and where each is on this machine."""

import argparse

from vitface.commands.parser import CommandParser
from vitface.presets import VIT_ALIASES, VIT_PRESETS
from vitface.store.sources import SOURCES

EXAMPLES = """examples:
  vitface backbones                                  a line each
"""
RANK = 16  # of the LoRA whose parameters are counted


def add_flags(parser: CommandParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> None:
    from vitface.store.backbone import backbone_files, expected_tensors

    head = ("name", "parameters", "image", "tokens", f"LoRA, rank {RANK}", "licence", "found at")
    rows: list[tuple[str, ...]] = [head]
    short = {name: alias for alias, name in VIT_ALIASES.items()}
    for name, config in VIT_PRESETS.items():
        side = config.usual_size
        parameters = sum(tensor.numel() for tensor in expected_tensors(config).values())
        lora = RANK * config.depth * (4 + 2) * config.embed_dim  # A (R, D) and B (3 D, R) of qkv, A and B of proj
        licence = SOURCES[name].licence.partition(",")[0] if name in SOURCES else "Apache-2.0"
        found = [str(path) for path in backbone_files(name)[:1]] or ["-"]
        called = f"{name} ({short[name]})" if name in short else name
        size = (f"{parameters / 1e6:.1f} M", f"{side} px", str(config.num_tokens(side)), f"{lora:,}")
        rows.append((called, *size, licence, *found))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nvitface fetch NAME gets those whose original may be downloaded, vitface convert reads a file that you have"
    )
