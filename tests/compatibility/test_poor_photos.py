"""Photos as cameras give them: what is typed after --degrade."""

import numpy as np
import pytest
from cases import case

from vitface.__main__ import main
from vitface.data.degrade import degrade_crops, parse_sensors
from vitface.data.faces.folder import write_crop

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
