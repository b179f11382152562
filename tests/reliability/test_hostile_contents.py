"""What a stranger's files may say: numbers without end, other types, a pipe in a file's place. Each a named error."""

import csv
import io
import json
import os
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import tiny_recogniser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitface.data.faces.folder import COLUMNS, Finder, align_folder, read_report
from vitface.data.faces.landmarks import POINTS, read_landmarks
from vitface.data.formats.packed import PackedSamples
from vitface.data.formats.pair_lists import read_pair_list
from vitface.data.formats.samples import read_domains
from vitface.data.formats.stored import numbered
from vitface.data.tables import read_table, table_text
from vitface.errors import CheckpointError, DataError, VitfaceError
from vitface.evaluation.scores import load_scores
from vitface.files import read_json, sha256_bytes, sha256_file
from vitface.gallery.gallery import Gallery
from vitface.store.faces import read_manifest
from vitface.store.settings import read_config
from vitface.store.tensors import load_tensors
from vitface.store.thresholds import read_calibration

DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "NaN", "[Infinity]", "{", "\xff", ""])
def test_what_is_no_json(tmp_path, text):
    (tmp_path / "file").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"nested|no number|Expecting|decode"):
        read_json(tmp_path / "file")


def test_a_file_without_end(tmp_path):
    (tmp_path / "file").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="not a regular file"):
        read_json(tmp_path / "file")
    (tmp_path / "long").write_text(json.dumps("x" * 100))
    with pytest.raises(ValueError, match="more than 50 bytes"):
        read_json(tmp_path / "long", limit=50)


READERS = {
    "manifest.json": lambda folder: read_manifest(folder, ("model.safetensors",)),
    "config.json": read_config,
    "thresholds.json": lambda folder: read_calibration(folder, "m"),
    "gallery.json": Gallery.load,
    "part-000000.safetensors": Gallery.load,
    "labels.npy": PackedSamples,
    "scores.safetensors": lambda folder: load_scores(folder / "scores.safetensors"),
    "model.safetensors": lambda folder: load_tensors(folder / "model.safetensors"),
    "sum": lambda folder: sha256_file(folder / "sum"),
    "align.csv": lambda folder: read_report(folder / "align.csv"),
    "landmarks.csv": lambda folder: read_landmarks(folder / "landmarks.csv"),
    "domains.csv": lambda folder: read_domains(folder / "domains.csv", []),
}


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path, name):
    if name.startswith("part"):
        (tmp_path / "gallery.json").write_text(
            '{"format": "vitface-gallery-1", "model": null, "align": false, "thresholds": {}}'
        )
    if name == "labels.npy":
        (tmp_path / "manifest.json").write_text("{}")
    os.mkfifo(tmp_path / name)
    if name in ("config.json",):
        assert READERS[name](tmp_path) == {}
        return
    with pytest.raises((VitfaceError, OSError)):
        READERS[name](tmp_path)


GOOD = {"model": "m", "pairs": {"same": 40, "different": 900}, "thresholds": {"0.01": {"threshold": 0.25, "tar": 0.9}}}


@pytest.mark.parametrize(
    "change",
    [
        *(
            {"thresholds": {"0.01": {"threshold": bad, "tar": 0.9}}}
            for bad in (1.5, -2, 10**400, "0.3", True, None, [0.3])
        ),
        *({"thresholds": {"0.01": {"threshold": 0.25, "tar": bad}}} for bad in (-0.1, 2, 10**400, "x")),
        *({"pairs": {"same": bad, "different": 900}} for bad in (-1, 10**400, "many", None)),
        *({"thresholds": bad} for bad in ([], 3, {"0.01": 3}, {"x": {"threshold": 0.3, "tar": 0.9}})),
    ],
    ids=lambda change: str(change)[:60],
)
def test_thresholds_are_cosines_or_damaged(tmp_path, change):
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps(GOOD))
    assert read_calibration(tmp_path, "m")["thresholds"] == {"0.01": {"threshold": 0.25, "tar": 0.9}}
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(CheckpointError, match="thresholds.json is damaged"):
        read_calibration(tmp_path, "m")


