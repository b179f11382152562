"""Commands that vitface suggests, locks that somebody deletes, studies whose runs were trained again."""

import ast
import os
import re
import shlex
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_recogniser
from tiny import in_child, start

import vitface
from vitface.config import resolve
from vitface.errors import CheckpointError, command
from vitface.evaluation.benchmarks import Evaluation
from vitface.evaluation.protocol import verify
from vitface.evaluation.scores import SCORES
from vitface.lock import folder_lock
from vitface.study import grid

NAME = "it's $(touch pwn); `x` \n"


def test_a_suggested_command_is_words():
    assert shlex.split(command("info", NAME, Path("a b"), 3)) == ["vitface", "info", NAME, "a b", "3"]
    assert command("embed", "FOLDER", "people") == "vitface embed FOLDER people"


def test_every_suggested_command_is_quoted():
    """In the source no text puts a value into `vitface COMMAND ...` by itself."""
    package = Path(vitface.__file__).parent
    plain = set()
    for path in (*package.rglob("*.py"), *(package.parent / "weights").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                plain |= {found[0] for found in re.finditer(r"vitface [a-z][a-z-]* [^\n;,]*\{\}", text)}
    names = {"vitface fetch {}", "vitface evaluate --checkpoint RUN --bench {}", "vitface runs on cpu and cuda"}
    assert {text for text in plain if not text.startswith(tuple(names))} == set()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("deleted", [False, True])
def test_a_lock_that_is_deleted_still_locks(tmp_path, deleted):
    def second():
        with pytest.raises(CheckpointError, match="in use by another process"), folder_lock(tmp_path):
            pass

    with folder_lock(tmp_path):
        if deleted:
            (tmp_path / ".lock").unlink()
        assert in_child(second) == 0
        worker = start(lambda: (tmp_path / "started").touch() or time.sleep(60))
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
    with folder_lock(tmp_path):  # though the worker still runs
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_study_judges_a_run_that_was_trained_again(tmp_path, monkeypatch):
    judged = []
    same = np.arange(40) % 2 == 0
    result = verify(np.where(same, 0.5, 1.5) + 0.001 * np.arange(40), same)

    def evaluate(embed, names, folder):
        judged.append(embed)
        return Evaluation({"synthetic": result}, [], [])

    monkeypatch.setattr(grid, "evaluate_all", evaluate)
    for model in ("first", "first", "second", "second"):
        grid.judge(tmp_path / "cell", lambda: tiny_recogniser(), model, resolve({"exp": "demo"}), ["synthetic"])
    assert len(judged) == 2
    (tmp_path / "cell" / SCORES).write_bytes(b"torn")
    grid.judge(tmp_path / "cell", lambda: tiny_recogniser(), "second", resolve({"exp": "demo"}), ["synthetic"])
    assert len(judged) == 3
