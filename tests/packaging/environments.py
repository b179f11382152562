"""Fresh virtual environments, and a copy of the clone to install into them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import optional

ROOT = Path(__file__).parents[2]
CLONE = ("vitface", "kernels", "weights", "pyproject.toml", "README.md", "LICENSE", "train.py", "evaluate.py")
OFFLINE = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet")  # of pip install


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command without this process's Python settings; its output, or AssertionError if it fails."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_the_clone(folder: Path) -> Path:
    """HOLDER/vitface with the files that the package is built from, and files beside them that must stay out of it."""
    clone = folder / "vitface"
    clone.mkdir(parents=True)
    shutil.copy(ROOT / ".gitignore", clone)
    for name in CLONE:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, clone / name)
    for name in ("vitface/__pycache__/x.pyc", "kernels/__pycache__/x.pyc", "weights/mine.safetensors", "tests/x.py"):
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / name).write_text("")
    return clone


def environment(python: Path, folder: Path, borrow: bool = False) -> Path:
    """A fresh virtual environment; returns its Python. `borrow`: what this process has installed is found there too,
    after what is installed there."""
    run(python, "-m", "venv", folder, cwd=folder.parent)
    fresh = folder / "bin" / "python"
    if borrow:
        packages = Path(run(fresh, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
        lent = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (packages / "zz_borrowed.pth").write_text("\n".join(lent))
    return fresh


def other_pythons() -> dict[str, Path]:
    """Version -> interpreter: Python 3.10 and the newest one, where this machine has them beside the running one."""
    names = [f"python3.{minor}" for minor in range(10, 20)]
    found = [Path(path) for path in map(shutil.which, names) if path]
    found += sorted((Path.home() / ".pyenv" / "versions").glob("3.1[0-9].*/bin/python"))
    pythons = {}
    for path in found:
        asked = subprocess.run(
            [path, "-c", "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if asked.returncode == 0:
            pythons[asked.stdout.strip()] = path
    pythons.pop("{}.{}".format(*sys.version_info), None)
    newest = max(pythons, key=lambda version: int(version.split(".")[1]), default=None)
    return {version: pythons[version] for version in pythons if version in ("3.10", newest)}


def need_build_backend() -> None:
    """Skips a test where nothing can build the package without a network."""
    for name in ("hatchling", "editables"):
        optional(name)
