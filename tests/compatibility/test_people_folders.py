"""A folder per person, as people fill and unpack them."""

import pytest
from cases import case
from PIL import Image

from vitface.data.formats.samples import load_samples
from vitface.errors import DataError

KIND = "Lists"


def people(root, **folders):
    """`folders`: the path of a folder, and the names of its files; those that are no image are empty."""
    for folder, names in folders.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            path = root / folder / name
            Image.new("RGB", (112, 112)).save(path) if path.suffix == ".png" else path.write_bytes(b"")
    return root


@case("50 people of whom 7 folders are empty", "error: all 7 at once, and the command that removes them")
def test_all_empty_folders_are_named(tmp_path):
    root = people(tmp_path, **{f"p{i:02d}": ["1.png"] if i % 8 else [] for i in range(1, 51)}, p00=["notes.txt"])
    with pytest.raises(DataError) as caught:
        load_samples(root)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{root}: 7 of 51 folders have no image: p00, p08, p16, p24, p32, p40, p48"
    assert lines[1].endswith(f"this removes those without a file: find {root} -type d -empty -delete")


@case("all images one level down, in `raw`", "error: the command that moves them")
def test_images_one_level_down(tmp_path):
    root = people(tmp_path, **{"anna/raw": ["1.png"], "bert/raw": ["1.png"]})
    with pytest.raises(DataError) as caught:
        load_samples(root)
    assert str(caught.value).splitlines()[1:] == [
        "in 2 of them images lie one level down, such as anna/raw/1.png",
        f"  if anna is a person, move the images up: mv -n {root}/anna/*/* {root}/anna/",
    ]


@case("`train/PERSON` and `val/PERSON`", "error: `--train-data` of the one with people")
def test_a_split_set(tmp_path):
    root = people(tmp_path, **{f"{part}/{who}": ["1.png"] for part in ("train", "val") for who in ("anna", "bert")})
    with pytest.raises(DataError, match=rf"if train is a set of people, .*: --train-data {root}/train\n"):
        load_samples(root)
    assert load_samples(root / "train").names == ["anna", "bert"]


@case("a person whose only file cannot be read as an image", "error: the file, and why")
def test_why_a_folder_is_empty(tmp_path):
    root = people(tmp_path, anna=["1.png"], bert=["1.cr2"])
    with pytest.raises(
        DataError, match=r"1 of 2 folders have no image: bert\nbert: left out 1: 1\.cr2: \.cr2 is not read; save it as"
    ):
        load_samples(root)


@case("photos in a folder inside a person's folder, and beside the people", "left out, and said")
def test_what_is_in_the_wrong_place_is_said(tmp_path):
    root = people(tmp_path, **{"anna": ["1.png"], "anna/more": ["2.png"], "": ["3.png"]})
    samples = load_samples(root)
    assert samples.image_names() == ["anna/1.png"] and samples.notes == [
        f"{root}: 3.png: in no person's folder, left out",
        f"{root}: images in folders inside a person's are left out, such as anna/more/2.png",
    ]
