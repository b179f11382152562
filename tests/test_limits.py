"""The constants that cut work into pieces, each lowered and crossed: below, equal, above, twice and beyond.

A constant that is new is in none of the three lists, which fails: so nobody adds a limit that only large sets reach.
"""

import ast
import importlib
import re
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_recogniser
from drawn import drawn_faces, jpeg
from PIL import Image

from vitface.data.background import in_thread
from vitface.data.checks.check_faces import Scores, embed_all
from vitface.data.checks.check_images import size_alarm
from vitface.data.checks.check_pairs import similarities
from vitface.data.checks.check_people import images_to_compare
from vitface.data.checks.scan import scan
from vitface.data.faces.photos import CropReader
from vitface.data.formats import tinyface_folder
from vitface.data.formats.packing import pack
from vitface.data.formats.samples import FolderSamples, RecordSamples
from vitface.data.formats.stored import Samples
from vitface.evaluation import benchmarks, routing
from vitface.evaluation.ijb import scoring
from vitface.evaluation.ijb.embedding import StoredRows
from vitface.gallery.clusters import cluster
from vitface.gallery.from_folder import embed_folder
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import Settings
from vitface.kernels.attention import attention
from vitface.model.inference import embed_batches, split
from vitface.model.margin import make_margin
from vitface.training.holdout import embed_held_out
from vitface.training.ranks.identities import ShardedMargin, initial_rows

ROOT = Path(__file__).parents[1]
LIMIT = 4
SIZES = (1, LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT, 2 * LIMIT + 1)
UNCUT = 10**6

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def crops(count):
    return drawn_faces()[:count]


class Crops(Samples):
    def __init__(self, count):
        self.labels, self.names = np.arange(count), [str(i) for i in range(count)]

    def image(self, index):
        return crops(index + 1)[index]

    def where(self, index):
        return f"image {index}"


def means(images):
    """An embedding that nobody has to wait for: what is known of each image by itself."""
    return np.stack([images.mean((1, 2, 3)), images[:, 56, 56, 0]], 1).astype(np.float32)


def units(count, width=8):
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(0)), dim=1)


# Of n things, the same results with the constant lowered as with one that n never reaches.


def scanned(n, _):
    found = scan(Crops(n), 0, np.arange(n))
    return found.digests, found.sizes, found.redness, found.contrast, found.mean_face, found.patterns


def recorded(n, folder):
    """A set of n people: each image is read twice, so pages are released between two reads and behind the last."""
    records = [struct.pack("<IfQQ", 0, i, i, 0) + jpeg(crop) for i, crop in enumerate(crops(n))]
    data, listed = b"", ""
    for number, record in enumerate(records):
        listed += f"{number}\t{len(data)}\n"
        data += struct.pack("<II", 0xCED7230A, len(record)) + record + bytes(-len(record) % 4)
    (folder / "train.rec").write_bytes(data)
    (folder / "train.idx").write_text(listed)
    samples = RecordSamples(folder)
    return samples.labels, np.stack([samples.read(i) for i in [*range(n), *range(n)]])


def nearest(n, _):
    people, images = units(n).double().numpy(), units(2 * n + 5).double().numpy()
    return Scores(people, images).nearest_image()


def similar(n, _):
    pairs = np.random.default_rng(0).integers(0, 5, (n, 2))
    return [similarities(units(5).numpy(), pairs)]


def embedded_by_a_check(n, _):
    return [embed_all(means, Crops(n).read, np.arange(n)[::-1], "embedding")]


def evaluated(n, _):
    return [benchmarks._embed_all(means, Crops(n).read, n, benchmarks.in_order, "drawn")]


def embedded(n, _):
    model = tiny_recogniser().model
    return embed_batches(model, split(model, crops(n)), flip=False)


def in_order(n, _):
    return [list(in_thread(lambda item: item**2, range(n)))]


def packed(n, path):
    for i, crop in enumerate(crops(n)):
        (path / "people" / f"{i:02d}").mkdir(parents=True)
        Image.fromarray(crop).save(path / "people" / f"{i:02d}" / "0.png")
    samples = pack(FolderSamples(path / "people"), path / "packed")
    samples.verify()
    return samples.gather(np.arange(n)), samples.labels


