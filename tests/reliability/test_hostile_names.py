"""Names of files and folders that would steer a terminal: each command prints them, escaped."""

import io
import json
import sys
import unicodedata
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from vitface.__main__ import main
from vitface.data.progress import Progress
from vitface.errors import exit_code

TOP = "a\x1b[2J\r\tb\u202ec\x07"  # as a user names it
EVIL = "a\x1b[2J\r\tb\n\u202ec\x07"
LANDMARKS = "file,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5\nnobody.jpg,38,51,73,51,56,71,41,92,70,92\n"
COMMANDS = {
    "data check": "data check TOP --num-workers 0",
    "data pack": "data pack TOP packed --num-workers 0",
    "data pack, many": "data pack TOP/people TOP/packed --num-workers 0",
    "data show": "data show TOP/none --out s.png",
    "data draw": "data draw TOP",
    "data index": "data index TOP",
    "data build": "data build lfw TOP out --landmarks points.csv",
    "align": "align TOP/people out --landmarks TOP/points.csv --num-workers 0",
    "align, none": "align TOP/people out --landmarks points.csv --num-workers 0",
    "embed": "embed TOP/people TOP/gallery --no-align --num-workers 0 --checkpoint RUN",
    "search": "search gallery TOP/people/EVIL/1.jpg --checkpoint RUN --no-align",
    "search, nobody": "search TOP TOP/1.jpg --checkpoint RUN --no-align",
    "cluster": "cluster gallery --threshold -1",
    "verify": "verify TOP/people/EVIL/1.jpg TOP/people/EVIL/2.jpg --checkpoint RUN --no-align --threshold 0",
    "verify, damaged": "verify TOP/people/EVIL/bad.jpg TOP/1.jpg --checkpoint RUN",
    "explain": "explain TOP/people/EVIL/1.jpg -o TOP/out.png --no-align --checkpoint RUN",
    "evaluate": "evaluate --checkpoint RUN --bench lfw --data-dir TOP",
    "evaluate, no run": "evaluate --checkpoint TOP --bench lfw",
    "train": "train --exp demo --train-data TOP/none --save-dir TOP/run",
    "train, elsewhere": "train --exp demo --save-dir TOP",
    "experiments": "experiments --runs TOP",
    "convert": "convert dinov2 --src TOP/points.csv",
    "info": "info TOP",
    "export": "export TOP --format merged --out TOP/out",
    "import-peft": "import-peft TOP --into RUN --out out",
    "publish": "publish TOP --repo me/x",
    "an unknown flag": "align --TOP a b",
    "an unknown argument": "align a b TOP",
}


@pytest.fixture
def evil(tmp_path, monkeypatch, tiny_run):
    """A folder, people and photos of that name; a gallery of them; and the tiny run."""
    monkeypatch.chdir(tmp_path)
    people = tmp_path / TOP / "people"
    for person in (EVIL, f"x{EVIL}"):
        (people / person).mkdir(parents=True)
        for name in ("1.jpg", "2.jpg"):
            Image.fromarray(np.full((112, 112, 3), 99, np.uint8)).save(people / person / name)
    (people / EVIL / f"{EVIL}.jpg").write_bytes((people / EVIL / "1.jpg").read_bytes())
    (people / EVIL / f"bad{EVIL}.jpg").write_bytes(b"\xff\xd8\xff\x1b]0;x\x07")
    (people / EVIL / "bad.jpg").write_bytes(b"\x1b[2J")
    (people / f"{EVIL}.heic_large").touch()
    (people / f"{EVIL}.cr2").touch()
    for folder in (tmp_path, tmp_path / TOP):
        (folder / "points.csv").write_text(LANDMARKS)
    with open(tmp_path / TOP / "points.csv", "a", newline="") as file:
        file.write(f'"{EVIL}","1",2,3,4,5,6,7,8,9,{EVIL!r}\n')
    embed = ["embed", str(people), "gallery", "--no-align", "--num-workers", "0", "--checkpoint", str(tiny_run)]
    assert main(embed) == 1
    return tiny_run


def steers(text):
    """The characters that move the cursor or turn the writing, and lines that the end of a name begins."""
    marks = [character for character in text if unicodedata.category(character) in ("Cc", "Cf") and character != "\n"]
    return marks + [line for line in text.split("\n") if line.startswith("\\u202ec")]


@pytest.mark.parametrize("name", COMMANDS)
def test_names_do_not_steer_the_terminal(evil, capfd, name):
    pytest.importorskip("cv2")
    capfd.readouterr()
    words = [
        word.replace("TOP", TOP).replace("EVIL", EVIL).replace("RUN", str(evil)) for word in COMMANDS[name].split()
    ]
    with suppress(SystemExit):
        main(words)
    streams = capfd.readouterr()
    said = streams.out + streams.err
    assert said and not steers(said), said
    assert "x1b" in said or name in ("verify", "evaluate", "experiments"), said


def test_what_other_libraries_print_is_escaped_too(capfd):
    def act():
        print(EVIL)
        print(json.dumps([EVIL]))
        sys.stderr.writelines([EVIL])

    stdout, stderr = sys.stdout, sys.stderr
    assert exit_code(act) == 0 and (sys.stdout, sys.stderr) == (stdout, stderr)
    streams = capfd.readouterr()
    escaped = r"a\x1b[2J\x0d\x09b" + "\n" + r"\u202ec\x07"
    assert streams.err == escaped and streams.out == f"{escaped}\n{json.dumps([EVIL])}\n"


def test_a_bar_still_moves_the_cursor(monkeypatch):
    """It is written to the stream itself, and lines that are printed meanwhile clear it."""
    terminal = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True)
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)

    def act():
        with Progress(total=2, desc="work", mininterval=0) as bar:
            bar.update(1)
            Progress.write("a line")

    assert exit_code(act) == 0
    written = terminal.buffer.getvalue().decode()
    assert "\rwork:  50%" in written and "\\x0d" not in written
    assert written[: written.index("a line")].endswith("\r")
