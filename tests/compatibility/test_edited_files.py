"""Small files of a run that an editor, a cloud drive or a bad disk has changed."""

import dataclasses
import json

import pytest
from cases import case
from PIL import Image

from vitface.__main__ import main
from vitface.config import resolve
from vitface.errors import CheckpointError
from vitface.recogniser import load
from vitface.store.faces import open_checkpoint
from vitface.store.settings import read_config
from vitface.store.thresholds import THRESHOLDS_FILE

KIND = "Files that an editor saved"
BOM = b"\xef\xbb\xbf"


def as_notepad(path):
    """A byte order mark and the line ends of Windows."""
    path.write_bytes(BOM + path.read_bytes().replace(b"\n", b"\r\n"))


@case("`thresholds.json` with a byte order mark and CRLF", "read")
def test_thresholds_of_notepad(tiny_run):
    path = tiny_run / THRESHOLDS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    as_notepad(path)
    assert load(tiny_run).thresholds == {0.01: 0.2, 0.001: 0.6}


@case("`config.json` with a byte order mark and CRLF", "read, by `--resume` too")
def test_settings_of_notepad(tiny_run):
    settings = dataclasses.asdict(resolve({"exp": "demo"}))
    (tiny_run / "config.json").write_text(json.dumps(settings, indent=1))
    as_notepad(tiny_run / "config.json")
    assert read_config(tiny_run) == settings and open_checkpoint(tiny_run).settings == settings


@pytest.fixture
def photos(tmp_path):
    paths = [str(tmp_path / f"{colour}.png") for colour in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (112, 112), path.rpartition("/")[2][:-4]).save(path)
    return paths


DAMAGED = [
    pytest.param(THRESHOLDS_FILE, '{"model": ', marks=case("`thresholds.json` cut off", "`--threshold` works; a note")),
    pytest.param("config.json", "x", marks=case("`config.json` that is no JSON", "the model works; a note")),
    pytest.param("log.csv", "epoch,loss\n1", marks=case("`log.csv` cut off", "`info` shows the rest; a note")),
    pytest.param("log.csv", "epoch,loss\n", marks=case("`log.csv` with a header alone, or empty", "the same")),
    pytest.param("log.csv", "", id="an empty log.csv"),
    pytest.param("log.jsonl", "{}\nx\n{", marks=case("`log.jsonl` with a line that is no JSON", "`info` has a note")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), DAMAGED)
def test_what_a_command_does_not_need(tiny_run, photos, capsys, name, text):
    (tiny_run / name).write_text(text)
    assert main(["verify", *photos, "--checkpoint", str(tiny_run), "--threshold", "0.3", "--device", "cpu"]) in (0, 1)
    assert "cosine" in capsys.readouterr().out
    assert main(["info", str(tiny_run)]) == 0
    assert capsys.readouterr().err.count(f"note: {tiny_run / name} is damaged") == 1


@case("the same, then `verify` without `--threshold`", "no verdict, the file's name and what to do; exit code 2")
def test_thresholds_that_are_needed(tiny_run, photos, capsys):
    (tiny_run / THRESHOLDS_FILE).write_text("{")
    assert main(["verify", *photos, "--checkpoint", str(tiny_run), "--device", "cpu"]) == 2
    assert "put a copy back or delete it: without it, pass --threshold" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"thresholds\.json is damaged"):
        _ = open_checkpoint(tiny_run).calibration  # as for export and publish, which would pass it on


@case("`config.json` damaged, then `--resume`", "an error that says what resuming needs; exit code 2")
def test_settings_that_are_needed(tiny_run, capsys):
    (tiny_run / "config.json").write_text('{"epochs": "ten"}')
    assert main(["train", "--resume", str(tiny_run)]) == 2
    printed = capsys.readouterr().err
    assert "config.json is damaged (epochs cannot be ten); put a copy of it back" in printed
