"""What could execute a file is not called, anywhere in the source, but for the one place that may."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("vitface", "weights", "kernels", "benchmarks", "docs", ".")
    for path in sorted(ROOT.glob("*.py" if folder == "." else f"{folder}/**/*.py"))
]
BANNED = {
    "eval", "exec", "__import__", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "shelve.open", "dill.load", "dill.loads", "joblib.load", "cloudpickle.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "torch.load", "torch.jit.load", "torch.hub.load",
    "torch.package.PackageImporter", "shutil.unpack_archive",
}  # fmt: skip
BANNED_METHODS = {"extractall", "extract"}  # of archives
# the one place that may, and what keeps it safe: weights_only, and a published SHA-256
ALLOWED = {("weights/conversion.py", "torch.load"), ("weights/conversion.py", "torch.jit.load")}


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def aliases(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: `from pickle import loads as l` makes l pickle.loads."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {item.asname: item.name for item in node.names if item.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {item.asname or item.name: f"{node.module}.{item.name}" for item in node.names}
    return names


def violations(source: str) -> list[str]:
    """The banned things that a source file names, called or not."""
    tree, found = ast.parse(source), []
    known = aliases(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, *rest = name_of(node).split(".")
            full = ".".join([known.get(first, first), *rest])
            if full in BANNED or (isinstance(node, ast.Attribute) and node.attr in BANNED_METHODS):
                found.append(full if full in BANNED else node.attr)
        if isinstance(node, ast.Call):
            words = {word.arg: word.value for word in node.keywords}
            for word in ("allow_pickle", "shell", "trust_remote_code"):
                if word in words and getattr(words[word], "value", True) is not False:
                    found.append(word)
    return found


def test_nothing_in_the_source_executes_a_file():
    assert len(SOURCES) > 40
    for path in SOURCES:
        file = str(path.relative_to(ROOT))
        assert {(file, name) for name in violations(path.read_text())} <= ALLOWED, file


def test_the_one_place_that_may_says_weights_only():
    tree = ast.parse((ROOT / "weights" / "conversion.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and name_of(node.func) == "torch.load"]
    assert len(calls) == 1
    assert any(word.arg == "weights_only" and getattr(word.value, "value", None) is True for word in calls[0].keywords)


PLANTED = {
    "pickle.loads": "import pickle\npickle.loads(b'')",
    "pickle.load": "from pickle import load as read\nread(f)",
    "pickle.Unpickler": "import pickle as p\nclass U(p.Unpickler): pass",
    "allow_pickle": "import numpy as np\nnp.load('x', allow_pickle=True)",
    "yaml.load": "import yaml\nyaml.load(t)",
    "eval": "eval('1')",
    "exec": "f = exec",
    "shell": "import subprocess\nsubprocess.run('ls', shell=True)",
    "os.system": "from os import system\nsystem('ls')",
    "extractall": "tarfile.open('x').extractall()",
    "torch.load": "import torch\ntorch.load('x', weights_only=True)",
    "torch.jit.load": "from torch import jit\njit.load('x')",
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_ban_finds_what_is_planted(name):
    assert name in violations(PLANTED[name])


def test_the_ban_lets_ordinary_code_pass():
    assert violations("import re, numpy as np\nre.compile('x')\nnp.load('x')\nmodel.eval()\nx.load()") == []
