"""Galleries from strangers: each is refused by name, or searched in memory that its file bounds."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import Largest
from PIL import Image
from safetensors.torch import save_file

from vitface.__main__ import main
from vitface.errors import ConfigError, DataError
from vitface.gallery import gallery as module
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import read_settings

SETTINGS = {"format": "vitface-gallery-1", "model": None, "align": False, "thresholds": {}}


@pytest.fixture
def people(tmp_path):
    (tmp_path / "gallery.json").write_text(json.dumps(SETTINGS))
    return tmp_path


def part(people, rows, names=None, number=0):
    names = [f"n{i}" for i in range(len(rows))] if names is None else names
    file = people / f"part-{number:06d}.safetensors"
    save_file({"embeddings": rows}, file, {"format": SETTINGS["format"], "names": json.dumps(names)})
    return file


@pytest.mark.parametrize(
    "change",
    [
        *({"format": value} for value in (None, 1, "vitface-gallery-2", ["vitface-gallery-1"])),
        *({"model": value} for value in (1, [], {}, True)),
        *({"align": value} for value in (None, "no", 1, [])),
        *({"thresholds": value} for value in (None, [], 7, "x", {"0.1": None}, {"0.1": "0.3"}, {"0.1": True})),
        *({"dtype": value} for value in (None, "float64", "int8", 32, [], {})),
        *({"folders": value} for value in (None, 7, [7], [["a"]], [["a", "b", "c"]], [[1, "a"]], [["a", None]], ["a"])),
        {"folders": [["a", "\ud800"]]},
    ],
)
def test_settings_of_a_wrong_type(people, change):
    part(people, torch.eye(4))
    (people / "gallery.json").write_text(json.dumps({**SETTINGS, **change}))
    with pytest.raises(DataError, match=r"gallery\.json is damaged, or of another version"):
        Gallery.load(people)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"x"', "{}", "[[[", '{"format": "vitface-gallery-1"}'])
def test_settings_that_are_none(people, text):
    (people / "gallery.json").write_text(text)
    with pytest.raises(DataError, match=r"gallery\.json is damaged"):
        read_settings(people)


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (torch.eye(2), ["a", "\ud800"], "surrogates not allowed"),
        (torch.eye(2), {"a": 1, "b": 2}, "not a list of strings"),
        (torch.eye(2).double(), None, "2 names for embeddings"),
        (torch.eye(2).bfloat16(), None, "2 names for embeddings"),
        (torch.eye(2)[None], None, "embeddings of shape"),
        (torch.zeros(2, 0), None, "embeddings of shape"),
        (torch.zeros(0, 4), [], "holds no embedding yet"),
        (torch.eye(2) * 2, None, "not of unit norm"),
        (torch.eye(2).half() * torch.inf, None, "not of unit norm"),
    ],
)
@pytest.mark.parametrize("mapped", [1, 1000])
def test_parts_that_are_none(people, monkeypatch, rows, names, message, mapped):
    monkeypatch.setattr(module, "MAPPED", mapped)
    part(people, rows, names)
    with pytest.raises(DataError, match=message):
        Gallery.load(people).search(np.eye(2)[:1])


def test_origins_that_lead_nowhere(people):
    """Rows of folders that the settings do not have, and of any number, belong to none."""
    file = people / "part-000000.safetensors"
    files = [["1-2", "x", 10**30], ["1-2", "x", -7], ["1-2", "x", 3]]
    metadata = {"format": SETTINGS["format"], "names": '["a", "b", "c"]', "files": json.dumps(files)}
    save_file({"embeddings": torch.eye(3)}, file, metadata)
    assert Gallery.load(people).names == ["a", "b", "c"]


@pytest.mark.parametrize("mapped", [1, 1000])
def test_one_row_of_two_million_numbers(people, monkeypatch, mapped):
    monkeypatch.setattr(module, "MAPPED", mapped)
    rows = torch.zeros(1, 2_000_000)
    rows[0, 5] = 1
    part(people, rows)
    with Largest() as largest:
        assert Gallery.load(people).search(rows)[0][0].score == 1
    assert largest.numel <= 4 * rows.numel() + 1000  # the file, as bytes


def test_a_part_of_many_rows_is_searched_in_pieces(people, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)
    rows = torch.nn.functional.normalize(torch.randn(2000, 8), dim=1)
    part(people, rows)
    gallery = Gallery.load(people)
    assert [match.name for (match,) in gallery.search(rows[[7, 1900]], 1)] == ["n7", "n1900"]
    with Largest() as largest:
        gallery.search(rows[:40], 1)
    assert largest.numel <= rows.numel() < 40 * 2000  # which all scores together are


def test_a_part_that_is_cut_while_it_is_mapped(people):
    file = part(people, torch.nn.functional.normalize(torch.randn(5000, 64), dim=1))
    gallery = Gallery.load(people)
    os.truncate(file, 4096)
    for use in (
        lambda: gallery.search(np.eye(64)[:1]),
        lambda: gallery.embeddings,
        lambda: gallery.save(people / "new"),
    ):
        with pytest.raises(DataError, match="was cut by another program while it was in use"):
            use()
    with pytest.raises(DataError, match="is damaged"):
        Gallery.load(people)


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_a_part_that_is_replaced_while_it_is_mapped(people, how):
    rows = torch.nn.functional.normalize(torch.randn(2000, 64), dim=1)
    file = part(people, rows)
    gallery = Gallery.load(people)
    file.unlink()
    if how == "replaced":
        part(people, torch.eye(64))
    np.testing.assert_array_equal(gallery.embeddings, rows.numpy())


def test_another_width_than_the_model(people, tiny_run, capsys, monkeypatch):
    monkeypatch.chdir(tiny_run.parents[1])
    part(people, torch.eye(3))
    Image.new("RGB", (112, 112), (9, 99, 199)).save(people / "a.png")
    assert main(["search", str(people), str(people / "a.png"), "--checkpoint", str(tiny_run)]) == 2
    assert "was made by another model than" in capsys.readouterr().err


def test_wrong_arguments_in_python():
    gallery = Gallery(4)
    gallery.add(["a", "b"], np.eye(4)[:2][::-1])
    for arguments in (("128",), (1.5,), (None,), (0,), (4, {}), (4, None, "gpu"), (4, None, "cpu", "float64")):
        with pytest.raises(ConfigError):
            Gallery(*arguments)
    for k in (0, -1, "2", 1.0, None):
        with pytest.raises(ConfigError, match="k is a whole number, at least 1, not"):
            gallery.search(np.eye(4), k)
    wrong = (
        np.eye(4)[0],
        np.eye(3),
        np.full((1, 4), np.nan),
        "a.jpg",
        None,
        [[1, 2], [3]],
        np.eye(4, dtype=complex),
        5,
    )
    for queries in wrong:
        with pytest.raises(DataError, match="embeddings"):
            gallery.search(queries)
    for names in (None, 7, "abcd", ["a"], ["\ud800"] * 4, [None] * 4):
        with pytest.raises(DataError, match="name"):
            gallery.add(names, np.eye(4))
    for path in (None, 7, b"people"):
        for use in (Gallery.load, gallery.save):
            with pytest.raises(ConfigError, match="a gallery is a folder: pass its path"):
                use(path)
    assert gallery.search([[0, 1, 0, 0]], 10**30)[0][0] == ("a", 1.0) and len(gallery) == 2
