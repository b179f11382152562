"""What `import vitface` and `--help` bring along, and what they leave alone."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import vitface
from vitface.__main__ import COMMANDS
from vitface.errors import ConfigError
from vitface.extras import require

ROOT = Path(__file__).parents[1]
EXTRAS = ("triton", "cv2", "scipy", "transformers", "timm", "peft", "huggingface_hub", "onnx", "wandb", "tensorboard")
SLOW = (
    "sklearn",
    "matplotlib",
    "pandas",
    "tqdm",
    "jinja2",
    "torch.utils.data",
    "torch._dynamo",
    "multiprocessing.pool",
)
BARE = ("kernels", "weights")  # other distributions may have these names
ROOMS = ("vitface.training", "vitface.commands", "vitface.study", "vitface.data.faces.folder")
IMPORT = """
import sys, threading, warnings, random, os
import numpy, torch, PIL.Image
before = set(sys.modules)
def state():
    return (
        torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()), torch.get_num_threads(),
        torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision(),
        warnings.filters[:], dict(os.environ), threading.active_count(), sys.path[:], sorted(os.listdir(".")),
    )
then = state()
import vitface
from vitface import Gallery, load, load_backbone
assert state() == then
print("\\n".join(sorted(set(sys.modules) - before)), file=sys.stderr)
"""


def fresh(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs Python code with this checkout in front, in a process of its own and with warnings as errors."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_importing_has_no_side_effects(tmp_path):
    done = fresh(IMPORT, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    loaded = done.stderr.split()
    assert "vitface.gallery.gallery" in loaded
    assert [name for name in loaded if name.startswith((*EXTRAS, *SLOW, *BARE, *ROOMS))] == []


def test_importing_the_package_alone_loads_none_of_its_rooms():
    done = fresh(
        "import vitface; print(*(name for name in sys.modules if name.startswith(('vitface', 'torch', 'numpy'))))"
    )
    assert done.stdout.split() == ["vitface.version", "vitface"], done.stderr


def test_the_public_names():
    assert sorted(vitface.__all__) == ["Gallery", "__version__", "load", "load_backbone"]
    for name in vitface.__all__:
        thing = getattr(vitface, name)
        assert name == "__version__" or (thing.__doc__ and len(thing.__doc__) > 80), name
    with pytest.raises(AttributeError, match="module 'vitface' has no attribute 'Galery'"):
        vitface.Galery  # noqa: B018


def test_public_names_are_listed_and_documented_before_they_are_used():
    done = fresh(
        "import vitface, pydoc; print(*dir(vitface)); print(pydoc.render_doc(vitface, renderer=pydoc.plaintext))"
    )
    names, text = done.stdout.split("\n", 1)
    assert set(vitface.__all__) <= set(names.split()), done.stderr
    assert "class Gallery" in text and "load_backbone(" in text


def test_help_waits_for_no_library():
    """The help of every command, one after the other: none of them has loaded torch or an optional package."""
    code = """
from contextlib import suppress
import vitface.__main__
for name in [None, *vitface.__main__.COMMANDS]:
    with suppress(SystemExit):
        vitface.__main__.main([*([name] if name else []), "--help"])
print(*sys.modules, file=sys.stderr)
"""
    done = fresh(code)
    assert [name for name in done.stderr.split() if name.startswith(("torch", *EXTRAS, *SLOW))] == []
    assert done.returncode == 0 and done.stdout.count("usage: vitface") == 1 + len(COMMANDS), done.stderr


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_help_of_a_script_waits_for_no_library(script):
    code = """
import runpy
try:
    sys.argv[1:] = ["--help"]
    runpy.run_path(SCRIPT, run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
assert "torch" not in sys.modules
"""
    done = fresh(code.replace("SCRIPT", repr(str(ROOT / f"{script}.py"))))
    assert done.returncode == 0 and f"usage: vitface {script}" in done.stdout, done.stderr


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    require("this", "json")
    monkeypatch.setattr(importlib.util, "find_spec", {"json": 1}.get)
    with pytest.raises(
        ConfigError, match=r"^this needs opencv-python-headless, x:\n  pip install opencv-python-headless x!$"
    ):
        require("this", "json", "cv2", "x", otherwise="!")
