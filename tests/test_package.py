"""What `import vitface` brings along and leaves alone."""

import subprocess
import sys
from pathlib import Path

import vitface

ROOT = Path(__file__).parents[1]
LAZY = (
    "triton", "cv2", "scipy", "sklearn", "matplotlib", "pandas", "transformers", "timm", "peft", "huggingface_hub",
    "onnx", "onnxruntime", "wandb", "tensorboard", "tqdm", "jinja2", "torch.utils.data", "multiprocessing.pool",
    "vitface.training", "vitface.kernels", "vitface.commands", "vitface.study.grid", "vitface.data.faces.folder",
)  # fmt: skip
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
assert state() == then
print("\\n".join(sorted(set(sys.modules) - before)), file=sys.stderr)
"""


def test_importing_has_no_side_effects(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{IMPORT}"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "", done.stderr
    loaded = done.stderr.split()
    assert "vitface.gallery.gallery" in loaded
    assert [name for name in loaded if name.startswith(LAZY)] == []


def test_the_public_names():
    assert sorted(vitface.__all__) == ["Gallery", "__version__", "load", "load_backbone"]
    for name in vitface.__all__:
        thing = getattr(vitface, name)
        assert name == "__version__" or (thing.__doc__ and len(thing.__doc__) > 80), name
