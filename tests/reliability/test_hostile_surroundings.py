"""Terminals, pipes, signals and users that are not as usual; and names that want to write on the terminal."""

import os
import signal
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitface
from vitface.__main__ import main
from vitface.errors import ConfigError, in_one_line, printable
from vitface.files import cache_home
from vitface.gallery.gallery import Gallery
from vitface.store.backbone import backbone_files
from vitface.training.runs.interrupt import stop_requests


@given(st.text())
def test_what_is_printed_moves_no_cursor(text):
    shown = printable(text)
    odd = {c for c in shown if unicodedata.category(c) in ("Cc", "Cs") or unicodedata.bidirectional(c) in BIDI}
    assert odd <= {"\n", "\t"} and not {"\n", "\t"} & set(in_one_line(text))
    shown.encode()


BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Anna Schmidt", "Anna Schmidt"),
        ("Zoë 王伟", "Zoë 王伟"),
        ("b\n   0.9999  Anna", r"b\n   0.9999  Anna".replace(r"\n", r"\x0a")),
        ("\x1b[2Jx\r", r"\x1b[2Jx\x0d"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        (os.fsdecode(b"Jos\xe9"), r"Jos\xe9"),
        ("\ud800", r"\ud800"),
    ],
)
def test_names_are_shown_in_one_line(name, shown):
    assert in_one_line(name) == shown


def test_a_name_in_a_gallery_is_no_line_and_no_formula(tmp_path, monkeypatch, capsys):
    """In `cluster`, which prints names of a gallery that may come from a stranger."""
    gallery = Gallery(2)
    gallery.add(["=cmd|' /C calc'!A0", "b\n     1      2 images  Anna"], torch.tensor([[1.0, 0.0], [1.0, 0.01]]))
    gallery.save(tmp_path / "people")
    assert main(["cluster", str(tmp_path / "people"), "--threshold", "0.5", "--out", str(tmp_path / "out.csv")]) == 0
    printed = capsys.readouterr().out
    assert r"b\x0a     1" in printed and "\n     1      2 images  Anna" not in printed
    assert (tmp_path / "out.csv").read_text().splitlines()[1].lstrip('"').startswith("'=cmd")


def command(*words, env=(), **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(vitface.__file__).parents[1]), **dict(env)}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, timeout=100, **options)


def test_a_terminal_that_lacks_a_character_gets_its_number():
    text = "from vitface.errors import exit_code; exit_code(lambda: print('Zoë ± 王'))"
    done = command("-c", text, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout == b"Zo\\xeb \\xb1 \\u738b\n" and not done.stderr


def test_nobody_reads_any_more():
    """As in `vitface --help | true`."""
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(Path(vitface.__file__).parents[1])}
    words = [sys.executable, "-m", "vitface", "--help"]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, env=environment)
    os.close(write)
    assert done.returncode == 141 and not done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_is_closed(closed):
    done = command("-c", f"import os; os.system('{sys.executable} -m vitface --version {closed}; echo $? >&2')")
    assert done.stderr.split() == [b"0"]


@pytest.mark.parametrize("nohup", [False, True])
def test_a_lost_terminal_stops_a_run_as_sigterm_does(nohup):
    handler = signal.SIG_IGN if nohup else lambda *_: pytest.fail("as before")
    before = signal.signal(signal.SIGHUP, handler)  # these tests may run under nohup themselves
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.is_set() is not nohup
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_user_without_a_home(monkeypatch):
    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("VITFACE_HOME")
    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(ConfigError, match="set VITFACE_HOME"):
        cache_home()
    assert backbone_files("vit_nano")


def test_ctrl_c_while_a_command_is_imported(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitface.__main__.load_command", interrupted)
    assert main(["info", "runs/a"]) == 130
    assert capsys.readouterr().err == "stopped\n"
