"""Folders and lists from strangers, mutated by the thousand: read as something valid, or a named error."""

import itertools
import json
import random
import re
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sandbox
import torch
from conftest import randomise_adapters, tiny_config, tiny_face, tiny_vit
from matrix import ROWS, sizes
from mutation import MUTATIONS, mutated_file, rewrite
from sandbox import assault
from test_bad_input import encoded

from vitface.config import resolve
from vitface.data.faces.alignment import align_face
from vitface.data.faces.folder import COLUMNS, Finder, Row, _is_stale, _write_report, read_report
from vitface.data.faces.landmarks import POINTS, read_landmarks
from vitface.data.folders import stamp
from vitface.data.formats.packed import CROP_SHAPE, PackedSamples
from vitface.data.formats.packing import pack
from vitface.data.formats.pair_lists import read_pair_list
from vitface.data.formats.samples import FolderSamples, read_domains
from vitface.errors import VitfaceError
from vitface.evaluation.page import learning_curve
from vitface.evaluation.protocol import verify
from vitface.evaluation.scores import SCORES, load_scores, save_scores
from vitface.exchange.bundle import face_files
from vitface.exchange.from_peft import read_domains as read_peft_domains
from vitface.exchange.peft import TIMM, peft_files
from vitface.files import sha256_bytes, sha256_file
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import Folder, Origin, Settings, part_files, read_part, write_part
from vitface.model.face import FaceModel
from vitface.model.lora import adapter_state_dict
from vitface.recogniser import Recogniser
from vitface.store.backbone import load_backbone, read_backbone, save_backbone
from vitface.store.faces import open_checkpoint
from vitface.store.tensors import load_tensors
from vitface.store.thresholds import FARS
from vitface.training.runs.log import RunLog

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Kind(NamedTuple):
    """`make` fills an empty folder; `read` (folder, the file that was changed) asserts that what it reads is valid;
    `seal` writes the sums of the files as they are, which a stranger can do as well, into the files `sealed`."""

    make: Callable[[Path], None]
    read: Callable[[Path, str], None]
    seal: Callable[[Path], None] = lambda folder: None
    sealed: tuple[str, ...] = ()


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def make_bundle(folder):
    """A face model with the backbone that it was trained on, and thresholds."""
    path = folder / "tiny.safetensors"
    save_backbone(path, "tiny", tiny_config(), tiny_vit(seed=3).state_dict(), {"file": "x", "licence": "none"})
    config = tiny_face(num_domains=2, embedding_dim=4, lora_rank=1).config
    config = type(config)(**{**vars(config), "backbone": "tiny", "weights_sha256": sha256_file(path)})
    model = FaceModel(load_backbone("tiny", path, 32), config).eval()
    randomise_adapters(model)
    thresholds = {f"{far:g}": {"threshold": 0.5 - far, "tar": 0.9} for far in FARS[:2]}
    write(folder, face_files(model, path, {"pairs": {"same": 9, "different": 30_000}, "thresholds": thresholds}))


