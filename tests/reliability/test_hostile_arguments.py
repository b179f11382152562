"""Every flag of every command at its extremes: an error of one line, or work that is as usual; never a traceback."""

import argparse
import itertools
import json
import os
import shutil

import pytest
import torch
from PIL import Image

from vitface.__main__ import COMMANDS, load_command, main
from vitface.config import ConfigError, TrainConfig
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.evaluation.benchmarks import Evaluation
from vitface.gallery.gallery import Gallery

NUMBERS = ["-1", "0", "1e308", "nan", "-inf", "10000000000", "1" + "0" * 400, "1" * 5000, "1.5", "0x10", "", "٣", "1_0"]
PATHS = ["", "\0", "folder", "file", "link-to-nothing", "/dev/null", "/proc/x", "x" * 300, "x/" * 3000, "pipe", "a\nb"]
BASE = {  # words with which a command has everything it needs; heavy work is replaced
    "train": "--dry-run",
    "evaluate": "--bench synthetic --backbone vit_nano",
    "calibrate": "--bench lfw --backbone vit_nano",
    "golden": "dinov2",
    "study": "tiny",
    "experiments": "",
    "data pack": "faces packed --num-workers 0",
    "data index": "faces",
    "data check": "faces --num-workers 0",
    "data build": "lfw faces out --landmarks file --num-workers 0",
    "data show": "faces --out sheet.png --count 1 --epochs 1 --image-size 16",
    "data draw": "drawn --people 1 --images 1",
    "align": "faces aligned --landmarks file --num-workers 0",
    "verify": "faces/a/0.png faces/a/1.png",
    "embed": "faces people --num-workers 0",
    "search": "gallery faces/a/0.png",
    "cluster": "gallery --threshold 0.5",
    "explain": "faces/a/0.png -o out.png",
    "demo": "runs/tiny --no-browser",
    "backbones": "",
    "fetch": "yunet",
    "convert": "vit_nano --src file --out out.safetensors",
    "info": "",
    "export": "runs/tiny --format merged --out merged",
    "import-peft": "folder --backbone vit_nano --out imported",
    "publish": "runs/tiny --repo me/x --data faces",
}


def flags():
    """(command, its action) of everything that takes a value of a user's choice."""

    def walk(name, parser):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, inner in action.choices.items():
                    yield from walk(f"{name} {word}", inner)
            elif action.nargs != 0 and not action.choices:
                yield name, action

    return [found for command in COMMANDS for found in walk(command, load_command(command)[1])]


FLAGS = flags()
OF_NUMBERS = [(name, action) for name, action in FLAGS if "number" in getattr(action.type, "__qualname__", "")]
OF_TEXT = [(name, action) for name, action in FLAGS if (name, action) not in OF_NUMBERS]


