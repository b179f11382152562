"""Accuracy against seconds of training: the peer's script and ours, taking turns.

    python benchmarks/time_to_accuracy.py --peer train_peer.py --data DIR --epochs 8 12 20 --svg curves.svg

DIR holds celeba289/ and lfw.bin. The peer is a script that takes --data, --epochs, --every, --seed, --dtype and
--threads, and ends with a line of JSON with "curve", [[seconds, LFW accuracy], ...] after every so many epochs (timm
and PEFT as a user writes it). Ours is `train.py --exp lfw_vit_tiny`, with the settings that are given here: a run for
each number of --epochs, since a run's accuracy counts when its learning rate has come down. All train on the same
images, in processes of their own that take turns, for each seed.

The seconds are those of training: reading packages and data, and the evaluations, are not in them. The last line is
JSON: {"peer": [[s, accuracy], ...], "vitface": [the end of each run]}, medians over the seeds, with
"ratio_to_peer_accuracy", the time of our first run that has the peer's last accuracy in its whole time, null if none
has, and "accuracy_at_equal_time".
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from timing import machine

from vitface.commands.parser import CommandParser, add_settings, bounds_of, number
from vitface.config import TrainConfig, resolve
from vitface.evaluation.benchmarks import evaluate_all
from vitface.evaluation.plots import BOX, line_chart, svg, svg_text
from vitface.recogniser import Recogniser
from vitface.training.loop import Trainer
from vitface.training.setup import resolve_choices

Curve = list[list[float]]
WHAT = {"peer": "in the course of one run", "vitface": "the ends of several runs"}


class Timed(Trainer):
    """A run that looks at LFW at its end, and does not count that time."""

    def __init__(self, config: TrainConfig, data: str):
        super().__init__(config, None)
        self.benchmarks, self.end, self.started = data, [], time.perf_counter()

    def judge_held_out(self) -> tuple[None, dict[str, str]]:
        if self.state.progress.epoch + 1 == self.config.epochs:
            seconds = time.perf_counter() - self.started
            self.model.eval()
            found = evaluate_all(Recogniser(self.model).embed, ["lfw"], self.benchmarks)
            self.end = [round(seconds, 1), round(found.results["lfw"].accuracy, 4)]
        return None, {}


def train_ours(arguments: argparse.Namespace, settings: dict) -> None:
    """Trains in this process, and prints its seconds and accuracy as a line of JSON."""
    torch.set_num_threads(arguments.threads)
    given = {"exp": "lfw_vit_tiny", "train_data": str(arguments.data / "celeba289"), "val_data": None, **settings}
    config = resolve_choices(resolve({**given, "epochs": arguments.epochs[0], "num_workers": 0, "device": "cpu"}))
    trainer = Timed(config, str(arguments.data))
    trainer.fit(None)
    print(json.dumps({"curve": [trainer.end]}))


def curve_of(command: list[str], threads: int) -> Curve:
    """Runs a training and returns its curve; RuntimeError with the end of its output where it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["curve"]


def median_curve(curves: list[Curve]) -> Curve:
    """The medians of seconds and accuracy, over seeds."""
    return [[statistics.median(values) for values in zip(*points, strict=True)] for points in zip(*curves, strict=True)]


def accuracy_at(curve: Curve, seconds: float) -> float:
    """The accuracy of the last point within `seconds`, 0 if there is none."""
    return max((point for point in curve if point[0] <= seconds), default=[0.0, 0.0])[1]


def result(peer: Curve, ours: Curve) -> dict:
    whole, reached = peer[-1]
    first = next((seconds for seconds, accuracy in ours if accuracy >= reached), None)
    ratio = None if first is None else round(first / whole, 3)
    return dict(peer=peer, vitface=ours, ratio_to_peer_accuracy=ratio, accuracy_at_equal_time=accuracy_at(ours, whole))


def draw(path: Path, curves: dict[str, Curve]) -> None:
    """Writes the curves as an SVG, with a mark where LFW was looked at."""
    numbers = {name: tuple(torch.tensor(curve).T.numpy()) for name, curve in curves.items()}
    percent = {name: (seconds, 100 * accuracy) for name, (seconds, accuracy) in numbers.items()}
    chart, box = line_chart("", "seconds of training", "accuracy on LFW in %", percent), BOX
    marks = [svg_text(x, box["bottom"] + 14, label, "middle") for x, label in chart["x_ticks"]]
    marks += [svg_text(box["left"] - 6, y + 4, label, "end") for y, label in chart["y_ticks"]]
    for row, ((name, points), colour) in enumerate(zip(chart["lines"].items(), ("#777777", "#0066cc"), strict=True)):
        marks.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for x, y in (point.split(",") for point in points.split()):
            marks.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        marks.append(svg_text(box["right"], box["bottom"] - 10 - 14 * row, f"{name}: {WHAT[name]}", "end", colour))
    marks.append(svg_text(box["right"], box["height"] - 8, f"{chart['y_label']} after {chart['x_label']}", "end"))
    path.write_text(svg(box["width"], box["height"], marks))


def main(argv: list[str]) -> None:
    parser = CommandParser("time_to_accuracy.py", description=__doc__)
    parser.add_argument("--peer", type=Path, metavar="SCRIPT")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--peer-epochs", type=int, default=20)
    parser.add_argument("--peer-dtype", default="bf16", help="the faster one on this processor")
    parser.add_argument("--every", type=int, default=2, help="epochs of the peer between two looks at LFW")
    epochs = number(int, bounds_of("epochs"))
    parser.add_argument("--epochs", type=epochs, nargs="+", default=[20], help="of our runs, one for each number")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--ours-only", action="store_true", help=argparse.SUPPRESS)
    add_settings(parser, without=("train_data", "val_data", "exp", "epochs", "num_workers", "device"))
    arguments = parser.parse_args(argv)
    names = TrainConfig.__dataclass_fields__
    if arguments.ours_only:
        train_ours(arguments, {name: value for name, value in vars(arguments).items() if name in names})
        return
    if arguments.peer is None or not arguments.peer.is_file():
        parser.error(f"--peer names the script of the peer, a file; not {arguments.peer}")
    print(machine(), flush=True)
    data, peers, ours = str(arguments.data), [], []
    for seed in arguments.seeds:
        given = {"--data": data, "--seed": seed, "--threads": arguments.threads}
        same = [word for flag, value in given.items() for word in (flag, str(value))]
        theirs = ["--epochs", str(arguments.peer_epochs), "--every", str(arguments.every)]
        theirs += ["--dtype", arguments.peer_dtype]
        peers.append(curve_of([sys.executable, str(arguments.peer), *same, *theirs], arguments.threads))
        print(f"seed {seed}  peer {peers[-1]}", flush=True)
        command = [sys.executable, __file__, "--ours-only", *argv, *same, "--epochs"]
        runs = [curve_of([*command, str(length)], arguments.threads) for length in sorted(arguments.epochs)]
        ours.append([point for curve in runs for point in curve])
        print(f"seed {seed}  vitface {ours[-1]}", flush=True)
    curves = {"peer": median_curve(peers), "vitface": median_curve(ours)}
    if arguments.svg:
        draw(arguments.svg, curves)
    print(json.dumps(result(*curves.values())))


if __name__ == "__main__":
    main(sys.argv[1:])
