"""A grid of DA-LoRA and its controls over seeds, trained and compared. It continues where it stopped.

Each cell is an ordinary run directory, FOLDER/VARIANT-sSEED. Two kinds of cell are only evaluated: the frozen backbone,
and each DA-LoRA run with its gate shuffled. The table is in FOLDER/study.md and study.json, rewritten after each seed.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitface.config import TrainConfig
from vitface.data.synthetic.worlds import SYNTHETIC
from vitface.documents import table
from vitface.errors import CheckpointError, ConfigError, EvaluationError
from vitface.evaluation.benchmarks import evaluate_all
from vitface.evaluation.compare import ONE_SEED, Comparison, Side, compare, read_run
from vitface.evaluation.judging import judged, judged_frozen
from vitface.evaluation.routing import synthetic_routing
from vitface.evaluation.scores import SCORES, load_scores, save_scores
from vitface.files import check_output, json_bytes, replace_file
from vitface.model.counts import parameter_counts
from vitface.presets import backbone_name
from vitface.recogniser import Recogniser, load
from vitface.store.backbone import weights_sha256
from vitface.store.faces import meta_model, open_checkpoint
from vitface.study.controls import CONTROLS, shuffled_gate
from vitface.training.run import run
from vitface.training.setup import final_benchmarks, resolve_choices

SHUFFLED_AT_TEST, FROZEN = "dalora_shuffled_at_test", "frozen"
FIXED_GATES = ("uniform", "random")  # controls whose router is not trained


def variants(base: TrainConfig) -> dict[str, dict[str, Any]]:
    """{variant: its settings that differ from `base`}, for DA-LoRA, plain LoRA and the controls.

    "lora_wide" has as many adapter parameters as DA-LoRA and the same scaling.
    """
    k = base.num_domains
    grid: dict[str, dict[str, Any]] = {
        "lora": {"use_dalora": False},
        "lora_wide": {"use_dalora": False, "lora_rank": k * base.lora_rank, "lora_alpha": k * base.lora_alpha},
        "dalora": {"use_dalora": True},
        **{control: {"use_dalora": True} for control in CONTROLS},
    }
    if base.train_data in SYNTHETIC or base.domain_labels:
        grid["dalora_unlabelled"] = {"use_dalora": True, "domain_labels": "none"}
    return grid


def chosen_variants(base: TrainConfig, names: list[str] | None) -> dict[str, dict[str, Any]]:
    """The `variants` among `names`, all for None; DA-LoRA, which all are compared with, is always one of them."""
    grid = variants(base)
    for name in names or []:
        if name not in grid:
            raise ConfigError(f"unknown variant {name!r}; known: {', '.join(grid)}")
    return {name: grid[name] for name in grid if names is None or name in [*names, "dalora"]}


def run_study(base: TrainConfig, grid: dict[str, dict[str, Any]], seeds: list[int], folder: Path, command: str) -> None:
    """Trains and evaluates every cell that is not done yet, seed by seed, and writes the table."""
    names = final_benchmarks(base)
    if not names:
        raise ConfigError("a study needs a benchmark to compare on: name the folder of lfw.bin, ... with --val-data")
    check_output(folder, ("study.md", "*-s[0-9]*"))
    device = torch.device(resolve_choices(base).device)
    for done, seed in enumerate(seeds, 1):
        for variant, changes in grid.items():
            cell = folder / f"{variant}-s{seed}"
            print(f"\n=== {cell}")
            config = dataclasses.replace(base, **changes, seed=seed, save_dir=str(cell), resume="auto")
            control = CONTROLS.get(variant)
            run(config, with_frozen=False, change=control and functools.partial(control, seed=seed))
            if variant == "dalora":
                checkpoint = open_checkpoint(cell, base.weights)
                shuffled = functools.partial(judged, checkpoint, device, shuffled_gate)
                judge(folder / f"{SHUFFLED_AT_TEST}-s{seed}", shuffled, checkpoint.sha256, config, names)
        if done == 1:
            frozen = functools.partial(judged_frozen, base.backbone, base.weights, base.side, device)
            backbone = weights_sha256(backbone_name(base.backbone), base.weights)
            judge(folder / FROZEN, frozen, f"{backbone}, {base.side} px", base, names)
        write_table(base, list(grid), seeds[:done], folder, command)
        print(f"\n{(folder / 'study.md').read_text(encoding='utf-8')}")


def judge(cell: Path, make: Callable[[], Recogniser], model: str, config: TrainConfig, names: list[str]) -> None:
    """Evaluates a model that no run trained, unless the scores there are of `model`, which identifies it, on `names`.

    EvaluationError if a benchmark cannot be judged.
    """
    model = f"{model}, on {' '.join(names)} of {config.val_data}"
    with suppress(CheckpointError):
        if load_scores(cell / SCORES)[1] == model:
            return
    evaluation = evaluate_all(make().embed, names, config.val_data or "")
    if evaluation.failures:
        raise EvaluationError("; ".join(evaluation.failures))
    cell.mkdir(parents=True, exist_ok=True)
    save_scores(cell / SCORES, evaluation.results, model)


def write_table(base: TrainConfig, trained: list[str], seeds: list[int], folder: Path, command: str) -> None:
    """Writes study.md and study.json from the scores of the cells: DA-LoRA against all others."""
    cells = {FROZEN: [folder / FROZEN]}
    cells |= {name: [folder / f"{name}-s{seed}" for seed in seeds] for name in (*trained, SHUFFLED_AT_TEST)}
    sides = {
        name: Side(name, [None] if name == FROZEN else list(seeds), [read_run(path) for path in paths])
        for name, paths in cells.items()
    }
    comparisons = {name: compare(side, sides["dalora"]) for name, side in sides.items() if name != "dalora"}
    rows = [variant_row(side, cells[name], comparisons.get(name)) for name, side in sides.items()]
    about = {"command": command, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "seeds": seeds}
    about["device"] = resolve_choices(base).device
    replace_file(folder / "study.md", study_markdown(about, rows).encode())
    entries = {name: dataclasses.asdict(comparison) for name, comparison in comparisons.items()}
    replace_file(folder / "study.json", json_bytes({**about, "variants": rows, "comparisons": entries}))


def variant_row(side: Side, cells: list[Path], against: Comparison | None) -> dict[str, Any]:
    """A row of the table: accuracy per benchmark (mean and deviation over seeds), DA-LoRA's lead, routing."""
    accuracies = {name: [results[name].accuracy for results in side.results] for name in side.results[0]}
    row: dict[str, Any] = {
        "variant": side.name,
        "adapter_parameters": adapter_parameters(cells[0], with_router=side.name not in FIXED_GATES),
        "accuracy": {name: float(np.mean(values)) for name, values in accuracies.items()},
        "deviation": {name: float(np.std(values, ddof=1)) for name, values in accuracies.items() if len(values) > 1},
    }
    if against is not None:
        row |= {"dalora_minus_this": against.rows[-1].difference, "interval": against.rows[-1].interval}
        row["p"] = against.rows[0].p if len(against.rows) == 1 else None
    if side.name in ("dalora", "dalora_unlabelled"):
        world = next((name for name in accuracies if name in SYNTHETIC), "synthetic")
        routed = [synthetic_routing(load(cell), world=world) for cell in cells]
        row["entropy"] = float(np.mean([routing["entropy"] for routing in routed]))
        if routed[0]["agreement"] is not None:
            row["agreement"] = float(np.mean([routing["agreement"] for routing in routed]))
    return row