def seal_bundle(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    config, thresholds = (json.loads((folder / f"{name}.json").read_text()) for name in ("model", "thresholds"))
    thresholds["model"] = sha256_file(folder / "model.safetensors")
    config["weights_sha256"] = sha256_file(folder / "tiny.safetensors")
    rewrite(folder / "model.json", json.dumps(config).encode())
    rewrite(folder / "thresholds.json", json.dumps(thresholds).encode())
    for name, sealed in manifest["files"].items():
        sealed |= {"size": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    rewrite(folder / "manifest.json", json.dumps(manifest).encode())


built = itertools.count()


def read_bundle(folder, changed):
    """Each is opened and its backbone found; of those that can be, every twentieth is built and embeds."""
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.thresholds) <= set(FARS)
    assert all(-1 <= cosine <= 1 for cosine in checkpoint.thresholds.values())
    read_backbone(Path(checkpoint.backbone))
    load_tensors(folder / "model.safetensors")
    if next(built) % 20:
        return
    found = Recogniser.from_checkpoint(checkpoint).embed(np.full((1, 112, 112, 3), 99, np.uint8))
    assert found.shape == (1, checkpoint.config.embedding_dim) and np.isfinite(found).all()
    assert abs(np.linalg.norm(found) - 1) < 1e-3


def make_peft(folder):
    config = tiny_face(lora_rank=2).config
    model = FaceModel(tiny_vit(), config)
    randomise_adapters(model)
    write(folder, peft_files(adapter_state_dict(model.vit), config, TIMM))


def read_peft(folder, changed):
    adapters, domains = read_peft_domains(folder, "dinov2_vits14", tiny_config())
    assert domains == 1 and adapters.settings["lora_alpha"] > 0
    assert all(tensor.isfinite().all() for tensor in adapters.tensors.values())


def make_gallery(folder):
    folder.rmdir()
    gallery = Gallery(4, Settings("m" * 64, True, {0.01: 0.3, 0.001: 0.4}, "float32", (Folder("/photos", "x/"),)))
    gallery.add(["anna/1.jpg", "anna/2.jpg", "王伟"], torch.eye(4)[:3])
    gallery.save(folder)
    write_part(folder, ["Zoë/1.jpg"], torch.eye(4)[3:], [Origin("123 456", "a" * 64, 0)])


def read_gallery(folder, changed):
    gallery = Gallery.load(folder)
    rows = gallery.embeddings
    assert rows.shape == (len(gallery), gallery.embedding_dim) and len(gallery.names) == len(rows) > 0
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3) and all(type(name) is str for name in gallery.names)
    assert all(0 < far < 1 and -1 <= cosine <= 1 for far, cosine in gallery.thresholds.items())
    assert gallery.search(rows[:1], 1)[0][0].score > 0.99
    assert all(type(origin) is Origin for file in part_files(folder) for origin in read_part(file, files=True).files)


def make_packed(folder):
    people = folder.with_name("people")
    write(people, {f"{person}/{i}.png": encoded("PNG", 16, i) for person in "ab" for i in range(2)})
    folder.rmdir()
    pack(FolderSamples(people), folder)


def read_packed(folder, changed):
    samples = PackedSamples(folder)
    assert samples.labels.dtype == np.int64 and samples.labels.shape == (len(samples),)
    assert all(type(samples.names[label]) is str for label in samples.labels)
    samples.verify()
    assert samples.gather(np.arange(len(samples))).shape == (len(samples), *CROP_SHAPE)
    assert all(samples.read(index).dtype == np.uint8 for index in range(len(samples)))


