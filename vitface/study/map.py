"""The map of an oracle's leads: which arm has which accuracy in which setting, and how sure the difference is.

Letters: R seeds, M pairs, P people.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vitface.documents import table
from vitface.evaluation.protocol import Verification
from vitface.evaluation.statistics import DRAWS, identity_draws, interval, seed_weights
from vitface.files import json_bytes, replace_file
from vitface.study.figure import figure

Results = dict[str, Verification]  # by the name of a set of pairs
Arms = dict[str, dict[int, Results]]  # {arm: {seed: results}}
ORACLE = "oracle"


def groups(names: list[str]) -> dict[str, list[str]]:
    """The sets of pairs, {column: names}: of sensors those of plain photos, of one sensor, and of a plain photo and a
    sensor's; others each on its own; and all of them."""
    if "plain" in names:
        across = [name for name in names if "-" in name]
        one = [name for name in names if name != "plain" and name not in across]
        columns = {"plain": ["plain"], "same sensor": one, "plain against sensor": across}
    else:
        columns = {name: [name] for name in names}
    return {column: sets for column, sets in {**columns, "all": list(names)}.items() if sets}


def lead(ours: list[Results], theirs: list[Results], names: list[str]) -> tuple[float, tuple[float, float]]:
    """(our mean accuracy minus theirs over some sets, its 95 % interval), as fractions; seed by seed in the same order.

    The interval draws people and seeds with replacement; thresholds are taken as given.
    """
    every = [results[name] for results in (*ours, *theirs) for name in names]
    people = 1 + max(int(result.people.max()) for result in every if result.people is not None)
    rng = np.random.default_rng(0)
    times = rng.multinomial(people, np.full(people, 1 / people), size=DRAWS)
    weights = seed_weights(len(ours), DRAWS, rng)  # (DRAWS, R)
    signs = np.repeat([1, -1], len(ours))
    drawn, measured = np.zeros(DRAWS), 0.0
    for name in names:
        results = [side[name] for side in (*ours, *theirs)]
        rows = identity_draws(results, times) * signs[:, None]  # (2 R, DRAWS)
        drawn += (rows.T * np.concatenate([weights, weights], axis=1)).sum(axis=1) / len(names)
        measured += float(np.mean([r.accuracy for r in results] * signs) * 2 / len(names))
    return measured, interval(drawn)


def map_rows(settings: dict[str, Arms]) -> list[dict[str, Any]]:
    """A row for each setting and arm: its accuracies, and the oracle's lead over it on the seeds that both have."""
    rows = []
    for setting, arms in settings.items():
        for arm, runs in arms.items():
            columns = groups(list(next(iter(runs.values()))))
            row: dict[str, Any] = {"setting": setting, "arm": arm, "seeds": sorted(runs), "accuracy": {}, "lead": {}}
            shared = sorted(runs.keys() & arms.get(ORACLE, {}).keys())
            for column, names in columns.items():
                means = [np.mean([results[name].accuracy for name in names]) for results in runs.values()]
                row["accuracy"][column] = float(np.mean(means))
                if arm != ORACLE and shared:
                    difference, bounds = lead(
                        [arms[ORACLE][seed] for seed in shared], [runs[seed] for seed in shared], names
                    )
                    row["lead"][column] = {"difference": difference, "interval": bounds, "seeds": shared}
            rows.append(row)
    return rows


def write_map(folder: Path, name: str, settings: dict[str, Arms], about: dict[str, Any]) -> None:
    """Writes map.json, map.md and map.svg, which has the leads over all pairs."""
    rows = map_rows(settings)
    replace_file(folder / "map.json", json_bytes({**about, "study": name, "rows": rows}))
    replace_file(folder / "map.md", map_markdown(name, rows, about).encode())
    replace_file(folder / "map.svg", figure(rows, "all").encode())


def map_markdown(name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The map on one page."""
    columns = list(rows[0]["accuracy"]) if rows else []
    lines = []
    for row in rows:
        cells = [row["setting"], row["arm"], " ".join(map(str, row["seeds"]))]
        cells += [f"{100 * row['accuracy'][column]:.2f}" for column in columns]
        cells += [_lead(row["lead"][column]) if row["lead"] else "" for column in columns]
        lines.append(cells)
    head = ["setting", "arm", "seeds", *columns, *(f"oracle's lead, {column}" for column in columns)]
    text = (
        f"Command: `{about['command']}`; {about['date']}, {about['device']}, torch {about['torch']}. Accuracies in %, "
        f"means over seeds, on people kept back from all runs; leads in points, with 95 % intervals that draw people "
        f"and seeds with replacement, * where the interval excludes 0; not corrected for their number."
    )
    return f"# Study: {name}\n\n{text}\n\n{table(head, lines)}\n"


def _lead(found: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in found["interval"])
    return f"{100 * found['difference']:+.2f} ({low:+.2f} to {high:+.2f}){'*' * (low > 0 or high < 0)}"