@pytest.mark.parametrize(
    ("far", "cosine"), [("0", 0.3), ("nan", 0.3), ("1e-400", 0.3), ("-1", 0.3), ("0.01", 2), ("0.01", "x")]
)
def test_thresholds_of_a_gallery(tmp_path, far, cosine):
    gallery = Gallery(4)
    gallery.add(["anna"], torch.eye(4)[:1])
    gallery.save(tmp_path / "people")
    settings = json.loads((tmp_path / "people" / "gallery.json").read_text())
    (tmp_path / "people" / "gallery.json").write_text(json.dumps({**settings, "thresholds": {far: cosine}}))
    with pytest.raises(DataError, match=r"gallery\.json is damaged"):
        Gallery.load(tmp_path / "people")


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def claimed(shape):
    """A file of 8 bytes of data that claims another shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(8)


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ({}, b"no labels"),
        ({}, npy(np.array([0.0, 1.0]))),
        ({}, npy(np.array([[0], [1]]))),
        ({}, npy(np.array([0, 2]))),
        ({}, npy(np.array([0, -1]))),
        ({}, npy(np.array([0, 1 << 60]))),
        ({}, npy(np.array(["a", "b"]))),
        ({}, npy(np.array([None, 1], object), allow_pickle=True)),
        ({}, claimed((1 << 40,))),
        ({}, claimed(())),
        ({"names": 7}, None),
        ({"names": ["a", 3]}, None),
        ({"shards": []}, None),
        ({"shards": [{"images": "2", "sha256": "x"}]}, None),
        ({"shards": [{"images": 1.5, "sha256": "x"}]}, None),
        ({"shards": [{"images": -1, "sha256": "x"}, {"images": 3, "sha256": "x"}]}, None),
        ({"shards": 3}, None),
        ({"source": None}, None),
        ({"skipped": [1]}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_packed_folders_say_what_they_hold(tmp_path, change, labels):
    whole = npy(np.array([0, 1]))
    manifest = {"format": "vitface packed 1", "names": ["a", "b"], "source": {"identity": "i"}, "skipped": []}
    manifest |= {"shards": [{"images": 2, "sha256": sha256_bytes(bytes(2 * 112 * 112 * 3))}]}
    (tmp_path / "images.uint8").write_bytes(bytes(2 * 112 * 112 * 3))

    def write(change, labels):
        (tmp_path / "labels.npy").write_bytes(labels)
        about = {**manifest, "labels_sha256": sha256_bytes(labels), **change}
        (tmp_path / "manifest.json").write_text(json.dumps(about))

    write({}, whole)
    assert PackedSamples(tmp_path).labels.tolist() == [0, 1]
    write(change, whole if labels is None else labels)
    with pytest.raises(DataError, match=str(tmp_path)):
        PackedSamples(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_nan_and_zero_are_no_verdict(value):
    model = tiny_recogniser()
    with torch.no_grad():
        for parameter in model.model.head.parameters():
            parameter.fill_(value)
    with pytest.raises(CheckpointError, match="NaN or 0"):
        model.verify(*np.zeros((2, 112, 112, 3), np.uint8))


def test_names_are_numbered_in_memory_of_their_own_length():
    names = ["b", "a", "b", "x" * 1_000_000, *(f"person {i:05d}" for i in range(20_000))]
    tracemalloc.start()
    found = numbered(names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    want = {name: number for number, name in enumerate(sorted(set(names)))}
    assert found.dtype == np.int64 and found.tolist() == [want[name] for name in names]
    assert peak < 20_000_000  # as an array of text 80 GB


def test_a_name_that_no_file_has(tmp_path):
    rows = [f"{name}.jpg {token}" for token in range(1, 11) for name in ("x" * 300, "a")]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    with pytest.raises(DataError, match="of 304 characters: no file has such a name") as error:
        read_pair_list("calfw", tmp_path / "list.txt", tmp_path)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "cells",
    ["x" * 200_000, "\udcff", '"' + "x\n" * 100_000],
    ids=["long", "not UTF-8", "a quote without end"],
)
def test_tables_that_are_none(tmp_path, cells):
    """The line is named, or what is read of it is a whole row."""
    columns = {"align.csv": COLUMNS, "landmarks.csv": ["file", *POINTS], "domains.csv": ["image", "domain"]}
    for name, first in columns.items():
        text = ",".join(first) + "\n" + f"{cells}," + ",".join("1" for _ in first[1:]) + "\n"
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(DataError, match=name):
            READERS[name](tmp_path) or pytest.fail("valid")


def test_landmarks_are_pixels(tmp_path):
    rows = [f"{photo}.jpg," + ",".join([value, *"123456789"]) for photo, value in (("a", "1"), ("b", "1e160"))]
    (tmp_path / "marks.csv").write_text("\n".join([",".join(["file", *POINTS]), *rows]))
    with pytest.raises(DataError, match="line 3 does not hold ten numbers of pixels"):
        read_landmarks(tmp_path / "marks.csv")


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=2, max_size=2))
def test_a_table_holds_any_text_and_no_formula(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("table") / "t.csv"
    path.write_bytes(table_text([("a", "b"), cells]).encode())
    assert [row for _, row in read_table(path, ["a", "b"])] == [dict(zip("ab", cells, strict=True))]
    for row in csv.reader(io.StringIO(path.read_bytes().decode(), newline="")):
        assert not any(cell.startswith(("=", "@", "\t", "\r")) for cell in row)


def test_photos_of_any_name_are_aligned_once(tmp_path):
    marks = np.array([[38.0, 52.0], [74.0, 51.0], [56.0, 72.0], [42.0, 92.0], [71.0, 92.0]])
    names = ["a\rb.jpg", "c\nd.jpg", "=cmd|' !A0.jpg", "'.jpg", "-3.jpg", '".jpg']
    (tmp_path / "photos").mkdir()
    for name in names:
        Image.new("RGB", (120, 120)).save(tmp_path / "photos" / name)
    for _ in range(2):
        done = align_folder(tmp_path / "photos", tmp_path / "out", Finder(dict.fromkeys(names, marks)))
        assert done.statuses == {"ok": len(names)} and not done.changed and not done.gone
        assert read_report(tmp_path / "out" / "align.csv").keys() == set(names)


@pytest.mark.parametrize("text", ["x", "10\t300", "1", "1 a.jpg", "0\ta.jpg\tb.jpg"])
@pytest.mark.parametrize("name", ["lfw", "calfw", "cplfw", "cfp_fp", "agedb_30"])
def test_a_list_of_one_line(tmp_path, name, text):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=str(tmp_path)):
        read_pair_list(name, tmp_path / "list.txt", tmp_path)
