"""The benchmarks, with their numbers of pairs and what makes them hard; and a model's results on them.

A benchmark is InsightFace's file DATA_DIR/NAME.bin, or the pair list it was published with, next to aligned 112 x 112
crops under the published names (see `published`, which also takes names that are nearly so). "synthetic" and
"synthetic_shift" are drawn and need no file. Any other name is that of a file in DATA_DIR, somebody's own pairs.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitface.data.formats.pair_lists import read_own_list, read_pair_list
from vitface.data.formats.pairs import VerificationSet, read_bin
from vitface.data.formats.published import PAIRS, RFW, bin_in, check_pairs, find_list, is_bin, missing, own_file
from vitface.data.synthetic.worlds import SYNTHETIC, synthetic_pairs
from vitface.errors import ConfigError, DataError, EvaluationError, command
from vitface.evaluation.alarms import judge, order_alarms, pair_alarms
from vitface.evaluation.protocol import (
    LEAST_IN_A_FOLD,
    Verification,
    check_embeddings,
    pair_distance,
    verify,
    verify_fixed,
)
from vitface.evaluation.scores import benchmark_of
from vitface.files import sha256_bytes
from vitface.metrics import check_labels, contiguous_folds

if TYPE_CHECKING:
    from vitface.data.degrade import Sensors

BATCH_SIZE = 128
Embed = Callable[[np.ndarray], np.ndarray]  # uint8 (B, 112, 112, 3) -> unit-norm (B, E)
Quality = Callable[[np.ndarray], np.ndarray]  # the same -> (B,) in [0, 1]


Work = Callable[[Sequence[int]], Iterator[np.ndarray]]  # numbers of turns -> an array (n, E) of each


def in_order(work: Work, count: int) -> np.ndarray:
    """The arrays of the turns 0 to `count` - 1, concatenated."""
    return np.concatenate([*work(range(count))])


InTurns = Callable[[Work, int], np.ndarray]  # `in_order`, or the same over several processes


@dataclass(frozen=True)
class Degraded:
    """Pairs of which both images, or only the second one, the `probe`, are as `sensors` give them."""

    sensors: "Sensors"
    probe: bool = False

    def label(self, name: str) -> str:
        """The name of a benchmark's results: "lfw lowres:16", "lfw lowres:16 probe"."""
        return f"{name} {self}"

    @property
    def text(self) -> str:
        """The sensors as --degrade takes them."""
        return ",".join(map(str, self.sensors))

    def __str__(self) -> str:
        return self.text + " probe" * self.probe

    @property
    def scores(self) -> str:
        """The name of the file where a run keeps its scores on such pairs."""
        return f"scores-{re.sub('[:, ]', '-', str(self))}.safetensors"


def kept_conditions(run: Path) -> list[Degraded]:
    """The conditions under which a run has kept scores, see `Degraded.scores`, those with degraded probes last."""
    from vitface.data.degrade import parse_sensors

    found = []
    for file in run.glob("scores-*.safetensors"):
        words, probe = re.subn("-probe$", "", file.stem.removeprefix("scores-"))
        with suppress(ConfigError):  # a file of somebody's own
            found.append(Degraded(parse_sensors(re.sub("-?([a-z]+)-", r",\1:", words)[1:]), bool(probe)))
    return sorted(found, key=lambda each: (each.probe, each.sensors))


@dataclass(frozen=True)
class Benchmark:
    """`category` is what makes it hard: "general", "pose", "age", "quality", or what its sets differ in: "ethnicity";
    `pairs` is how many it has, half of them same."""

    category: str
    pairs: int


CATEGORIES = {
    **dict.fromkeys(("lfw", "cfp_ff"), "general"),
    **dict.fromkeys(("cfp_fp", "cplfw", "vgg2_fp"), "pose"),
    **dict.fromkeys(("agedb_30", "calfw"), "age"),
    "xqlfw": "quality",
    **dict.fromkeys(RFW, "ethnicity"),
}
OWN = "own pairs"  # the category of a set that nobody published
BENCHMARKS = {
    **{name: Benchmark(category, PAIRS[name]) for name, category in CATEGORIES.items()},
    **{world: Benchmark("synthetic", 2000) for world in SYNTHETIC},
}