def adapter_parameters(cell: Path, with_router: bool) -> int | None:
    """The number of trained parameters of the adapters, and of the router; None for a cell without training."""
    if not (cell / "checkpoints").is_dir():
        return None
    counts = parameter_counts(meta_model(open_checkpoint(cell).config))
    return counts["adapters"][1] + with_router * counts["router"][1]


def study_markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The study on one page; the column "shown" depends on whether the interval contains zero."""
    names, comparisons = list(rows[0]["accuracy"]), sum("interval" in row for row in rows)
    head = ["variant", "adapter parameters", *names, "DA-LoRA minus this", "95 % interval", "McNemar p", "shown"]
    lines = []
    for row in rows:
        cells = [row["variant"], f"{row['adapter_parameters']:,}" if row["adapter_parameters"] else ""]
        for name, accuracy in row["accuracy"].items():
            spread = f" ± {100 * row['deviation'][name]:.2f}" if name in row["deviation"] else ""
            cells.append(f"{100 * accuracy:.2f}{spread}")
        if "interval" in row:
            low, high = (100 * bound for bound in row["interval"])
            cells += [f"{100 * row['dalora_minus_this']:+.2f}", f"{low:+.2f} to {high:+.2f}"]
            cells.append("" if row["p"] is None else f"{row['p']:.2g}")
            cells.append("DA-LoRA is better" if low > 0 else "DA-LoRA is worse" if high < 0 else "no difference")
        lines.append(cells)
    routing = [
        f"{row['variant']}, on procedural faces: entropy of the gate {row['entropy']:.3f} of 1"
        + (f"; its strongest domain is the known one on {row['agreement']:.1%}" if "agreement" in row else "")
        for row in rows
        if "entropy" in row
    ]
    parts = [
        f"Command: `{about['command']}`; {about['date']}, {about['device']}, torch {about['torch']}, seeds "
        f"{', '.join(map(str, about['seeds']))}. Accuracies in %, mean ± deviation over seeds; intervals by paired "
        f"bootstrap over pairs and seeds with thresholds chosen anew, {comparisons} comparisons, not corrected "
        f"for their number. McNemar's p takes the thresholds as given, and several seeds by majority."
        + (f" {ONE_SEED}" if len(about["seeds"]) == 1 else ""),
        table(head, lines),
        "\n".join(f"- {line}" for line in routing),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
