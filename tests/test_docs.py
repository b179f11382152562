"""What the documents tell a reader to type: every command is one that exists, and marked blocks run, word for word.

A block after `<!-- run by tests/test_docs.py -->` is executed here, in the order of its page and in one folder; one
after `<!-- run by tests/test_docs.py, slow -->` under `-m slow`.
Commands outside such blocks need a network, a GPU, data or minutes; their flags are parsed.
"""

import itertools
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import tiny_recogniser
from PIL import Image
from test_house import PACKAGE, import_graph

import vitface
from vitface.__main__ import main
from vitface.data.faces.alignment import TEMPLATE, align_face
from vitface.data.faces.detect import Face
from vitface.data.images import read_image
from vitface.evaluation.benchmarks import Evaluation
from vitface.evaluation.protocol import verify

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*/README.md"))]
SCRIPTS = ("train.py", "evaluate.py")
sys.path.insert(0, str(ROOT / "docs" / "img"))


def command_lines(text: str) -> list[str]:
    """The commands in indented blocks that call Python or vitface, in parts at `&&`, comments left out."""
    lines = re.findall(r"^    ((?:pip|python|vitface) .*)$", text, re.MULTILINE)
    commands = [shlex.join(shlex.split(part, comments=True)) for line in lines for part in line.split(" && ")]
    return [command for command in commands if not command.startswith(("pip ", "hf "))]


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
    text = "    vitface verify a b   # same?\n  python no\n    pip install x && python train.py --exp demo\n"
    assert command_lines(text) == ["vitface verify a b", "python train.py --exp demo"]


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
        assert code == 0, line
    assert (
        "faces/person-01/001.jpg: cosine and person" in printed
        and "  1.0000  person-01  (person-01/001.jpg)" in printed
    )
    assert len((tmp_path / "people.csv").read_text().splitlines()) == 1 + 8 * 36
    assert read_image(tmp_path / "out.png").std() > 10
    names: dict = {}
    exec(python, names)
    model, embeddings = names["model"], names["embeddings"]
    assert embeddings.shape == (3, 128) and names["same"] == pytest.approx(embeddings[0] @ embeddings[1])
    assert names["verdict"].score == pytest.approx(float(names["same"]), abs=1e-2)  # bf16, other company in the batch
    assert len(names["everybody"]) == 8 * 36 and vitface.Gallery.load("gallery").names == ["anna", "anna", "ben"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].split()[0] == "anna" and float(shown[2].split()[1]) == pytest.approx(1, abs=1e-5)
    rows = model.embed([tmp_path / "faces" / name for name in names["everybody"].names[:5]])
    np.testing.assert_allclose(np.sum(rows * names["everybody"].embeddings[:5], axis=1), 1, atol=1e-2)


@pytest.mark.slow
def test_the_three_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = marked_blocks((ROOT / "README.md").read_text(), "test_docs.py, slow")
    lines = command_lines(block)
    assert len(lines) == 4 and [run_line(line) for line in lines] == [0] * 4
    frozen, adapted = re.findall(r"^synthetic .*?(\d+\.\d+) ± ", capsys.readouterr().out, re.MULTILINE)[:2]
    assert float(adapted) >= float(frozen) + 10
    assert "<h2>Where CLS looks</h2>" in (tmp_path / "report.html").read_text()
    assert read_image(tmp_path / "out.png").std() > 10


def test_the_readme_counts_the_lines_of_the_core():
    """Its table and its sum; at most 1,500 lines are the core, and 90 the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\S+\.py)` \|", text, re.MULTILINE)
    counted = [(str(len((ROOT / file).read_text(encoding="utf-8").splitlines())), file) for _, file in rows]
    total = sum(int(lines) for lines, _ in counted)
    assert rows == counted and len(rows) == 10
    assert total <= 1500 and f"These ten files, {total:,} lines," in text
    assert len(text.splitlines()) <= 90


def test_a_room_imports_only_rooms_above_it():
    """In the order of the table of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    place = {name: i for i, cell in enumerate(rooms) for name in re.findall(r"`(?:vitface/)?(\w+)(?:/|\.py)`", cell)}
    assert {path.parent.name for path in (ROOT / "vitface").glob("*/__init__.py")} <= set(place)
    for module, imported in import_graph(PACKAGE).items():
        names = [[*name.split("."), ""][1] for name in (module, *imported)]
        for other in names[1:] if names[0] in place else ():
            assert place.get(other, 0) <= place[names[0]], f"{module} imports vitface.{other}"


