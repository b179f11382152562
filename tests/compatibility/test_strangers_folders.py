"""Folders and files that a command is asked to write to, and that hold something else, or cannot be written to."""

import os

import numpy as np
import pytest
from cases import case
from PIL import Image

from vitface.__main__ import main
from vitface.errors import ConfigError
from vitface.files import check_output

KIND = "Where a command writes"
POINTS = "file,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\n1.jpg,38,51,73,51,56,71,41,92,70,92\n"
COMMANDS = {
    "`train --save-dir`": "train --exp demo --save-dir {}",
    "`train --resume auto --save-dir`": "train --exp demo --save-dir {} --resume auto",
    "`study --save-dir`": "study tiny --save-dir {}",
    "`align`": "align photos {}",
    "`embed`": "embed photos {} --checkpoint runs/a --no-align",
    "`data pack`": "data pack faces {}",
    "`data draw`": "data draw {}",
    "`publish --out`": "publish RUN --repo me/x --data x --out {}",
    "`export --out`": "export RUN --format merged --out {}",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of photos, one of people, and one of photos that is named as output."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "faces/anna", "faces/ben", "mine/anna"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.zeros((112, 112, 3), np.uint8)).save(tmp_path / folder / "1.jpg")
    return tmp_path


def answer(command, capsys):
    """(exit code, what was printed) of a command that refuses its arguments."""
    try:
        code = main(command.split())
    except SystemExit as stop:
        code = stop.code
    streams = capsys.readouterr()
    return code, streams.out + streams.err


@pytest.mark.parametrize(
    "given",
    [pytest.param(given, marks=case(f"{given} of a folder of photos", "an error; untouched")) for given in COMMANDS],
)
def test_nothing_is_mixed_with_other_files(here, tiny_run, capsys, given):
    pytest.importorskip("cv2")
    command = COMMANDS[given].format("mine").replace("RUN", str(tiny_run)).replace("runs/a", str(tiny_run))
    if given == "`align`":
        command += " --landmarks points.csv"
        (here / "points.csv").write_text(POINTS)
    code, text = answer(command, capsys)
    assert code == 2 and "mine" in text and "Errno" not in text, text
    assert sorted(path.name for path in here.glob("mine/**/*")) == ["1.jpg", "anna"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "gallery.json", marks=case("`train --save-dir` of a gallery", "an error that names what is there")
        ),
        pytest.param("align.csv", marks=case("`train --save-dir` of aligned faces", "an error")),
        pytest.param("step-7/model.json", marks=case("`train --save-dir runs/a/checkpoints`", "an error")),
    ],
)
def test_a_run_folder_is_a_run(tmp_path, name):
    (tmp_path / "x" / name).parent.mkdir(parents=True)
    (tmp_path / "x" / name).touch()
    with pytest.raises(ConfigError, match=rf"x holds something else \({name.split('/')[0]}\).*choose a new folder"):
        check_output(tmp_path / "x", ["config.json"])


@case("`train --save-dir runs/a > runs/a/train.log`, a job's script in the folder", "trained there")
def test_logs_are_welcome(tmp_path):
    for name in ("train.log", "slurm-17.out", "job.sh", ".git"):
        (tmp_path / name).touch()
    check_output(tmp_path, ["config.json"])
    (tmp_path / "config.json").touch()
    (tmp_path / "1.jpg").touch()
    check_output(tmp_path, ["config.json"])


@case("`data pack faces packed` beside a folder `packed.part` of somebody", "an error; untouched")
def test_a_part_of_somebody(here, capsys):
    (here / "packed.part").mkdir()
    (here / "packed.part" / "images.uint8").write_bytes(b"mine")
    code, text = answer("data pack faces packed --num-workers 0", capsys)
    assert code == 2 and "packed.part holds something else (images.uint8)" in text
    assert (here / "packed.part" / "images.uint8").read_bytes() == b"mine"


@case("`convert --out photo.jpg`, `experiments --docs photo.jpg`", "an error; the file is there")
def test_files_of_another_kind(here, capsys):
    before = (here / "photos" / "1.jpg").read_bytes()
    (here / "a.pth").write_bytes(b"x")
    for command in ("convert dinov2 --src a.pth --out photos/1.jpg", "experiments --docs photos/1.jpg"):
        code, text = answer(command, capsys)
        assert code == 2 and "photos/1.jpg exists and is no " in text
    assert (here / "photos" / "1.jpg").read_bytes() == before


@case("`data build lfw release data` beside a `data/lfw.bin` that was downloaded", "an error; the file is there")
def test_a_benchmark_is_not_replaced(here, capsys):
    pytest.importorskip("cv2")
    (here / "release" / "A_B").mkdir(parents=True)
    (here / "release" / "A_B" / "A_B_0001.jpg").write_bytes((here / "photos" / "1.jpg").read_bytes())
    (here / "release" / "pairs.txt").write_text("10\t1\n" + "A_B\t1\t1\nA_B\t1\tA_B\t1\n" * 10)
    (here / "lfw.bin").write_bytes(b"mine")
    (here / "points.csv").write_text(POINTS)
    command = "data build lfw release . --pairs release/pairs.txt --landmarks points.csv --num-workers 0"
    code, text = answer(command, capsys)
    assert code == 2 and "lfw.bin is there already" in text and (here / "lfw.bin").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        pytest.param(
            "align photos c.csv", "c.csv is a file", marks=case("`align photos c.csv`", "it is a file, no folder")
        ),
        pytest.param(
            "train --exp demo --save-dir c.csv/x", "c.csv is a file", marks=case("`--save-dir FILE/x`", "the same")
        ),
        pytest.param("train --exp demo --save-dir lost/x", "lost is a link to nothing"),
        pytest.param("data pack faces c.csv/x", "c.csv: "),
        pytest.param("embed photos c.csv/x --no-align", "c.csv"),
    ],
)
def test_a_file_in_place_of_a_folder(here, tiny_run, monkeypatch, capsys, command, says):
    pytest.importorskip("cv2")
    (here / "c.csv").write_text(POINTS)
    (here / "lost").symlink_to("nowhere")
    command += " --landmarks c.csv" if command.startswith("align") else ""
    command += f" --checkpoint {tiny_run}" if command.startswith("embed") else ""
    code, text = answer(command, capsys)
    assert code == 2 and says in text and "Errno" not in text, text


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc here")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(
            "data pack faces /proc/x/y", marks=case("an output below `/proc`", "no folder can be created there")
        ),
        "align photos /proc/x --landmarks c.csv",
    ],
)
def test_where_nothing_can_be_created(here, capsys, command):
    pytest.importorskip("cv2")
    (here / "c.csv").write_text(POINTS)
    code, text = answer(command, capsys)
    assert code == 2 and "/proc" in text and "choose another" in text and "Errno" not in text, text


@case("a read-only folder as output, and `--resume` of a run on a read-only disk", "an error before anything is read")
def test_read_only_places(here, monkeypatch, capsys):
    for path in ("new", "runs/a"):
        (here / "runs" / "a").mkdir(parents=True, exist_ok=True)
        (here / "runs" / "a" / "config.json").write_text('{"exp": "demo"}')
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        code, text = answer(f"train --exp demo --save-dir {path} --resume auto", capsys)
        assert code == 2 and "cannot be written to; choose another folder, or copy" in text
