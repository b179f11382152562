"""What the documents tell a reader to type: every command is one that exists, and marked blocks run, word for word.

A block after `<!-- run by tests/test_docs.py -->` is executed here, in the order of its page and in one folder; one
after `<!-- run by tests/test_docs.py, slow -->` under `-m slow`.
Commands outside such blocks need a network, a GPU, data or minutes; their flags are parsed.
"""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import vitface
from vitface.__main__ import main
from vitface.data.images import read_image

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
SCRIPTS = ("train.py", "evaluate.py")


def command_lines(text: str) -> list[str]:
    """The lines of indented blocks that call Python or vitface, comments left out."""
    lines = re.findall(r"^    ((?:python|vitface) .*)$", text, re.MULTILINE)
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


def marked_blocks(text: str, test: str) -> list[str]:
    """The blocks after the mark of a test: indented lines, or a fence of Python."""
    blocks = [part.lstrip("\n") for part in text.split(f"<!-- run by tests/{test} -->")[1:]]
    fenced = re.compile(r"```python\n(.*?)```", re.DOTALL)
    return [fenced.match(b)[1] if b.startswith("```") else re.match(r"(?:    .*\n|\n)+", b)[0] for b in blocks]


def run_line(line: str) -> int:
    """The exit code of a documented command, run in this process."""
    program, *words = shlex.split(line)
    return main(words if program == "vitface" else [Path(words[0]).stem, *words[1:]])


class Parsed(Exception):
    """The parser took the flags."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_documented_command_exists(page, monkeypatch):
    """Each is given to its own parser, which stops it there."""
    import argparse

    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for line in command_lines(page.read_text()):
        words = shlex.split(line)
        known = words[1] in SCRIPTS or words[0] == "vitface"
        if known and "..." not in words:
            with pytest.raises(Parsed):
                run_line(line)


def test_the_check_finds_a_flag_that_does_not_exist():
    with pytest.raises(SystemExit):
        run_line("python train.py --no-such-flag")
    assert command_lines("    vitface verify a b   # same?\n  python no\n") == ["vitface verify a b"]


def test_links_between_documents_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(((?!http)[^)#]+)\)", page.read_text()):
            found = page.parent / target
            assert found.exists() or found.with_suffix(".md").exists(), f"{page.name}: {target}"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands, python = marked_blocks((ROOT / "docs" / "quickstart.md").read_text(), "test_docs.py")
    codes = {line: run_line(line) for line in command_lines(commands)}
    printed = capsys.readouterr().out
    assert len(codes) == 8
    for line, code in codes.items():
        assert code == 0 or (" verify " in line and code == 1), line
    assert "faces/person-01/001.jpg: cosine and name" in printed and "   1.0000  person-01/001.jpg" in printed
    assert len((tmp_path / "people.csv").read_text().splitlines()) == 1 + 8 * 24
    assert read_image(tmp_path / "out.png").std() > 10
    names: dict = {}
    exec(python, names)
    model, embeddings = names["model"], names["embeddings"]
    assert embeddings.shape == (3, 128) and names["same"] == pytest.approx(embeddings[0] @ embeddings[1])
    assert names["verdict"].score == pytest.approx(float(names["same"]), abs=1e-2)  # bf16, other company in the batch
    assert len(names["everybody"]) == 8 * 24 and vitface.Gallery.load("gallery").names == ["anna", "anna", "ben"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].split()[0] == "anna" and float(shown[2].split()[1]) == pytest.approx(1, abs=1e-5)
    rows = model.embed([tmp_path / "faces" / name for name in names["everybody"].names[:5]])
    np.testing.assert_allclose(np.sum(rows * names["everybody"].embeddings[:5], axis=1), 1, atol=1e-2)


@pytest.mark.slow
def test_the_demo_of_the_quickstart_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = marked_blocks((ROOT / "docs" / "quickstart.md").read_text(), "test_docs.py, slow")
    lines = command_lines(block)
    assert len(lines) == 2 and [run_line(line) for line in lines] == [0, 0]
    assert "<h2>Where CLS looks</h2>" in (tmp_path / "report.html").read_text()
