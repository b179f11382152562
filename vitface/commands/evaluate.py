"""Evaluate a model on the face-verification benchmarks."""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitface.commands.evaluate_faces import compare_faces, evaluate_faces, keep_in_run, write_files
from vitface.commands.parser import MODEL_FLAGS, SHARED, CommandParser, add_shared, output_file
from vitface.data.faces.detect import FaceDetector
from vitface.data.formats.ijb_lists import find_ijb
from vitface.data.formats.published import IJB, MODES, PAIRS, missing, named_by, unknown_bins
from vitface.data.formats.tinyface_folder import find_tinyface
from vitface.data.synthetic.worlds import SYNTHETIC
from vitface.errors import ConfigError, DataError, command, did_you_mean
from vitface.evaluation.benchmarks import BENCHMARKS, Degraded, Evaluation, available, evaluate_all, read_benchmark
from vitface.evaluation.report import (
    notes,
    quality_lines,
    quality_of,
    reject_lines,
    results_json,
    results_table,
    summary_json,
)
from vitface.evaluation.scores import SCORES, benchmark_of, keep_scores
from vitface.files import json_bytes, write_output

if TYPE_CHECKING:
    from vitface.recogniser import Recogniser
    from vitface.store.faces import Checkpoint

EXAMPLES = """examples:
  vitface evaluate --bench cfp_fp                      the newest run in runs/, on data/cfp_fp.bin
  vitface evaluate --checkpoint runs/a --bench all     every benchmark there is a file for
  vitface evaluate --checkpoint runs/a --bench synthetic --json results.json
  vitface evaluate --bench all --output report.html    the same as a page with curves and pictures
  vitface evaluate --bench photos/pairs.csv            your own pairs: lines path,path,label beside the crops; or a .bin
  vitface evaluate --backbone dinov2 --bench lfw       the frozen backbone's raw CLS
  vitface evaluate --bench lfw --routing               how DA-LoRA's domain weights depend on pose
  vitface evaluate --compare runs/lora-s* runs/dalora-s*   is DA-LoRA better than LoRA?
  vitface evaluate --checkpoint runs/a --bench lfw --gate shuffled   each image with another one's domain weights
  vitface evaluate --bench lfw --degrade lowres:16     both photos of a pair are 16 pixels wide, and enlarged
  vitface evaluate --bench lfw --degrade-probe lowres --output report.html   the second one only: a curve over sizes
  vitface evaluate --bench all --dry-run               how long will it take?
  vitface evaluate --bench ijbc --data-dir IJB_release templates of faces: 1:1 and 1:N; goes on where it was stopped
  vitface evaluate --bench tinyface                    small photos, each searched among 157,871
  torchrun --nproc-per-node 2 evaluate.py --bench all  two GPUs, the same results
"""
OTHERS = (*IJB, "tinyface")  # not pairs of photos
NAMES = (*BENCHMARKS, *OTHERS, "all")


def add_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    text = (
        f"one of {', '.join(NAMES)}; 'all': each that has a file, but IJB and TinyFace; or your own .bin or pair list"
    )
    add("--bench", metavar="NAME|FILE", help=text)
    add("--data-dir", type=Path, default=Path("data"), help="folder of lfw.bin, cfp_fp.bin, ... (default: data)")
    add("--compare", type=Path, nargs="+", metavar="RUN", help="finished runs; each experiment against the first one's")
    add("--gate", choices=["shuffled"], help="control: give a DA-LoRA model the domain weights of another image")
    add("--routing", action="store_true", help="also print DA-LoRA's domain weights by pose, and on procedural faces")
    add(
        "--degrade",
        metavar="SENSORS",
        help="photos as a sensor gives them: lowres:16, blur:2, jpeg:5, nir:16; lowres: a curve",
    )
    add("--degrade-probe", metavar="SENSORS", help="the same for the second photo of each pair only")
    add(
        "--output",
        type=output_file(".html"),
        metavar="FILE.html",
        help="also write a report, one page that needs no network",
    )
    add("--show-faces", action="store_true", help="with --output: show the hardest pairs, real people's faces")
    add("--json", type=output_file(".json"), metavar="FILE", help="also write the results there")
    how = "N1: an embedding counts with its norm, D1: with the detector's score, F1: its mirror image is added"
    add("--pooling", choices=MODES, default=MODES[0], help=f"of IJB's faces to templates; {how} (default: {MODES[0]})")
    processes = "processes that read IJB's and TinyFace's photos (default: all cores)"
    add("--num-workers", **{**SHARED["--num-workers"], "help": processes})
    add_shared(parser, *MODEL_FLAGS, "--dry-run")