def category(label: str) -> str:
    """What makes the benchmark of a result hard, or OWN."""
    name = benchmark_of(label)
    return BENCHMARKS[name].category if name in BENCHMARKS else OWN


def read_benchmark(name: str, data_dir: str | Path) -> VerificationSet:
    """The pairs of a real benchmark: of its .bin, else of its list; or of one's own file. DataError if there is none,
    or another set."""
    folder = Path(data_dir)
    if name not in BENCHMARKS:
        if not (file := own_file(folder, name)):
            raise DataError(f"{folder} has no file {name}, and no benchmark is called so")
        return read_bin(file) if is_bin(file) else read_own_list(file)
    if file := bin_in(folder, name):
        pairs = read_bin(file)
    elif found := find_list(folder, name):
        file, pairs = found[0], read_pair_list(name, *found)
    else:
        raise DataError(missing(name, folder))
    try:
        check_pairs(name, pairs, BENCHMARKS[name].pairs)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return pairs


def available(data_dir: str | Path) -> list[str]:
    """The real benchmarks that are in `data_dir`."""
    folder = Path(data_dir)
    return [name for name in PAIRS if bin_in(folder, name) or find_list(folder, name)]


def next_command(checkpoint: Path, data_dir: str | Path | None, train_data: str | None = None) -> str:
    """The command that evaluates a model on what there is; where there is no benchmark, the one that describes it."""
    if data_dir and available(data_dir):
        folder = [] if Path(data_dir) == Path("data") else ["--data-dir", data_dir]
        return command("evaluate", "--checkpoint", checkpoint, "--bench", "all", *folder)
    if train_data in SYNTHETIC:
        return command("evaluate", "--checkpoint", checkpoint, "--bench", train_data)
    return command("info", checkpoint)


def evaluate_benchmark(
    embed: Embed,
    name: str,
    data_dir: str | Path,
    in_turns: InTurns = in_order,
    degraded: Degraded | None = None,
    threshold: float | None = None,
    quality: Quality | None = None,
) -> tuple[Verification, list[str]]:
    """(The result of the field's protocol on one benchmark, `degraded` or as it is, alarms). `threshold` is the cosine
    that decides one's own pairs where there are too few for folds; with `quality` the result has the pairs' too.

    DataError as for `read_benchmark`, EvaluationError if nothing can be computed from the embeddings.
    """
    rows = embed if quality is None else lambda crops: np.column_stack([embed(crops), quality(crops)])
    if name in SYNTHETIC:
        images, people, data = _synthetic_benchmark(name)
        first, second = _embed_both(rows, images.__getitem__, np.arange(len(images)), in_turns, name, degraded)
        folds, alarms, issame = None, [], people[:, 0] == people[:, 1]
    else:
        pairs = read_benchmark(name, data_dir)
        check_labels(pairs.issame)  # before the work
        first, second = embed_pairs(rows, pairs, in_turns, degraded)
        issame, folds, people, alarms = pairs.issame, pairs.folds, pairs.people, pair_alarms(name, pairs)
        data = pairs.sha256()
    lower = None
    if quality is not None:
        lower = np.minimum(first[:, -1], second[:, -1])
        first, second = first[:, :-1], second[:, :-1]
    check_embeddings(np.concatenate([first, second]))
    distance = pair_distance(first, second)
    sizes = np.bincount(contiguous_folds(len(issame)) if folds is None else folds)
    if name in BENCHMARKS or sizes.min() >= LEAST_IN_A_FOLD:
        result = verify(distance, issame, folds, people)
    else:
        result = verify_fixed(distance, issame, np.nan if threshold is None else 2 - 2 * threshold, people)
    result = dataclasses.replace(result, data=data, quality=lower)
    return result, [*alarms, *([] if degraded else order_alarms(name, first, second, issame))]


def pairs_sha256(name: str, data_dir: str | Path) -> str:
    """The SHA-256 of a benchmark's pairs, `Verification.data`; the errors of `read_benchmark`."""
    return _synthetic_benchmark(name)[2] if name in SYNTHETIC else read_benchmark(name, data_dir).sha256()


