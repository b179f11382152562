"""What could execute a file is not called anywhere in the source: ruff's rules find it, and these tests plant it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import optional

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for folder in ("vitface", "weights", "kernels", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")
]
PLANTED = {
    "import pickle\npickle.loads(b'')": "S301",
    "from pickle import load as read\nread(f)": "S301",
    "import pickle as p\nclass U(p.Unpickler): pass": "TID251",
    "import marshal\nmarshal.loads(b'')": "S302",
    "import shelve": "TID251",
    "import yaml\nyaml.load(t)": "S506",
    "import joblib": "TID251",
    "eval('1')": "S307",
    "exec('1')": "S102",
    "import subprocess\nsubprocess.run('ls', shell=True)": "S602",
    "from os import system\nsystem('ls')": "S605",
    "import tarfile": "TID251",
    "from shutil import unpack_archive": "TID251",
    "import torch\ntorch.load('x', weights_only=True)": "TID251",
    "from torch import jit\njit.load('x')": "TID251",
    "import torch\ntorch.hub.load('x', 'y')": "TID251",
    "import torch\ntorch._private()": "SLF001",
}
# three keywords that ruff has no rule for
EXECUTING = re.compile(r"(allow_pickle|trust_remote_code)\s*=(?!\s*False)|weights_only\s*=(?!\s*True)")


def found(source: str) -> str:
    """What ruff finds in a file of the package with that source."""
    optional("ruff")
    options = "--output-format=concise --stdin-filename vitface/x.py -"
    command = [sys.executable, "-m", "ruff", "check", *options.split()]
    return subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True).stdout


@pytest.mark.parametrize("source", PLANTED)
def test_ruff_finds_what_is_planted(source):
    assert f": {PLANTED[source]} " in found(source + "\n")


def test_ruff_lets_ordinary_code_pass():
    assert "All checks passed" in found('import re\n\nimport numpy as np\n\nre.compile("x")\nnp.load("x")\n')


def test_no_keyword_lets_a_library_execute_a_file():
    for keyword, safe in (("allow_pickle", False), ("trust_remote_code", False), ("weights_only", True)):
        assert EXECUTING.search(f"load(f, {keyword}={not safe})") and not EXECUTING.search(f"load(f, {keyword}={safe})")
    assert len(SOURCES) > 40
    assert [path for path in SOURCES if EXECUTING.search(path.read_text(encoding="utf-8"))] == []
