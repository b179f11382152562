"""The package as users install it: in fresh environments; in the clone, beside it, and elsewhere."""

import sys
import tarfile  # noqa: TID251, of an archive made here
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from environments import OFFLINE, ROOT, copy_of_the_clone, environment, need_build_backend, other_pythons, run

from vitface.__main__ import COMMANDS
from vitface.version import __version__

WHERE = "import {0}; print({0}.__file__)"


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    need_build_backend()
    return copy_of_the_clone(tmp_path_factory.mktemp("holder"))


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=clone)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def from_wheel(clone, tmp_path_factory):
    """Python of an environment after `pip install .`"""
    python = environment(Path(sys.executable), tmp_path_factory.mktemp("wheel_env") / "venv", borrow=True)
    run(python, "-m", "pip", "install", *OFFLINE, ".", cwd=clone)
    return python


@pytest.fixture(scope="module")
def editable(clone, tmp_path_factory):
    """Python of an environment after `pip install -e .`"""
    python = environment(Path(sys.executable), tmp_path_factory.mktemp("editable_env") / "venv", borrow=True)
    run(python, "-m", "pip", "install", *OFFLINE, "-e", ".", cwd=clone)
    return python


def sources(folder, name):
    """The files of a folder of the clone, as the wheel names them."""
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".j2", ".md", ".typed")]
    return {f"{name}/{path.relative_to(ROOT / folder).as_posix()}" for path in files}


def test_the_wheel_has_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {name for name in names if not name.startswith(f"vitface-{__version__}.dist-info/")}
    code = sources("vitface", "vitface") | sources("kernels", "vitface/kernels") | sources("weights", "vitface/weights")
    assert len(code) > 100 and "vitface/py.typed" in code
    page = {f"vitface/exchange/web/{file.name}" for file in (ROOT / "vitface/exchange/web").iterdir()}
    assert files == code | page | {"vitface/weights/vit_nano.safetensors"} and len(page) == 8


def test_the_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        about = Parser().parsestr(archive.read(f"vitface-{__version__}.dist-info/METADATA").decode())
        scripts = archive.read(f"vitface-{__version__}.dist-info/entry_points.txt").decode()
    assert (about["Version"], about["Requires-Python"]) == (__version__, ">=3.10")
    assert about["License-Expression"] == "Apache-2.0"
    assert "vitface = vitface.__main__:main" in scripts


def test_the_version_is_the_one_to_cite_and_has_its_changes():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


def test_the_source_archive_builds_the_same_wheel(wheel, tmp_path):
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        tmp_path,
        cwd=tmp_path / f"vitface-{__version__}",
    )
    first, second = (zipfile.ZipFile(path).namelist() for path in (wheel, next(tmp_path.glob("*.whl"))))
    assert sorted(first) == sorted(second)


@pytest.mark.slow
def test_pip_install_gives_every_command(from_wheel, clone, tmp_path):
    for folder in (tmp_path, clone):
        assert "train" in run(from_wheel.parent / "vitface", "--help", cwd=folder)
        for command in ("train", "evaluate"):
            assert "usage:" in run(from_wheel.parent / "vitface", command, "--help", cwd=folder)
    for command in COMMANDS:
        assert "usage:" in run(from_wheel.parent / "vitface", command, "--help", cwd=tmp_path)


@pytest.mark.slow
def test_pip_install_trains_with_the_wheel_s_own_kernels_and_weights(from_wheel, tmp_path):
    for name in ("vitface", "vitface.kernels.frozen", "vitface.weights.keymaps"):
        assert run(from_wheel, "-c", WHERE.format(name), cwd=tmp_path).startswith(str(from_wheel.parents[1]))
    printed = run(from_wheel.parent / "vitface", "train", "--exp", "demo", "--dry-run", "--device", "cpu", cwd=tmp_path)
    assert "adapters" in printed


@pytest.mark.slow
def test_the_clone_s_scripts_run_where_the_wheel_is_installed(from_wheel, clone):
    for script in ("train.py", "evaluate.py"):
        assert "usage:" in run(from_wheel, script, "--help", cwd=clone)
    for name in ("vitface", "vitface.kernels.frozen", "vitface.weights.keymaps"):
        assert run(from_wheel, "-c", WHERE.format(name), cwd=clone).startswith(str(clone))


@pytest.mark.slow
def test_an_editable_install_is_found_beside_the_clone(editable, clone):
    """The folder that holds the clone has a folder named vitface, which is not the package."""
    script = clone.parent / "notebook.py"
    script.write_text("import vitface, vitface.kernels.frozen, vitface.weights.keymaps\nprint(vitface.__version__)\n")
    assert run(editable, script.name, cwd=clone.parent).strip() == __version__
    assert run(editable, "-c", WHERE.format("vitface"), cwd=clone.parent).startswith(str(clone / "vitface"))
    assert "usage:" in run(editable.parent / "vitface", "train", "--help", cwd=clone.parent)


@pytest.mark.slow
def test_another_python_without_torch(wheel, tmp_path):
    """What needs no library runs on the oldest Python and the newest."""
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other Python is installed")
    for version, python in pythons.items():
        fresh = environment(python, tmp_path / version)
        run(fresh, "-m", "pip", "install", *OFFLINE, wheel, cwd=tmp_path)
        assert run(fresh, "-c", "import vitface; print(vitface.__version__)", cwd=tmp_path).strip() == __version__
        for words in (["--help"], ["train", "--help"]):
            assert "usage:" in run(fresh.parent / "vitface", *words, cwd=tmp_path)
        run(fresh, "-m", "compileall", "-q", fresh.parents[1], cwd=tmp_path)
