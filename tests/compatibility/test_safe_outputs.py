"""What a command writes, and what a gallery takes and gives back."""

import numpy as np
import pytest
from cases import case

from vitface.__main__ import main
from vitface.data.faces.alignment import TEMPLATE, align_face
from vitface.errors import ImageError
from vitface.gallery.gallery import Gallery

KIND = "Outputs, galleries, landmarks"


@pytest.mark.parametrize(
    ("command", "victim"),
    [
        pytest.param(
            "explain a.jpg -o {}", "a.jpg", marks=case("`explain a.jpg -o a.jpg`", "an error; the photo is there")
        ),
        pytest.param("evaluate --json {}", "a.jpg", marks=case("`evaluate --json a.jpg`", "an error")),
        pytest.param("evaluate --json {}", "gallery.json", marks=case("`--json people/gallery.json`", "an error")),
        pytest.param("evaluate --output {}", "a.bin", marks=case("`evaluate --output lfw.bin`", "an error")),
        pytest.param(
            "cluster people --out {}", "gallery.json", marks=case("`cluster --out people/gallery.json`", "an error")
        ),
        pytest.param("data show faces --out {}", "a.jpg", marks=case("`data show --out a.jpg`", "an error")),
    ],
)
def test_outputs_replace_files_of_their_kind_only(tmp_path, monkeypatch, capsys, command, victim):
    monkeypatch.chdir(tmp_path)
    (tmp_path / victim).write_bytes(b"mine")
    with pytest.raises(SystemExit) as stop:
        main(command.format(victim).split())
    assert stop.value.code == 2 and (tmp_path / victim).read_bytes() == b"mine"
    assert f"{victim} exists and is no ." in capsys.readouterr().err


def people(*names):
    gallery = Gallery(4)
    gallery.add(names, np.eye(4, dtype=np.float32)[: len(names)])
    return gallery


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(7, marks=case("`gallery.add([7], ...)`: numbers of a database", "an error: pass `str(name)`")),
        None,
        ("a", 1),
        b"a",
        np.int64(3),
    ],
)
def test_names_are_strings(name):
    with pytest.raises(ValueError, match=r"a name is a string, not .*: pass str\(name\)"):
        people(name)


@case('`gallery.remove("anna")` where rows are `anna/1.jpg`', "all of hers are gone")
def test_a_person_is_removed_with_her_photos():
    for name in ("anna", "anna/"):
        gallery = people("anna/1.jpg", "annabel/1.jpg", "anna/2/3.jpg")
        assert gallery.remove(name) == 2 and gallery.names == ["annabel/1.jpg"]
    assert people("Zo\u00eb", "b").remove("Zoe\u0308") == 1
    with pytest.raises(ValueError, match="a name is a string"):
        people("a").remove(["a"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(
            lambda p: p[[1, 0, 2, 4, 3]],
            "left is the image's left",
            marks=case("landmarks with left and right exchanged", "an error, not a black crop"),
        ),
        pytest.param(lambda p: p[:, ::-1], "x and y", marks=case("x and y exchanged", "the same")),
        pytest.param(lambda p: p * [1, -1] + [0, 112], "y counts from the top", marks=case("y from below", "the same")),
        pytest.param(lambda p: p / 112, "less than a pixel apart", marks=case("landmarks from 0 to 1", "an error")),
        pytest.param(lambda p: p + 900, "of 112 x 112", marks=case("landmarks of a larger photo", "an error")),
        pytest.param(lambda p: p - 200, "of 112 x 112"),
    ],
)
def test_landmarks_that_cannot_be_of_a_face_in_this_photo(change, says):
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    assert np.abs(align_face(image, TEMPLATE).astype(int) - image).mean() < 3
    with pytest.raises(ImageError, match=says):
        align_face(image, change(TEMPLATE))


@pytest.mark.parametrize("yaw", [0, 45, 80, 90])
def test_turned_heads_are_faces(yaw):
    """Of a head with the nose 25 px before the eyes' and the mouth's plane."""
    turn, depth = np.deg2rad(yaw), np.array([-5, -5, 25, 5, 5])
    x = (TEMPLATE[:, 0] - 56) * np.cos(turn) + depth * np.sin(turn) + 56
    crop = align_face(np.full((112, 112, 3), 9, np.uint8), np.column_stack([x, TEMPLATE[:, 1]]))
    assert crop.shape == (112, 112, 3) and crop[56, 56].tolist() == [9, 9, 9]
