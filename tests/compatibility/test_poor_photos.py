"""Photos as cameras give them: what is typed after --degrade."""

import json

import numpy as np
import pytest
from cases import case
from drawn import drawn_faces
from PIL import Image

from vitface.__main__ import main
from vitface.data.degrade import degrade_crops, parse_sensors
from vitface.data.faces.folder import write_crop
from vitface.data.quality import POOR

KIND = "Photos as poor cameras give them"


@pytest.fixture
def faces(tmp_path):
    for person in ("anna", "ben"):
        write_crop(tmp_path / person / "1.jpg", np.full((112, 112, 3), 90, np.uint8))
    return str(tmp_path)


@case("`--degrade lowres:16`", "all photos are 16 pixels wide, and enlarged")
def test_one_amount():
    crops = np.zeros((1, 112, 112, 3), np.uint8)
    crops[:, :, ::2] = 255  # stripes of a pixel, which 16 pixels cannot show
    assert degrade_crops(crops, parse_sensors("lowres:16"), np.arange(1)).std() < 20 < crops.std()


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        pytest.param("lowers:16", "did you mean lowres?", marks=case("`--degrade lowers:16`", "lowres is suggested")),
        pytest.param("lowres:0", "from 4", marks=case("`--degrade lowres:0`", "an error with the least and most side")),
        pytest.param("lowres:16px", "from 4", marks=case("`--degrade lowres:16px`", "an error with an example")),
        pytest.param("none", "leave --degrade out", marks=case("`--degrade none`", "an error: leave the flag out")),
    ],
)
def test_a_sensor_that_is_none(faces, tmp_path, capsys, typed, answer):
    assert main(["data", "show", faces, "--degrade", typed, "--out", str(tmp_path / "sheet.png")]) == 2
    answer = answer.replace("from 4", "at least 4 and at most 112, such as lowres:12")
    assert answer in capsys.readouterr().err and not (tmp_path / "sheet.png").exists()


@case("`vitface verify` of a photo of 8 pixels, enlarged", "the verdict, and that the score says little")
def test_a_poor_photo_is_named(tiny_run, tmp_path, capsys):
    good = drawn_faces()[0].copy()
    Image.fromarray(good).save(tmp_path / "a.png")
    Image.fromarray(degrade_crops(good[None], parse_sensors("lowres:8"), np.arange(1))[0]).save(tmp_path / "b.png")
    verify = ["verify", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--checkpoint", str(tiny_run)]
    assert main(verify) in (0, 1)
    out = capsys.readouterr().out
    assert "\nthe second photo is poor, quality 0." in out and "the score says little" in out and "first" not in out
    assert main([*verify, "--json"]) in (0, 1)
    first, second = json.loads(capsys.readouterr().out)["quality"]
    assert 0 <= second < POOR <= first <= 1
