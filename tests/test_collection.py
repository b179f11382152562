"""An optional package that is broken stops neither the collection of the tests nor the tests that do without it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = ("cv2", "huggingface_hub", "onnx", "onnxruntime", "peft", "scipy", "sklearn", "torchmetrics", "transformers")


@pytest.mark.slow
def test_every_test_is_collected_though_each_optional_package_is_broken(tmp_path):
    for name in OPTIONAL:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-rs", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "tests/model/test_lora.py::" in done.stdout
    assert "transformers cannot be imported (RuntimeError: operator torchvision::nms does not exist)" in done.stdout