@functools.cache
def _synthetic_benchmark(world: str) -> tuple[np.ndarray, np.ndarray, str]:
    images, people = synthetic_pairs(BENCHMARKS[world].pairs, world=world)
    return images, people, sha256_bytes(images.tobytes())


def embed_pairs(
    embed: Embed, pairs: VerificationSet, in_turns: InTurns = in_order, degraded: Degraded | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the pairs' (first, second) images, (N, E) each; an image of several pairs is embedded once."""
    images, rows = pairs.distinct()
    return _embed_both(embed, images.read, rows, in_turns, pairs.name, degraded)


def _embed_both(
    embed: Embed,
    read: Callable[[int], np.ndarray],
    rows: np.ndarray,
    in_turns: InTurns,
    name: str,
    degraded: Degraded | None,
) -> tuple[np.ndarray, np.ndarray]:
    """`embed_pairs` of the images that `read` gives; `rows` (2 N,) says which of them the pairs show."""
    count = int(rows.max()) + 1
    second = _embed_all(embed, read, count, in_turns, name, degraded.sensors if degraded else ())
    first = _embed_all(embed, read, count, in_turns, name) if degraded and degraded.probe else second
    return first[rows[::2]], second[rows[1::2]]


def _embed_all(
    embed: Embed, read: Callable[[int], np.ndarray], count: int, in_turns: InTurns, name: str, sensors: "Sensors" = ()
) -> np.ndarray:
    from vitface.data.background import in_thread  # here, so that help does not wait for torch and tqdm
    from vitface.data.degrade import degrade_crops
    from vitface.data.progress import Progress

    def read_batch(turn: int) -> np.ndarray:
        numbers = range(turn * BATCH_SIZE, min((turn + 1) * BATCH_SIZE, count))
        crops = np.stack([read(i) for i in numbers])
        return degrade_crops(crops, sensors, np.array(numbers)) if sensors else crops

    def embed_batches(turns: Sequence[int]) -> Iterator[np.ndarray]:
        for turn, crops in zip(turns, in_thread(read_batch, turns), strict=True):  # decoded while the device works
            yield embed(crops)
            bar.update(min((turn + 1) * BATCH_SIZE, count) - bar.n)  # the turns of other ranks are done as well

    with Progress(desc=f"evaluating {name}", total=count, unit="img", leave=False, dynamic_ncols=True) as bar:
        return in_turns(embed_batches, -(-count // BATCH_SIZE))


@dataclass(frozen=True)
class Evaluation:
    """Results by benchmark; `alarms` are about implausible sets or results, `failures` about those without a result.

    `kept` names the benchmarks whose results are those of an earlier evaluation, `degraded` what happened to the pairs
    of those that are not as they were published.
    """

    results: dict[str, Verification]
    alarms: list[str]
    failures: list[str]
    kept: Sequence[str] = ()
    degraded: dict[str, Degraded] = dataclasses.field(default_factory=dict)


def evaluate_all(
    embed: Embed,
    names: list[str],
    data_dir: str | Path,
    in_turns: InTurns = in_order,
    conditions: Sequence[Degraded | None] = (None,),
    threshold: float | None = None,
    quality: Quality | None = None,
) -> Evaluation:
    """Evaluates the named benchmarks one after the other, under each of the `conditions`, see `evaluate_benchmark`; a
    failure of one does not stop the others. A result near chance is an alarm unless the pairs were degraded."""
    evaluation = Evaluation({}, [], [])
    for name, degraded in itertools.product(names, conditions):
        label = degraded.label(name) if degraded else name
        try:
            result, alarms = evaluate_benchmark(embed, name, data_dir, in_turns, degraded, threshold, quality)
            evaluation.results[label] = result
            found = judge(label, result)
            alarms += [] if degraded else found
            evaluation.alarms.extend(alarm for alarm in alarms if alarm not in evaluation.alarms)
            evaluation.degraded.update({label: degraded} if degraded else {})
        except (DataError, EvaluationError) as error:
            evaluation.failures.append(str(error) if name in str(error) else f"{name}: {error}")
    return evaluation