@pytest.fixture
def place(tiny_run, tmp_path, monkeypatch):
    """A folder with a run, photos, a gallery; nothing is trained, fetched, uploaded or evaluated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    for person, number in itertools.product("ab", range(2)):
        (tmp_path / "faces" / person).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (112, 112), (number * 90, 40, 80)).save(tmp_path / "faces" / person / f"{number}.png")
    gallery = Gallery(8)
    gallery.add(["anna", "bob"], torch.eye(8)[:2])
    gallery.save(tmp_path / "gallery")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("file,x1\n")
    (tmp_path / "link-to-nothing").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("vitface.training.run.run", lambda config: None)
    monkeypatch.setattr(
        "vitface.study.grid.run_study", lambda base, *rest: (tmp_path / "studies" / "tiny").mkdir(parents=True)
    )
    monkeypatch.setattr("vitface.commands.evaluate.evaluate_model", lambda *arguments: 0)
    monkeypatch.setattr("vitface.evaluation.benchmarks.evaluate_all", lambda *rest: Evaluation({}, [], []))
    monkeypatch.setattr("vitface.commands.models.fetch.run", lambda arguments: 0)
    monkeypatch.setattr("vitface.exchange.site.site_files", lambda *rest: {})
    monkeypatch.setattr("vitface.commands.photos.demo.DemoServer.serve_forever", lambda server: None)
    return tmp_path


def words_for(name, action, value):
    """The command with this value of one flag, which replaces the one that it has in BASE."""
    words = BASE[name].split()
    if action.option_strings:
        given = next((flag for flag in action.option_strings if flag in words), None)
        if given:
            del words[words.index(given) : words.index(given) + 2]
        if action.dest == "checkpoint" and "--backbone" in words:
            words = words[: words.index("--backbone")]
        return [*name.split(), *words, f"{action.option_strings[-1]}={value}"]
    positional = [other for other in load_actions(name) if not other.option_strings]
    index = positional.index(next(other for other in positional if other.dest == action.dest))
    words[index : index + 1] = [value]
    return [*name.split(), *words]


def load_actions(name):
    return [action for other, action in FLAGS if other == name] if name != "study" else []


def run_all(cases, capsys):
    """Runs the commands; each ends with a code, and with a message if it is 2."""
    codes = []
    for words in cases:
        try:
            codes.append(main(words))
        except SystemExit as exit:
            codes.append(exit.code)
        except BaseException as error:
            pytest.fail(f"{[word[:50] for word in words]}: {type(error).__name__}: {str(error)[:200]}")
        printed = capsys.readouterr()
        assert codes[-1] in (0, 1, 2) and "Traceback" not in printed.err
        assert codes[-1] != 2 or "error: " in printed.err, words
    return codes


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in OF_NUMBERS))
def test_numbers(place, capsys, name):
    cases = [words_for(name, action, value) for of, action in OF_NUMBERS if of == name for value in NUMBERS]
    assert 2 in run_all(cases, capsys)


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in OF_TEXT))
def test_paths_and_texts(place, capsys, name):
    for of, action in OF_TEXT:
        for value in PATHS if of == name else ():
            if value == "pipe" and action.dest in ("out", "output", "json"):
                continue  # one may write there, and waits for whoever reads
            run_all([words_for(name, action, value)], capsys)
            for made in ("packed", "people", "aligned", "merged", "imported", "drawn", "published", "studies"):
                shutil.rmtree(place / made, ignore_errors=True)


def test_a_plain_call_works(place, capsys):
    """The words of BASE are whole, so that the errors above are those of the values."""
    assert run_all([["data", "show", *BASE["data show"].split()], ["train", "--dry-run"]], capsys) == [0, 0]
    assert run_all([["search", *BASE["search"].split()], ["cluster", *BASE["cluster"].split()]], capsys)[0] in (0, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data show faces --seed -1", "--seed: must be at least 0"),
        ("data show faces --image-size 100000", "--image-size: must be at least 1 and at most 1024"),
        ("data show faces --epochs 100000 --image-size 1024", "lower --count, --epochs or --image-size"),
        ("data draw out --people 10000000000", "more than 1,000,000 photos"),
        ("evaluate --backbone vit_nano --bench synthetic --image-size 0", "--image-size: must be at least 1"),
        ("evaluate --backbone vit_nano --bench synthetic --image-size 1000000000", "and at most 1024"),
        ("import-peft folder --backbone vit_nano --out o --image-size 1000000000", "and at most 1024"),
        ("verify A B --device hpu", "--device hpu"),
        ("cluster gallery --threshold 0.5 --out=", "an empty text"),
        ("verify A B --threshold nan", "from -1 to 1"),
        ("train --lr 1e308", "--lr: must be from"),
        ("train --epochs 1" + "0" * 40, "--epochs: must be from"),
        ("train --margin nan", "--margin must be at least 0"),
        ("train --lora-alpha 1e300", "--lora-alpha: must be from"),
        ("evaluate --bench synthetic --json folder", "folder is a folder"),
    ],
)
def test_what_is_said(place, capsys, words, message):
    faces = {"A": "faces/a/0.png", "B": "faces/a/1.png"}
    try:
        code = main([faces.get(word, word) for word in words.split(" ")])
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr().err
    assert code == 2 and message in printed and len(printed) < 1000


def test_numbers_in_python():
    for change in ({"lora_alpha": 1e300}, {"gate_temperature": 1e-320}, {"epochs": 0}, {"lr": float("nan")}):
        with pytest.raises(ConfigError, match="must be"):
            TrainConfig(**change)
    assert len(SyntheticSamples(2, 3)) == 6 and json.dumps({}) == "{}"