def test_the_pictures_are_small_and_what_their_script_draws(monkeypatch):
    import make

    stored, model = ROOT / "docs" / "img" / "attention.png", tiny_recogniser(num_domains=3)
    drawn = make.attention_picture(model, model)
    with Image.open(stored) as image:
        assert (image.size, image.mode) == (drawn.size, drawn.mode)
    assert np.asarray(drawn.convert("RGB")).std() > 50
    assert all(path.stat().st_size < 150_000 for path in stored.parent.iterdir() if path.is_file())
    with Image.open(stored.parent / "page.png") as image:
        assert image.width == 1280 and image.height > 900  # with the answer
    monkeypatch.setattr(make, "PEOPLE", 2)
    issame = np.arange(400) % 2 == 0
    result = verify(np.random.default_rng(0).uniform(0, 2, 400) + ~issame, issame)
    monkeypatch.setattr(make, "evaluate_all", lambda *_: Evaluation({"synthetic": result}, [], []))
    texts = make.charts_picture(model, model), (stored.parent / "charts.svg").read_text(encoding="utf-8")
    curves, of_stored = (re.findall(r'<(poly\w+) class="(\w+)', text) for text in texts)
    assert curves == of_stored and sum(kind == "polyline" for kind, _ in curves) == 3 * 3 + 2


class FakeDetector:
    """Finds a face in the middle of a photo."""

    def detect(self, image):
        middle = np.array(image.shape[1::-1]) / 2
        points = middle + (TEMPLATE - 56) * 1.3
        return [Face(np.array([*points.min(axis=0), *np.ptp(points, axis=0)]), points, 0.9)]


def test_the_flow_is_drawn_from_the_model_in_two_languages(monkeypatch):
    import flow

    model = tiny_recogniser(num_domains=3, embedding_dim=32)
    monkeypatch.setattr(flow, "FaceDetector", FakeDetector)
    crops = [align_face(photo, FakeDetector().detect(photo)[0].landmarks) for photo in flow.photos()]
    scores = [model.verify(*pair).score for pair in itertools.pairwise(crops)]
    assert abs(scores[0] - scores[1]) > 1e-4
    model.thresholds = {0.01: sum(scores) / 2}
    drawn = flow.flow_pictures(model)
    kinds = re.findall(r'class="strong (\w+)', drawn[0])
    assert kinds == ["same" if score == max(scores) else "different" for score in scores]
    assert f">{scores[0]:.2f}, threshold" in drawn[0] and f">{scores[0]:.2f}, seuil".replace(".", ",") in drawn[1]
    widths = re.findall(r'class="k\d" x="[\d.]+" y="[\d.]+" width="([\d.]+)" height="18"', drawn[0])
    weights = np.reshape(widths, (3, 3)).astype(float) / 96
    np.testing.assert_allclose(weights, model.domain_weights(np.stack(crops)), atol=1e-3)
    for language, (name, text) in enumerate(zip(("flow.svg", "flow.fr.svg"), drawn, strict=True)):
        stored = (ROOT / "docs" / "img" / name).read_text(encoding="utf-8")
        for svg in (text, stored):
            ElementTree.fromstring(svg)  # noqa: S314, our own
            shown = svg.replace("&#39;", "'")
            words = [line for each in flow.WORDS.values() for line in each[language].split("\n") if "{" not in line]
            assert [line for line in words if line not in shown] == []
        assert len(re.findall("<image ", text)) == len(re.findall("<image ", stored)) == 3 * 4
