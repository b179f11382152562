"""Train and compare a grid of controls over seeds. It continues where it stopped."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from vitface.commands.parser import CommandParser, add_settings, add_shared, bounds_of, number
from vitface.config import resolve
from vitface.documents import put_between_markers

STUDIES: dict[str, dict[str, Any]] = {
    "controls": {},  # the default recipe, on --train-data and --val-data
    "synthetic": {"exp": "demo"},
    "synthetic_shift": {"exp": "demo", "train_data": "synthetic_shift"},
    "tiny": {"exp": "demo", "epochs": 1, "holdout_people": 4, "max_samples": 256},
}
_SMALL = {"exp": "lfw_vit_tiny", "image_size": 112, "val_data": None}
ORACLES: dict[str, dict[str, Any]] = {  # of adapters chosen by what is known of a photo, on people kept back
    "sensors": {**_SMALL, "epochs": 3, "lora_alpha": 16.0, "degrade": "all"},
    "poses": {**_SMALL, "epochs": 10},
}
SET_BY_THE_STUDY = ("seed", "resume", "use_dalora", "dry_run")
EXAMPLES = """examples:
  vitface study tiny                            minutes: shows what a study is
  vitface study synthetic --seeds 0 1 2
  vitface study synthetic --variants lora lora_wide --lora-rank 1 --save-dir studies/rank_1
  vitface study sensors --train-data data/faces --settings base --variants oracle lora_wide --seeds 0
  vitface study controls --backbone vit_tiny_patch16 --image-size 112 --epochs 10 --train-data data/faces
"""


def add_flags(parser: CommandParser) -> None:
    parser.usage = "vitface study NAME [flags]"
    add = parser.add_argument
    add("name", choices=[*STUDIES, *ORACLES], help="which study; the flags of train change its settings")
    add(
        "--seeds",
        type=number(int, bounds_of("seed")),
        nargs="+",
        default=[0, 1, 2],
        help="one run of each variant per seed",
    )
    add("--variants", nargs="+", metavar="NAME", dest="chosen", help="train DA-LoRA and these only; default: all")
    add(
        "--settings", nargs="+", metavar="NAME", help="sensors and poses: these only, such as base rank_1; default: all"
    )
    add_shared(parser, "--docs")
    add_settings(parser, without=SET_BY_THE_STUDY)


def run(arguments: argparse.Namespace) -> None:
    from vitface.study.grid import chosen_variants, run_study
    from vitface.study.oracle import run_oracle

    given = vars(arguments)
    name, seeds, chosen, docs, which = (given.pop(key) for key in ("name", "seeds", "chosen", "docs", "settings"))
    seeds = list(dict.fromkeys(seeds))
    folder = Path(given.pop("save_dir", None) or Path("studies") / name)
    command = shlex.join(["vitface", "study", *sys.argv[2:]])
    base, page = resolve({**{**STUDIES, **ORACLES}[name], **given}), "study.md"
    if name in ORACLES:
        run_oracle(name, base, chosen, which, seeds, folder, command)
        page = "map.md"
    else:
        run_study(base, chosen_variants(base, chosen), seeds, folder, command)
    if docs is not None:
        put_between_markers(docs, f"Study: {folder.name}", (folder / page).read_text(encoding="utf-8"))
        print(f"wrote {docs}")