def gallery(n, path):
    (path / "photos").mkdir()
    for i, crop in enumerate(crops(n)):
        Image.fromarray(crop).save(path / "photos" / f"{i:02d}.png")
    embed_folder(tiny_recogniser(), path / "photos", path / "gallery", Settings("model"), CropReader())
    rows = Gallery.load(path / "gallery")
    return rows.embeddings, [int(Path(name).stem) for name in rows.names]


def saved(n, path):
    """Rows that were added in two calls, saved and read."""
    rows = Gallery(8)
    rows.add([str(i) for i in range(n // 2)], units(n)[: n // 2])
    rows.add([str(i) for i in range(n // 2, n)], units(n)[n // 2 :])
    rows.save(path / "gallery")
    again = Gallery.load(path / "gallery")
    return again.embeddings, [int(name) for name in again.names], rows.embeddings


def searched(n, _):
    rows = Gallery(8)
    rows.add([str(i) for i in range(n)], units(n))
    return rows.top_k(units(2 * n + 1) + 0.1, min(3, n))


def searched_in_float16(n, _):
    rows = Gallery(8, dtype="float16")
    rows.add([str(i) for i in range(n)], units(n))
    return rows.top_k(units(9) + 0.1, min(3, n))


def clustered(n, _):
    return [cluster(units(n, width=3).numpy(), 0.3)]


def prototypes(n, _):
    return [initial_rows(n, 16, 0, 0, n), initial_rows(2 * n, 16, 0, n, 2 * n)]


def margin(n, _):
    head = ShardedMargin(make_margin("cosface", 0.35), n, 8, 64.0)
    embedding = (3 * units(6)).requires_grad_()
    loss = head(embedding, torch.arange(6) % n)
    loss.backward()
    return loss.detach(), embedding.grad, head.weight.grad


def attended(n, _):
    generator = torch.Generator().manual_seed(0)
    return [attention(torch.randn(2, n, 96, generator=generator), 2, n)]


def multiplied(n, _):
    """Rows with all columns, as templates are searched."""
    return [np.concatenate([block for _, block in scoring.products(units(n).numpy(), units(3).numpy())])]


def stored(n, folder):
    """The embeddings of n faces, in part files."""
    names = [f"{i}.jpg" for i in range(n)]
    for name in names:
        (folder / name).touch()
    faces = SimpleNamespace(name="ijbc", folder=folder, crops=names, read=lambda i: crops(i + 1)[i])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITFACE_HOME", str(folder / "home"))
        rows = StoredRows(faces, tiny_recogniser(), False, "")
        rows.complete(rows.missing(), 0, lambda embed, numbers: embed(numbers), True)
        assert not rows.missing()
        return [np.concatenate([rows.part(number) for number in range(len(rows.files))])]


CROSSED = {
    "vitface.data.background.AHEAD": in_order,
    "vitface.data.checks.check_faces.CHUNK": [nearest, embedded_by_a_check],
    "vitface.data.checks.check_pairs.BLOCK": similar,
    "vitface.data.checks.scan.CACHED_IMAGES": scanned,
    "vitface.data.checks.scan.CHUNK": scanned,
    "vitface.data.formats.recordio.BLOCK": recorded,
    "vitface.data.formats.packing.SHARD": packed,
    "vitface.evaluation.benchmarks.BATCH_SIZE": evaluated,
    "vitface.evaluation.ijb.embedding.PART": stored,
    "vitface.evaluation.ijb.scoring.PRODUCT": multiplied,
    "vitface.gallery.blocks.CHUNK": searched_in_float16,
    "vitface.gallery.clusters.BLOCK": clustered,
    "vitface.gallery.clusters.GATHERED": clustered,
    "vitface.gallery.from_folder.CHUNK": gallery,
    "vitface.gallery.gallery.BLOCK": [saved, searched],
    "vitface.gallery.gallery.QUERIES": searched,
    "vitface.model.inference.CPU_BATCH": embedded,
    "vitface.training.ranks.identities.BLOCK": prototypes,
    "vitface.training.ranks.identities.CHUNK": margin,
    "kernels.attention.MAX_TOKENS": attended,
}
CASES = [
    pytest.param(name, run, n, id=f"{name}-{run.__name__}-{n}")
    for name, runs in CROSSED.items()
    for run in (runs if isinstance(runs, list) else [runs])
    for n in SIZES
]


def lower(monkeypatch, name, value):
    module, constant = name.rsplit(".", 1)
    module = importlib.import_module(module.replace("kernels.", "vitface.kernels.", 1) if module[0] == "k" else module)
    assert isinstance(getattr(module, constant), int)
    monkeypatch.setattr(module, constant, value)


@pytest.mark.parametrize(("name", "run", "n"), CASES)
def test_pieces_make_the_whole(name, run, n, tmp_path, monkeypatch):
    lower(monkeypatch, name, UNCUT)
    (tmp_path / "whole").mkdir()
    whole = run(n, tmp_path / "whole")
    lower(monkeypatch, name, LIMIT)
    (tmp_path / "pieces").mkdir()
    pieces = run(n, tmp_path / "pieces")
    for got, expected in zip(pieces, whole, strict=True):
        got, expected = np.asarray(got), np.asarray(expected)
        assert got.shape == expected.shape
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(got, expected)


# Of n things, at most as many as the constant says, from everywhere.


def held_out(n, limit):
    model = tiny_recogniser().model
    _, _, people = embed_held_out(model, Crops(n), np.arange(n))
    assert people[0] == 0 and len(people) > limit / 2 - 1
    return people


def looked_at(n, limit):
    images = Crops(n)
    seen = []
    images.image = lambda index: seen.append(index) or crops(index + 1)[index]  # type: ignore[method-assign]
    assert size_alarm(images, "here") is None
    assert {0, n - 1} <= set(seen) and len(seen) == min(n, limit)
    return seen


def compared(n, limit):
    people, limit = 5 * n, 10 * limit
    labels = np.repeat(np.arange(people), 3)
    chosen = images_to_compare(labels)
    assert labels[chosen[0]] == 0 and labels[chosen[-1]] == people - 1 and len(chosen) > limit / 4 - 3
    return chosen


def posed(n, limit):
    """The detector finds nothing, but is asked."""
    asked = []
    pairs = type("Pairs", (), {"distinct": lambda self: (Crops(n), None)})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "crop_landmarks", lambda crop, detector: asked.append(crop))
        routing.benchmark_routing(tiny_recogniser(), pairs, None)  # type: ignore[arg-type]
    assert len(asked) == min(n, limit)
    return asked


def sizes_looked_at(n, limit):
    read = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for part in tinyface_folder.PARTS:
            (Path(folder) / part).mkdir()
            for i in range(n):
                (Path(folder) / part / f"{i}_1.jpg").touch()
        patch.setattr(tinyface_folder, "read_image", lambda file: read.append(file.name) or crops(1)[0])
        tinyface_folder.read_tinyface(Path(folder))
    return read


SAMPLED = {
    "vitface.data.formats.tinyface_folder.LOOKED_AT": sizes_looked_at,
    "vitface.data.checks.check_images.LOOKED_AT": looked_at,
    "vitface.data.checks.check_people.PATTERN_LIMIT": compared,
    "vitface.evaluation.routing.POSED_IMAGES": posed,
    "vitface.training.holdout.HOLDOUT_IMAGES": held_out,
}


@pytest.mark.parametrize("n", SIZES[1:])
@pytest.mark.parametrize(("name", "run"), SAMPLED.items(), ids=SAMPLED)
def test_a_sample_is_bounded_and_from_everywhere(name, run, n, monkeypatch):
    limit = 10 * LIMIT if run is compared else LIMIT
    lower(monkeypatch, name, limit)
    assert 0 < len(run(n, LIMIT)) <= limit


# What looks like such a constant, and cuts nothing.

CUTS_NOTHING = {
    "kernels.onednn._PACKED_ROWS": "a layout's guess, which serves any number of rows",
    "vitface.commands.photos.cluster.NAMES": "names in a line",
    "vitface.commands.photos.cluster.SHOWN": "groups that are printed",
    "vitface.data.checks.check_faces.IMAGES_PER_PERSON": "a person's mean",
    "vitface.data.checks.check_images.MIN_IMAGES": "fewer are not judged",
    "vitface.data.checks.check_people.PER_PERSON": "PATTERN_LIMIT's share",
    "vitface.data.checks.doctor.SHOWN": "files in a message",
    "vitface.data.checks.scan.PATTERN_SIDE": "pixels",
    "vitface.data.formats.labelled_pairs.MAX_LINE": "a longer line is refused",
    "vitface.data.formats.samples.EMPTY_SHOWN": "names in a message",
    "vitface.data.synthetic.canvas.STRIDE": "pixels",
    "vitface.data.images.MAX_PIXELS": "a larger photo is reduced, or refused",
    "vitface.training.start.PHOTOS": "photos of a person, at whose mean the prototype starts",
    "vitface.evaluation.explanation.ROW": "pixels",
    "vitface.gallery.origins.SAMPLED": "photos that tell whether a folder was moved",
    "vitface.metrics.NUM_FOLDS": "the protocol's ten folds",
    "vitface.model.inference.GPU_BATCH": "CPU_BATCH on a GPU: the same code",
    "vitface.model.router.STRIDE": "patches",
    "vitface.recogniser.SHOWN": "names in a message",
    "vitface.training.loop.LOG_EVERY": "lines of a log",
    "vitface.training.memory.PROBE": "images of a measurement",
    "vitface.training.setup.SYNTHETIC_IMAGES": "images of a drawn person",
}
NAMES = re.compile("CHUNK|BLOCK|BATCH|SHARD|LIMIT|AHEAD|IMAGES|QUERIES|ROWS|TOKENS")
CUTTERS = {"range", "islice", "array_split", "linspace", "split"}


def limits(source):
    """The whole numbers of a module that are named like a limit, or that its slices, divisions or ranges use."""
    tree = ast.parse(source)
    whole = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = [name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)]
            values = node.value.elts if isinstance(node.value, ast.Tuple) and len(names) > 1 else [node.value]
            whole |= {name for name, value in zip(names, values, strict=False) if _is_whole(value)}
    parts = [
        *_used(tree, ast.Slice),
        *(node for node in _used(tree, ast.BinOp) if isinstance(node.op, ast.FloorDiv | ast.Mod)),
        *(node for node in _used(tree, ast.Call) if ast.unparse(node.func).rpartition(".")[2] in CUTTERS),
    ]
    used = {node.id for part in parts for node in _used(part, ast.Name)}
    return {name for name in whole if name in used or NAMES.search(name)}


def _is_whole(value):
    parts = [node for node in ast.walk(value) if not isinstance(node, ast.operator)]
    return all(isinstance(node, ast.BinOp) or isinstance(getattr(node, "value", None), int) for node in parts)


def _used(tree, kind):
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def test_each_limit_is_crossed():
    files = [*(ROOT / "vitface").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *(ROOT / "weights").glob("*.py")]
    found = {
        ".".join([*file.relative_to(ROOT).with_suffix("").parts, name])
        for file in files
        if not {"vitface/kernels", "vitface/weights"} & {file.relative_to(ROOT).parent.as_posix()}
        for name in limits(file.read_text())
    }
    assert found == CROSSED.keys() | SAMPLED.keys() | CUTS_NOTHING.keys()


@pytest.mark.parametrize(
    "source",
    [
        "PIECE = 8\nfor i in range(0, n, PIECE): ...",
        "A, B = 3, 1 << 4\nx[: B]",
        "P = 5\ny = -(-n // P)",
        "MY_CHUNK = 2",
    ],
)
def test_a_planted_limit_is_found(source):
    assert len(limits(source)) == 1
    assert not limits("PI = 3.5\nNAME = 'x'\nSIZES = (1, 2)\nWIDTH = 8\ny = x + WIDTH\nx[: PI]")
