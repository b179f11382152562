"""The tour of all commands over a set of any size, at a very small one and in one process."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

import vitface.__main__

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import scale

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.mark.slow
def test_the_tour(tmp_path, monkeypatch, capsys):
    seen = []

    def here(arguments, work, kill_at):
        monkeypatch.chdir(work)
        seen.append(" ".join(arguments))
        argv = " ".join(arguments).replace("--batch-size 64", "--batch-size 32").replace(" 512 ", " 64 ").split()
        code = vitface.__main__.main(argv)
        return {"seconds": 0.1 * len(arguments), "gigabytes": 0.5}, code

    monkeypatch.setattr(scale, "measure", here)
    monkeypatch.setattr(scale, "PER_PERSON", 12)
    monkeypatch.setattr(scale, "DRAWN_PEOPLE", 7)
    scale.main(["--images", "156", "--work", str(tmp_path / "tour")])
    out = capsys.readouterr().out
    assert "nothing grows faster than the data" in out
    (figures,) = json.loads(out.splitlines()[-1]).values()
    assert len(figures) == len(seen) == 12 and figures["data check"]["gigabytes"] == 0.5
    assert "156 images, 13 people" in out and (tmp_path / "tour" / "156" / "people.csv").is_file()


def test_a_command_is_killed_when_it_has_packed_enough(tmp_path, monkeypatch):
    (tmp_path / ".partial-packed").mkdir()
    (tmp_path / ".partial-packed" / "images.uint8").write_bytes(bytes(10))
    assert scale.packed_bytes(tmp_path) == 10
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(scale.sys, "executable", str(sleeper))
    figures, code = scale.measure([], tmp_path, kill_at=1)
    assert code == -signal.SIGKILL and figures["seconds"] > 0
    assert scale.resident(os.getpid()) > 1 << 20


def test_growth_is_named():
    small = {"a": {"seconds": 10.0, "gigabytes": 1.0}, "b": {"seconds": 1.0, "gigabytes": 1.0}}
    large = {"a": {"seconds": 400.0, "gigabytes": 1.5}, "b": {"seconds": 11.0, "gigabytes": 12.0}}
    lines = [*scale.grows({1000: small, 10_000: large})]
    assert lines == [
        "a: 40.0 times the seconds, for 10.0 times the images (10,000)",
        "b: 12.0 times the memory, for 10.0 times the images (10,000)",
    ]