def seal_packed(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    pixels = (folder / "images.uint8").read_bytes()
    manifest["labels_sha256"] = sha256_bytes((folder / "labels.npy").read_bytes())
    manifest["shards"][0]["sha256"] = sha256_bytes(pixels)
    rewrite(folder / "manifest.json", json.dumps(manifest).encode())


def make_scores(folder):
    generator, issame = np.random.default_rng(0), np.arange(20) % 2 == 0
    results = [verify(generator.random(20), issame, people=people) for people in (None, np.zeros((20, 2), np.int64))]
    named = [type(result)(**{**vars(result), "data": data * 64}) for result, data in zip(results, "ab", strict=True)]
    save_scores(folder / SCORES, dict(zip(("lfw", "cfp_fp"), named, strict=True)), "m" * 64)


def read_scores(folder, changed):
    results, model = load_scores(folder / SCORES)
    assert type(model) is str
    for name, result in results.items():
        count = len(result.issame)
        assert type(name) is str and result.distance.dtype == np.float64 and np.isfinite(result.distance).all()
        assert result.folds.shape == result.correct.shape == (count,) and result.folds.min() == 0
        assert 0 <= result.accuracy <= 1 and 0 <= result.auc <= 1 and 0 <= result.eer <= 1
        assert result.people is None or (result.people.shape == (count, 2) and result.people.dtype == np.int64)


def make_pair_lists(folder):
    """Each published list, as short as it can be, and the forms in which copies of them come."""
    image = encoded("JPEG", 16)
    crops = [f"{who}/{who}_{i:04d}.jpg" for who in ("Anna", "Jo Li") for i in (1, 2)]
    lfw = "2\t1\n" + "Anna\t1\t2\nAnna\t1\tJo Li\t1\n" * 2
    calfw = "".join(f"{photo} {token}\n" for token in (1, 2, 0) for photo in ("Anna_0001.jpg", "Jo Li_0001.jpg"))
    labelled = "1 Anna/Anna_0001.jpg Anna/Anna_0002.jpg\n0 Anna/Anna_0001.jpg Jo Li/Jo Li_0001.jpg\n"
    lists = {"lfw": lfw, "calfw": calfw, "cplfw": calfw.replace("\n", "\r\n"), "agedb_30": labelled}
    lists |= {"lfw-labelled": labelled, "lfw-tabs": "1\tAnna/Anna_0001.jpg\tJo Li/Jo Li_0001.jpg\n" + labelled}
    files = {f"{name}.txt": text.encode() for name, text in lists.items()}
    files |= {f"Protocol/Pair_list_{side}.txt": b"1 ../x/1.jpg\n2 ../x/2.jpg\n" for side in "FP"}
    for fold in range(1, 11):
        for kind, name in (("FP", "same"), ("FP", "diff"), ("FF", "same"), ("FF", "diff")):
            files[f"Protocol/Split/{kind}/{fold:02d}/{name}.txt"] = b"1,2\n"  # of which those of fold 1 are changed
    photos = [*crops, "x/1.jpg", "x/2.jpg", "Anna_0001.jpg", "Jo Li_0001.jpg"]
    write(folder, {**files, **{f"photos/{photo}": image for photo in photos}})


def read_pairs(folder, changed):
    name = changed.partition(".")[0].partition("-")[0]
    if changed.startswith("Protocol"):
        name, changed = "cfp_ff" if "/FF/" in changed else "cfp_fp", "Protocol/Pair_list_F.txt"
    found = read_pair_list(name, folder / changed, folder / "photos")
    pairs = len(found.issame)
    assert found.issame.dtype == bool and len(found.images) == 2 * pairs > 0
    assert found.folds is None or (found.folds.shape == (pairs,) and found.folds.min() >= 0)
    assert found.people is None or (found.people.shape == (pairs, 2) and found.people.dtype == np.int64)


LANDMARKS = np.array([[38.0, 52.0], [74.0, 51.0], [56.0, 72.0], [42.0, 92.0], [71.0, 92.0]])
PHOTOS = ["anna/1.jpg", "Zoë, again/2.jpg", "王伟/3.jpg"]


def make_tables(folder):
    """The tables that are read: align.csv, landmarks, domain labels, and a run's own logs."""
    _write_report(folder / "align.csv", {}, [Row(photo, "ok", 1, LANDMARKS, "", "1 2") for photo in PHOTOS])
    lines = [
        f"{json.dumps(photo, ensure_ascii=False)}," + ",".join(f"{value:.2f}" for value in LANDMARKS.ravel())
        for photo in PHOTOS
    ]
    domains = [
        f"{json.dumps(photo, ensure_ascii=False)},{domain}"
        for photo, domain in zip(PHOTOS, ("old", "young", "old"), strict=True)
    ]
    rows = [{"epoch": i, "step": 4 * i, "loss": 1.5, "lr": 1e-3, "holdout_auc": 0.7, "alarms": []} for i in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    RunLog(folder, resolve({"save_dir": str(folder), "weights": "random"}), 9)
    texts = {"landmarks.csv": [",".join(["file", *POINTS]), *lines], "domains.csv": ["image,domain", *domains]}
    write(folder, {name: ("\n".join(text) + "\n").encode() for name, text in texts.items()})


def read_tables(folder, changed):
    match changed:
        case "align.csv":
            finder = Finder(dict.fromkeys(PHOTOS, LANDMARKS))
            for photo, line in read_report(folder / changed).items():
                assert set(line) == set(COLUMNS) and line["file"] == photo and line["status"] in ("ok", "several")
                assert ".." not in Path(photo).parts and not Path(photo).is_absolute()
                assert _is_stale({**line, "stamp": stamp(folder / changed)}, folder / changed, finder) in (True, False)
        case "landmarks.csv":
            for points in read_landmarks(folder / changed).values():
                assert points.shape == (5, 2) and points.dtype == np.float64
                assert align_face(np.zeros((120, 100, 3), np.uint8), points).shape == CROP_SHAPE
        case "domains.csv":
            domains = read_domains(folder / changed, PHOTOS)
            assert domains.shape == (3,) and set(domains) == set(range(max(domains) + 1))
        case "log.csv":
            assert all(chart for chart in learning_curve(folder))
        case "log.jsonl":
            log = RunLog(folder, resolve({"save_dir": str(folder), "weights": "random"}), 9)
            assert all(type(row) is dict and row["step"] <= 9 for row in log.epochs)


KINDS = {
    "bundles": Kind(make_bundle, read_bundle, seal_bundle, ("manifest.json", "model.json", "thresholds.json")),
    "PEFT": Kind(make_peft, read_peft),
    "galleries": Kind(make_gallery, read_gallery),
    "packed": Kind(make_packed, read_packed, seal_packed, ("manifest.json",)),
    "scores": Kind(make_scores, read_scores),
    "pair lists": Kind(make_pair_lists, read_pairs),
    "tables": Kind(make_tables, read_tables),
}


class Mutants:
    """The files of a kind, one of them changed in each attempt; half the time with the sums that fit."""

    def __init__(self, kind: Kind, folder: Path):
        self.kind, self.folder, self.rng = kind, folder, random.Random(0)
        folder.mkdir()
        kind.make(folder)
        self.whole = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.names = sorted(
            name for name in self.whole if Path(name).suffix in MUTATIONS and not re.search("/(0[2-9]|10)/", name)
        )

    def attempt(self, case: int) -> str:
        changed = self.names[case % len(self.names)]
        rewrite(self.folder / changed, mutated_file(self.rng, changed, self.whole[changed]))
        with suppress(ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError):
            if self.rng.random() < 0.6:
                self.kind.seal(self.folder)  # where the changed file can be sealed at all
        try:
            with redirect_stderr(StringIO()):  # notes on what is left out
                self.kind.read(self.folder, changed)
        except VitfaceError as error:
            assert str(error)
            return "error"
        finally:
            for name in {changed, *self.kind.sealed}:
                rewrite(self.folder / name, self.whole[name])
        return "valid"

    def read_whole(self) -> None:
        for name in self.names:
            self.kind.read(self.folder, name)


@pytest.fixture
def fuzz(tmp_path, tiny_preset, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("vitface.gallery.gallery.MAPPED", 2)  # of the two parts one

    def run(row, cases):
        mutants = Mutants(KINDS[row], tmp_path / "files")
        assault(mutants.attempt, cases, mutants.read_whole)

    return run


@sizes("bundles")
def test_bundles(fuzz, ran, cases):
    fuzz("bundles", cases)
    ran(ROWS["bundles"].fault, cases)


@sizes("PEFT")
def test_peft(fuzz, ran, cases):
    fuzz("PEFT", cases)
    ran(ROWS["PEFT"].fault, cases)


@sizes("galleries")
def test_galleries(fuzz, ran, cases):
    fuzz("galleries", cases)
    ran(ROWS["galleries"].fault, cases)


@sizes("packed")
def test_packed(fuzz, ran, cases):
    fuzz("packed", cases)
    ran(ROWS["packed"].fault, cases)


@sizes("scores")
def test_scores(fuzz, ran, cases):
    fuzz("scores", cases)
    ran(ROWS["scores"].fault, cases)


@sizes("pair lists")
def test_pair_lists(fuzz, ran, cases):
    fuzz("pair lists", cases)
    ran(ROWS["pair lists"].fault, cases)


@sizes("tables")
def test_tables(fuzz, ran, cases):
    fuzz("tables", cases)
    ran(ROWS["tables"].fault, cases)


def hoarding(file, files=False):
    hoard.append(b"x" * (64 << 20))
    return read_part(file, files)


def waiting(path):
    return next(None for _ in itertools.count() if not path)


hoard: list[bytes] = []
PLANTED = {
    "rows of any norm": ("galleries", "gallery.parts.check_norms", lambda rows: None),
    "memory without end": ("galleries", "gallery.parts.read_part", hoarding),
    "a loop without end": ("galleries", "gallery.parts.read_settings", waiting),
    "another error": ("galleries", "gallery.parts.part_files", lambda path: {}[""]),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name, fuzz, monkeypatch, capfd):
    row, where, fault = PLANTED[name]
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5 if "loop" in name else 60)
    monkeypatch.setattr(Mutants, "read_whole", lambda self: monkeypatch.setattr(f"vitface.{where}", fault))
    with pytest.raises(AssertionError):
        fuzz(row, 300)
    shown = capfd.readouterr().err
    assert ("waiting" if "loop" in name else "case ") in shown, shown
