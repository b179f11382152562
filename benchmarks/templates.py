"""What IJB's scoring costs: the cosines of pairs beside the bare product of matrices; all but the embedding at size.

    python benchmarks/templates.py                  # 10 million pairs of templates of 512 numbers
    python benchmarks/templates.py --set IJB-C      # 469,375 faces, 15.7 million pairs: reading, pooling, 1:1 and 1:N

Pairs are drawn among IJB-C's 3,531 x 19,593 templates. `pair_scores` and the product of these two matrices, float64 as
both are, take turns. The memory is the most that this process had beyond what it
had before, with the templates and the pairs in it, which are not counted.

A set is written into a temporary folder, with empty crops and random embeddings: its figures mean
nothing. The last line is JSON.
"""

import argparse
import json
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from timing import machine, seconds

from vitface.data.formats.ijb_lists import read_faces, read_protocol
from vitface.evaluation.ijb.embedding import PART
from vitface.evaluation.ijb.results import result_text
from vitface.evaluation.ijb.scoring import evaluate_templates, pair_scores, products

GALLERY, PROBES, FACES, PAIRS = (1772, 1759), 19_593, 469_375, 15_658_489  # IJB-C's


@contextmanager
def measured(name: str, found: dict[str, float]) -> Iterator[None]:
    """Adds the seconds inside, and the most memory in MB beyond that before, which a thread looks at."""
    page, stop, most = resource.getpagesize(), threading.Event(), [0]

    def rss() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    def watch() -> None:
        while not stop.wait(0.005):
            most[0] = max(most[0], rss())

    before, watcher, started = rss(), threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        found[f"{name}, s"] = round(time.perf_counter() - started, 2)
        stop.set()
        watcher.join()
        found[f"{name}, MB"] = round((most[0] - before) / 1e6)


def time_pairs(count: int, repetitions: int) -> dict[str, float]:
    rng, first = np.random.default_rng(0), sum(GALLERY)
    templates = rng.normal(size=(first + PROBES, 512))
    templates /= np.linalg.norm(templates, axis=1, keepdims=True)
    cells = rng.choice(first * PROBES, count, replace=False)
    pairs = np.stack([cells // PROBES, first + cells % PROBES], axis=1).astype(np.int32)
    del cells
    found: dict[str, float] = {}
    with measured("pairs", found):
        scores = pair_scores(templates, pairs)
    sample = rng.integers(0, count, 1000)
    wanted = (templates[pairs[sample, 0]] * templates[pairs[sample, 1]]).sum(axis=1)
    np.testing.assert_allclose(scores[sample], wanted, atol=1e-12)

    def bare() -> None:
        for _ in products(templates[:first], templates[first:]):
            pass

    times: dict[str, list[float]] = {"pairs": [], "product": []}
    for _ in range(repetitions):
        times["pairs"].append(seconds(lambda: pair_scores(templates, pairs)))
        times["product"].append(seconds(bare))
    for name, each in times.items():
        print(f"{name:<8} {statistics.median(each):7.2f} s   {min(each):.2f} to {max(each):.2f}")
        found[f"{name}, s"] = round(statistics.median(each), 2)
    return {**found, "product / pairs": round(found["product, s"] / found["pairs, s"], 2)}


def write_set(home: Path) -> None:
    """The files of a set of IJB-C's size: persons as in its galleries, each with other templates among the probes."""
    rng, people = np.random.default_rng(0), sum(GALLERY)
    person = np.concatenate([np.arange(people), rng.integers(0, people, PROBES)])
    template = np.concatenate([np.arange(len(person)), rng.integers(0, len(person), FACES - len(person))])
    (home / "loose_crop").mkdir(parents=True)
    (home / "meta").mkdir()
    points = " ".join(["38.3 51.7 73.5 51.5 56.0 71.7 41.5 92.4 70.7 92.2"])
    for number in range(1, FACES + 1):
        (home / "loose_crop" / f"{number}.jpg").touch()

    def write(name: str, lines: Iterator[str], head: str = "") -> None:
        with open(home / "meta" / f"ijbc_{name}", "w") as file:
            file.write(head)
            file.writelines(lines)

    write("name_5pts_score.txt", (f"{i}.jpg {points} 0.99\n" for i in range(1, FACES + 1)))
    write("face_tid_mid.txt", (f"{i}.jpg {t + 1} {i // 3}\n" for i, t in enumerate(template.tolist(), 1)))
    own = np.stack([person[people:], np.arange(people, len(person))], axis=1)
    cells = rng.choice(people * PROBES, PAIRS, replace=False)
    pairs = np.concatenate([own, np.stack([cells // PROBES, people + cells % PROBES], axis=1)])
    _, once = np.unique(pairs[:, 0] * len(person) + pairs[:, 1], return_index=True)
    pairs = pairs[np.sort(once)[:PAIRS]]
    table = np.column_stack([pairs + 1, person[pairs[:, 0]] == person[pairs[:, 1]]])
    some = (table[start : start + 100_000].tolist() for start in range(0, PAIRS, 100_000))
    lines = (f"{first} {second} {label}\n" for rows in some for first, second, label in rows)
    write("template_pair_label.txt", lines)
    ends = {"gallery_G1": (0, GALLERY[0]), "gallery_G2": (GALLERY[0], people), "probe_mixed": (people, len(person))}
    for name, (start, end) in ends.items():
        of = [(t + 1, person[t]) for t in template.tolist() if start <= t < end]
        rows = (f"{t},{p},img/1.jpg{',0' * 32}\n" for t, p in of)
        write(f"1N_{name}.csv", rows, f"TEMPLATE_ID,SUBJECT_ID,FILENAME{',x' * 32}\n")


def time_set() -> dict[str, float]:
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "IJBC")
        with measured("faces", found):
            faces = read_faces("ijbc", Path(folder))
        with measured("pairs and galleries", found):
            protocol = read_protocol(faces)
    print("\n".join(protocol.alarms))
    means = np.random.default_rng(1).normal(size=(len(faces.templates), 512)).astype("f4")

    def part(number: int) -> np.ndarray:
        some = faces.row[number * PART : (number + 1) * PART]
        return means[some] + np.random.default_rng(number).normal(size=(len(some), 512)).astype("f4")

    with measured("pooling, 1:1 and 1:N", found):
        result = evaluate_templates(faces, protocol, map(part, range(-(-FACES // PART))), "N1D1F1")
    print(result_text("ijbc", result))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--set", choices=["IJB-C"])
    arguments = parser.parse_args()
    print(machine())
    found = time_set() if arguments.set else time_pairs(arguments.pairs, arguments.repetitions)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({**found, "process, MB": round(most)}))


if __name__ == "__main__":
    main()
