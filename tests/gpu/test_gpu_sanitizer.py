"""NVIDIA's compute-sanitizer, where it is installed, over the kernels' tests: no access out of bounds, no race."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_are_clean(tool):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    pytest.importorskip("triton")
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    kernels = Path(__file__).with_name("test_gpu_kernels.py")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "-k", "96", str(kernels)]
    # each tensor an allocation of its own: in torch's pool an access beyond it would look good
    own = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
