"""Inputs that people had trouble with: each is a test here, marked with what was given and what comes of it.

    KIND = "RecordIO"                      # once per file

    @case("`property` of two lines", "read; the first line counts")
    def test_...

    @pytest.mark.parametrize("text", [pytest.param("1\n", marks=case("...", "..."))])

docs/compatibility.md is made of these marks: python tests/compatibility/cases.py > docs/compatibility.md
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

PAGE = """\
# Files, folders and machines as people have them

Each row is an input that a test in `tests/compatibility` builds, as small as it can be, and what vitface does with it.
Most come from public reports about programs for this work. Made from the tests: `python tests/compatibility/cases.py`.
"""


def case(given: str, outcome: str) -> pytest.MarkDecorator:
    """The mark of a test: what the user has, and what happens; each a phrase in Markdown."""
    return pytest.mark.case(given, outcome)


def cases_of(module: ModuleType) -> Iterator[tuple[str, str]]:
    """(given, outcome) of a file's tests, in the order of the file."""
    for name, function in vars(module).items():
        if not name.startswith("test_"):
            continue
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "case":
                yield mark.args
            elif mark.name == "parametrize":
                marks = (inner for value in mark.args[1] for inner in getattr(value, "marks", ()))
                yield from (inner.args for inner in marks if inner.name == "case")


def rows() -> dict[str, list[tuple[str, str]]]:
    """The cases by kind, in the order of the files."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        module = importlib.import_module(path.stem)
        if hasattr(module, "KIND"):
            found.setdefault(module.KIND, []).extend(cases_of(module))
    return found


def page() -> str:
    """docs/compatibility.md."""
    parts = [PAGE]
    for kind, cases in rows().items():
        parts.append(f"\n## {kind}\n\n| given | what happens |\n|---|---|\n")
        parts.extend(f"| {given} | {outcome} |\n" for given, outcome in cases)
    return "".join(parts)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    sys.stdout.write(page())
