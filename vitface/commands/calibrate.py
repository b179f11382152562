"""Find the threshold for "same person" on labelled pairs, and store it with a run or beside a frozen backbone."""

import argparse
import re
import sys
from pathlib import Path

from vitface.commands.evaluate import OTHERS, own_pairs
from vitface.commands.parser import MODEL_FLAGS, CommandParser, add_shared
from vitface.config import to_flag
from vitface.errors import ConfigError, EvaluationError, command
from vitface.evaluation.benchmarks import BENCHMARKS

EXAMPLES = """examples:
  vitface calibrate --backbone lvface_b --bench lfw         data/lfw.bin: FAR 0.01 from 3,000 pairs of different people
  vitface calibrate --backbone lvface_b --bench mine.csv    your own pairs, or any .bin
  vitface calibrate --checkpoint runs/a --bench lfw         instead of what people held out of training gave

A false accept rate needs 30 expected false accepts: 3,000 pairs of different people for 0.01, 30,000 for 0.001. It
holds for people and photos like those of the pairs: calibrate on your own kind of photos where you can.
"""


def add_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add("--bench", required=True, metavar="NAME", help="a benchmark, such as lfw, or a file of pairs, .bin or a list")
    add("--data-dir", type=Path, default=Path("data"), help="folder of lfw.bin, cfp_fp.bin, ... (default: data)")
    add_shared(parser, *MODEL_FLAGS)


def run(arguments: argparse.Namespace) -> None:
    from vitface.commands.inputs import load_model
    from vitface.evaluation.benchmarks import evaluate_benchmark
    from vitface.files import json_bytes, write_output
    from vitface.store.faces import FrozenBackbone
    from vitface.store.thresholds import calibrate_scores, source_text

    name, data_dir = arguments.bench, arguments.data_dir
    if name in (*OTHERS, "all"):
        raise ConfigError(f"--bench {name}: thresholds come from pairs of photos: name one set, such as lfw, or a file")
    if name not in BENCHMARKS:
        name, data_dir = own_pairs(name, data_dir)
    model, checkpoint = load_model(arguments)
    file, frozen = checkpoint.thresholds_file, isinstance(checkpoint, FrozenBackbone)
    if file is None or not (checkpoint.run or frozen):
        kind = "is sealed by its manifest" if file else "has no file to store a threshold beside"
        raise ConfigError(f"{checkpoint.path} {kind}; calibrate a run, or a backbone that was fetched or converted")
    result, alarms = evaluate_benchmark(model.embed, name, data_dir)
    calibration, lines = calibrate_scores(1 - result.distance / 2, result.issame)
    if not any("threshold" in entry for entry in calibration["thresholds"].values()):
        raise EvaluationError(f"{name} has too few pairs:\n" + "\n".join(lines))
    calibration["source"] = re.sub(r"[^\w .()-]", "_", name)[:80]
    write_output(file, json_bytes({"model": checkpoint.sha256, **calibration}))
    print("\n".join([f"thresholds on the cosine, from {source_text(calibration)}", *lines, f"wrote {file}"]))
    print(f"next      {command('verify', 'A.jpg', 'B.jpg', *model_words(arguments))}")
    for alarm in alarms:
        print(f"ALARM {alarm}", file=sys.stderr)


def model_words(arguments: argparse.Namespace) -> list[str]:
    """The flags that name the same model in another command."""
    given = {name: getattr(arguments, name) for name in ("checkpoint", "backbone", "weights", "image_size")}
    return [word for name, value in given.items() if value is not None for word in (to_flag(name), str(value))]