def run(arguments: argparse.Namespace) -> int:
    if arguments.bench not in (*NAMES, None):
        arguments.bench, arguments.data_dir = own_pairs(arguments.bench, arguments.data_dir)
    if arguments.compare:
        return (compare_faces if arguments.bench in OTHERS else compare_runs)(arguments)
    if arguments.bench is None:
        raise ConfigError("name a benchmark with --bench, or runs with --compare")
    from vitface.training.ranks.process_group import as_one, local_device

    arguments.device = local_device(arguments.device)
    with as_one(arguments.device):
        evaluate = evaluate_faces if arguments.bench in OTHERS else evaluate_model
        return evaluate(*open_model(arguments), arguments)


def own_pairs(bench: str, data_dir: Path) -> tuple[str, Path]:
    """(Name, data folder) of the set in the file that --bench names; ConfigError if there is no such file."""
    for file in (Path(bench), data_dir / bench):
        if file.is_file():
            return named_by(file)
    if Path(bench).is_dir():
        raise ConfigError(f"--bench {bench} is a folder; name the .bin or the pair list in it")
    files = map(str, itertools.islice(Path(bench).parent.glob("*.*"), 1000))
    guess = did_you_mean(bench, [*NAMES, *files])
    raise ConfigError(f"--bench {bench}: neither a benchmark nor a file{guess}; benchmarks are {', '.join(NAMES)}")


def open_model(arguments: argparse.Namespace) -> "tuple[Recogniser, Checkpoint | None]":
    """The model to evaluate, and its checkpoint, None for a frozen backbone."""
    from vitface.commands import inputs
    from vitface.device import resolve_device
    from vitface.evaluation.judging import judged
    from vitface.store.faces import FrozenBackbone
    from vitface.study.controls import shuffled_gate

    checkpoint, device = inputs.open_model(arguments), resolve_device(arguments.device)
    if not isinstance(checkpoint, FrozenBackbone):
        return judged(checkpoint, device, shuffled_gate if arguments.gate else None), checkpoint
    if arguments.gate:
        raise ConfigError("a frozen backbone has no gate; --gate goes with the checkpoint of a run")
    return judged(checkpoint, device), None


def evaluate_model(model: "Recogniser", checkpoint: "Checkpoint | None", arguments: argparse.Namespace) -> int:
    """Evaluates over all ranks; the first one prints the results and writes them."""
    from vitface.evaluation.judging import evaluate_frozen
    from vitface.store.thresholds import choose_threshold
    from vitface.training.ranks.parallel import in_turns
    from vitface.training.ranks.process_group import broadcast, check_same, rank

    if arguments.routing:
        check_routing(model, arguments.bench)
    data_dir, conditions = arguments.data_dir, conditions_of(arguments)
    names = benchmark_names(arguments.bench, data_dir)
    check_same({"model": checkpoint and checkpoint.sha256, "benchmarks": names})
    if arguments.dry_run:
        return predict(model, names, data_dir, sum(1 + bool(each and each.probe) for each in conditions))
    if checkpoint or conditions != [None]:
        threshold = choose_threshold(model.thresholds)[0]
        evaluation = evaluate_all(model.embed, names, data_dir, in_turns, conditions, threshold, model.quality)
    else:
        evaluation = evaluate_frozen(model, names, data_dir, in_turns, broadcast, keep=rank() == 0)
    if rank() == 0:
        show(evaluation, model, checkpoint, arguments)
    return 2 if evaluation.failures else 0


def conditions_of(arguments: argparse.Namespace) -> list[Degraded | None]:
    """What --degrade or --degrade-probe makes of the pairs, [None] for nothing: a kind without an amount is a curve."""
    from vitface.data.degrade import KINDS, parse_sensors

    text, probe = arguments.degrade or arguments.degrade_probe, arguments.degrade is None
    if text is None:
        return [None]
    if not probe and arguments.degrade_probe is not None:
        raise ConfigError(
            "--degrade is for both photos of a pair, --degrade-probe for the second one: name one of them"
        )
    if arguments.routing:
        raise ConfigError("--routing is about photos as they are; leave --degrade out")
    steps = [f"{text}:{amount:g}" for amount in KINDS[text].steps] if text in KINDS else [text]
    return [Degraded(parse_sensors(step), probe) for step in steps]


def predict(model: "Recogniser", names: list[str], data_dir: Path, times: int) -> int:
    """Prints how long the evaluation will take, in which each photo is embedded `times` times, from a measured batch;
    2 if a benchmark cannot be read."""
    from vitface.training.estimate import duration, final_evaluation, seconds_per_image
    from vitface.training.ranks.process_group import all_gather

    needed = final_evaluation(model.model, names, str(data_dir), with_frozen=False)
    rate = sum(all_gather(1 / (2 * seconds_per_image(model.model))))  # each image also mirrored
    images = times * needed.images
    text = f"{images:,} images of {', '.join(names)}: about {duration(images / rate)}"
    print(f"{text}, at {rate:,.1f} images/s before reading; nothing was evaluated")
    for problem in needed.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if needed.problems else 0


