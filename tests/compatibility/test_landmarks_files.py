"""Files of landmarks as other programs write them."""

import unicodedata

import numpy as np
import pytest
from cases import case
from PIL import Image

from vitface.data.faces.alignment import TEMPLATE
from vitface.data.faces.folder import Finder, align_folder, summary
from vitface.data.faces.landmarks import match_photos, read_landmarks
from vitface.errors import DataError

KIND = "Files of landmarks"
HEADER = "file,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\n"
POINTS = ",".join(f"{value:.1f}" for value in TEMPLATE.ravel())


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The folder `photos` here, with one photo."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "Zo\u00eb").mkdir(parents=True)
    Image.fromarray(np.zeros((112, 112, 3), np.uint8)).save(tmp_path / "photos" / "Zo\u00eb" / "1.jpg")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    "written",
    [
        pytest.param("{}", marks=case("`--landmarks` with the names of `align.csv`", "matched")),
        pytest.param("./{}", marks=case("names that begin with `./`", "matched")),
        pytest.param("photos/{}", marks=case("names that begin with the folder's", "matched")),
        pytest.param("ABSOLUTE/{}", marks=case("absolute names", "matched")),
        pytest.param("NFD", marks=case("another normal form of Unicode than on disk", "matched")),
        pytest.param("BACK", marks=case("names with `\\`", "matched")),
        pytest.param(" {} ", marks=case("spaces around names", "matched")),
        "./photos/../photos/{}",
    ],
)
def test_names_are_matched(photos, written):
    name = "Zo\u00eb/1.jpg"
    name = {"NFD": unicodedata.normalize("NFD", name), "BACK": ".\\" + name.replace("/", "\\")}.get(
        written, written.replace("ABSOLUTE", str(photos)).format(name)
    )
    (photos.parent / "c.csv").write_text(HEADER + f'"{name}",{POINTS}\n')
    for src in (photos, photos.relative_to(photos.parent)):
        done = align_folder(src, photos.parent / "out", Finder(read_landmarks(photos.parent / "c.csv")))
        assert done.statuses == {"ok": 1} and done.unmatched == []


@case("a file's name that has `\\` in it, on Linux", "matched as it is")
def test_a_backslash_in_a_name(tmp_path):
    found, unknown = match_photos(
        {"a\\1.jpg": TEMPLATE, "./b.jpg": TEMPLATE}, tmp_path, ["a\\1.jpg", "a/1.jpg", "b.jpg"]
    )
    assert list(found) == ["a\\1.jpg", "b.jpg"] and unknown == []


@case("rows of landmarks that are no photo's", "counted, the first named; an error if no row is a photo's")
def test_rows_without_a_photo(photos):
    marks = {"Zo\u00eb/1.jpg": TEMPLATE, **{f"{i}.jpg": TEMPLATE for i in range(5)}}
    done = align_folder(photos, photos.parent / "out", Finder(marks))
    assert "       5 rows of landmarks are no photo's: 0.jpg, 1.jpg, 2.jpg, and 2 more" in list(summary(done))
    with pytest.raises(DataError, match=r"none of the 1 rows .* they name 0.jpg; the photos are Zo\u00eb/1.jpg"):
        align_folder(photos, photos.parent / "new", Finder({"0.jpg": TEMPLATE}))
    assert not (photos.parent / "new").exists()


@case("two rows of landmarks for one photo, as for two faces", "an error with both lines")
def test_two_rows_for_a_photo(photos):
    (photos.parent / "c.csv").write_text(HEADER + f"b.jpg,{POINTS}\na.jpg,{POINTS}\n\nb.jpg,{POINTS}\n")
    with pytest.raises(DataError, match=r"c.csv: lines 2 and 5 are both for b.jpg; keep the one of the face"):
        read_landmarks(photos.parent / "c.csv")
    with pytest.raises(DataError, match=r"two rows for a.jpg: a.jpg and ./a.jpg; keep one"):
        match_photos({"a.jpg": TEMPLATE, "./a.jpg": TEMPLATE}, photos, ["a.jpg"])
