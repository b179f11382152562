"""The rules of the house: imports without circles, small functions, files and folders, one name for one thing.

A package is a dictionary here, {path: source}, so that each rule is also given one that breaks it.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("vitface", "kernels", "weights")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
}
DEFINED_ONCE = ("auc", "TEMPLATE", "BENCHMARKS")


def module_name(path: str) -> str:
    """kernels/ and weights/ are vitface.kernels and vitface.weights to Python."""
    parts = PurePosixPath(path).with_suffix("").parts
    parts = parts if parts[0] == "vitface" else ("vitface", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node: ast.AST) -> Iterator[str]:
    """What a source imports at any depth, functions included, apart from `if TYPE_CHECKING:`; dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{'.' * child.level}{child.module or ''}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from imports(other)
        else:
            yield from imports(child)


def import_graph(package: dict[str, str]) -> dict[str, set[str]]:
    """module -> the modules of the package that it names in an import; a parent package only where it is named."""
    modules = {module_name(path): ast.parse(source) for path, source in package.items()}
    graph: dict[str, set[str]] = {}
    for name, tree in modules.items():
        found = set()
        for imported in imports(tree):
            parent = imported.rpartition(".")[0]
            found |= {imported} if imported in modules else {parent} & set(modules)
        graph[name] = found
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def import_circles(package: dict[str, str]) -> list[str]:
    return circle(import_graph(package))


def room_circles(package: dict[str, str]) -> list[str]:
    """Two rooms, folders or files of vitface/, that import each other, though no two modules of theirs may."""
    rooms: dict[str, set[str]] = {}
    for module, imported in import_graph(package).items():
        room, others = _room(module), {_room(name) for name in imported}
        rooms.setdefault(room, set()).update(others - {room})
    return circle(rooms)


def _room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def relative_imports(package: dict[str, str]) -> list[str]:
    return [path for path, source in package.items() if any(name[0] == "." for name in imports(ast.parse(source)))]


def full_folders(package: dict[str, str]) -> list[str]:
    files = Counter(str(PurePosixPath(path).parent) for path in package)
    return [folder for folder, number in files.items() if number > 14]


def names_of_several_files(package: dict[str, str]) -> list[str]:
    names = Counter(PurePosixPath(path).name for path in package)
    return [name for name, number in names.items() if number > 1 and name != "__init__.py"]


def long_files(package: dict[str, str]) -> list[str]:
    return [path for path, source in package.items() if len(source.splitlines()) > 320]


def long_functions(package: dict[str, str]) -> list[str]:
    return [
        f"{path}:{node.name}"
        for path, source in package.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 40
    ]


def definitions(source: str) -> Iterator[str]:
    """The names that a module defines at its top level; what it imports is not among them."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def not_defined_once(package: dict[str, str]) -> list[str]:
    found = Counter(name for source in package.values() for name in definitions(source))
    return [name for name in DEFINED_ONCE if found[name] != 1]


def too_many_flags(package: dict[str, str]) -> list[str]:
    """TrainConfig's fields beyond the 50th; every field is a flag of train.py."""
    classes = [node for node in ast.parse(package["vitface/config.py"]).body if isinstance(node, ast.ClassDef)]
    (config,) = (node for node in classes if node.name == "TrainConfig")
    assert not config.bases
    return [ast.unparse(node.target) for node in config.body if isinstance(node, ast.AnnAssign)][50:]


RULES = [
    import_circles,
    room_circles,
    relative_imports,
    full_folders,
    names_of_several_files,
    long_files,
    long_functions,
    not_defined_once,
    too_many_flags,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_breaks_the_rule(rule):
    assert len(PACKAGE) > 100
    assert rule(PACKAGE) == []


def lines(number: int) -> str:
    return "    pass\n" * number


def fields(number: int) -> str:
    return "class TrainConfig:\n" + "".join(f"    field_{n}: int = 0\n" for n in range(number))


PLANTED = [
    (import_circles, {"vitface/a.py": "import vitface.b", "vitface/b.py": "from vitface import a"}, "vitface.a"),
    (
        import_circles,
        {
            "vitface/a.py": "def f():\n    from kernels import b\n    from vitface.kernels.b import g",
            "kernels/b.py": "if True:\n    import vitface.a as x",
        },
        "vitface.kernels.b",
    ),
    (
        import_circles,
        {"vitface/a.py": "from vitface import load", "vitface/__init__.py": "import vitface.a"},
        "vitface.a",
    ),
    (
        room_circles,
        {
            "vitface/c/a.py": "import vitface.d.a",
            "vitface/c/b.py": "",
            "vitface/d/a.py": "",
            "vitface/d/b.py": "from vitface.c.b import f",
        },
        "vitface.c",
    ),
    (relative_imports, {"vitface/c/a.py": "from . import b"}, "vitface/c/a.py"),
    (relative_imports, {"vitface/c/a.py": "from ..c.b import f"}, "vitface/c/a.py"),
    (full_folders, {f"vitface/c/a{n}.py": "" for n in range(15)}, "vitface/c"),
    (names_of_several_files, {"vitface/a.py": "", "weights/a.py": ""}, "a.py"),
    (long_files, {"vitface/a.py": "\n" * 321}, "vitface/a.py"),
    (long_functions, {"vitface/a.py": "class A:\n  async def f(x):\n" + lines(40)}, "vitface/a.py:f"),
    (long_functions, {"vitface/a.py": "def f(x):\n  def g():\n" + lines(40)}, "vitface/a.py:g"),
    (not_defined_once, {"vitface/a.py": "def auc(): pass\nTEMPLATE = 1", "vitface/b.py": "A, auc = 1, 2"}, "auc"),
    (not_defined_once, {"vitface/a.py": "from vitface.b import auc\nTEMPLATE: int = 1"}, "BENCHMARKS"),
    (too_many_flags, {"vitface/config.py": fields(51)}, "field_50"),
]


@pytest.mark.parametrize(("rule", "package", "found"), PLANTED)
def test_the_rule_finds_what_is_planted(rule, package, found):
    assert found in " ".join(rule(package)).split()


KEPT = [
    (
        import_circles,
        {
            "vitface/a.py": "import vitface.b\nimport torch.vitface",
            "vitface/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vitface.a",
        },
    ),
    (full_folders, {f"vitface/c/a{n}.py": "" for n in range(14)} | {"vitface/c/d/a.py": ""}),
    (names_of_several_files, {"vitface/a/__init__.py": "", "vitface/b/__init__.py": ""}),
    (long_files, {"vitface/a.py": "\n" * 320}),
    (long_functions, {"vitface/a.py": "@decorated\ndef f(x):\n" + lines(39)}),
    (too_many_flags, {"vitface/config.py": fields(50)}),
]


@pytest.mark.parametrize(("rule", "package"), KEPT)
def test_the_rule_lets_what_just_keeps_it_pass(rule, package):
    assert rule(package) == []


def test_the_files_that_pyproject_names_call_what_it_bans():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    banned = settings["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    named = [(call, file) for call, entry in banned.items() for file in re.findall(r"[\w/]+\.py", entry["msg"])]
    assert named and all(f"{call}(" in PACKAGE[file] for call, file in named)