def show(
    evaluation: Evaluation, model: "Recogniser", checkpoint: "Checkpoint | None", arguments: argparse.Namespace
) -> None:
    """Prints the results, adds them to the run's scores, and writes --json and --output."""
    quality = quality_of(evaluation.results, arguments.data_dir)
    if evaluation.results:
        lines = [*quality_lines(quality), *reject_lines(evaluation.results), *notes(evaluation.results)]
        print("\n".join([results_table(evaluation.results), *lines]))
        keep_in_run(checkpoint, arguments, lambda run, sha256: keep_all(run, evaluation, sha256))
    if evaluation.kept:
        print(f"kept from an earlier evaluation: {', '.join(evaluation.kept)}")
    routing = route(model, list(evaluation.results), arguments.data_dir) if arguments.routing else {}
    more = {name: found for name, found in (("xqlfw_quality", quality), ("routing", routing)) if found}

    def data() -> dict[str, Any]:  # intervals take time
        return {"benchmarks": results_json(evaluation.results), **summary_json(evaluation.results), **more}

    write_files(model, checkpoint, arguments, evaluation, data, routing)


def keep_all(run: Path, evaluation: Evaluation, model: str) -> None:
    """`keep_scores`, of degraded pairs in a file for each condition."""
    results = evaluation.results
    for degraded in dict.fromkeys(map(evaluation.degraded.get, results)):
        some = {label: result for label, result in results.items() if evaluation.degraded.get(label) == degraded}
        keep_scores(run, some, model, degraded.scores if degraded else SCORES)


def benchmark_names(bench: str, data_dir: Path) -> list[str]:
    """The benchmarks that --bench names. For 'all', it prints those that have no file."""
    if bench != "all":
        return [bench]
    names = available(data_dir)
    absent = [f"{name}.bin" for name in PAIRS if name not in names]
    if absent:
        print(f"missing in {data_dir}: {', '.join(absent)}")
    for file in unknown_bins(data_dir):
        print(f"not evaluated, as no benchmark is called so: {command('evaluate', '--bench', file)}")
    long = [*(name for name in IJB if find_ijb(name, data_dir)), *["tinyface"] * bool(find_tinyface(data_dir))]
    for name in long:
        print(f"not in 'all', as it takes long: --bench {name}")
    if not names:
        raise DataError(f"no benchmark was found: {missing('lfw', data_dir)}")
    return names


def check_routing(model: "Recogniser", bench: str) -> None:
    """ConfigError, before anything is evaluated, without a router or the detector that real benchmarks need."""
    if model.config.num_domains == 1:
        raise ConfigError("--routing is for DA-LoRA; this model has no router")
    if bench not in SYNTHETIC:
        FaceDetector()


def route(model: "Recogniser", names: list[str], data_dir: Path) -> dict[str, dict]:
    """Prints and returns the router's weights: on procedural faces, and by pose on images of real benchmarks."""
    from vitface.evaluation.routing import benchmark_routing, pose_text, routing_text, synthetic_routing

    world = next((name for name in names if name in SYNTHETIC), "synthetic")
    found = {world: synthetic_routing(model, world=world)}
    print(f"\nrouting on procedural faces, by their domain\n{routing_text(found[world])}")
    for name in (name for name in names if name not in SYNTHETIC):
        found[name] = benchmark_routing(model, read_benchmark(name, data_dir), FaceDetector())
        print(f"\nrouting on {name}, by how far faces are turned\n{pose_text(found[name])}")
    return found


def compare_runs(arguments: argparse.Namespace) -> int:
    """Compares every experiment with the first one named, from the scores that the runs kept."""
    from vitface.evaluation.compare import compare, comparison_text, group_runs, read_run

    runs, comparisons = list(dict.fromkeys(path.resolve() for path in arguments.compare)), []
    for degraded in conditions_of(arguments):
        results = [
            {
                name: r
                for name, r in read_run(run, degraded).items()
                if arguments.bench in (benchmark_of(name), "all", None)
            }
            for run in runs
        ]
        first, *others = group_runs(runs, results)
        found = [compare(first, other) for other in others]
        print(f"photos: {degraded}\n" if degraded else "", end="")
        print("\n\n".join(map(comparison_text, found)))
        comparisons += found
    if arguments.json:
        entries = [dataclasses.asdict(comparison) for comparison in comparisons]
        write_output(arguments.json, json_bytes({"comparisons": entries}))
    return 0
