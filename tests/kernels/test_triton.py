"""Triton's kernels where there is no GPU: their values, interpreted on the CPU, and that they compile for one.

The interpreter multiplies bfloat16 wrongly and does not know what a GPU refuses; tests/gpu/ has both.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/test_triton_norm.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SHARED_MEMORY = 99 << 10  # bytes that a program may have on consumer GPUs of compute capability 8.6 to 12
TENSORS = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "a_ptr": "*fp32", "gate_ptr": "*fp32", "dgate_ptr": "*fp32"}
SCALARS = {"rows": "i32", "size": "i32", "tokens": "i32", "eps": "fp32", "scaling": "fp32"}


def test_interpreted():
    pytest.importorskip("triton")
    files = sorted(map(str, HERE.glob("test_triton_*.py")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files],
        cwd=HERE.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(files) == 3 and " passed" in done.stdout and "skipped" not in done.stdout


def compiled(kernel, dtype, capability, constants, **options):
    """The kernel as it is for a GPU, none needed; pointers are to `dtype` where float32 is not asked for."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {name: {**TENSORS, **SCALARS}.get(name, f"*{dtype}") for name in kernel.arg_names}
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else kind for name, kind in kinds.items()},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def for_a_gpu(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # Triton 3.9 announces 3.10
@pytest.mark.parametrize(
    ("dtype", "capability", "width", "columns"),
    [("bf16", 90, 384, 48), ("fp16", 80, 768, 0), ("fp32", 86, 768, 128), ("bf16", 120, 1024, 512)],
)
def test_the_residual_step_compiles_for_a_gpu(for_a_gpu, dtype, capability, width, columns):
    from vitface.kernels import norm

    sizes = norm._sizes(torch.empty(1, width), torch.empty(columns, width) if columns else None)
    for kernel, flag in ((norm._forward_kernel, "HAS_Y"), (norm._backward_kernel, "HAS_DSUM")):
        built = compiled(kernel, dtype, capability, {flag: True, "HAS_GAMMA": columns > 0, **sizes}, **norm.HOW)
        assert built.metadata.shared <= SHARED_MEMORY
        on_tensor_cores = "mma.sync" in built.asm["ptx"]
        assert on_tensor_cores == (columns > 0 and dtype != "fp32"), "float32 is not to be rounded to TF32"


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_activation_and_gate_compile_for_a_gpu(for_a_gpu):
    from vitface.kernels import activation, gate

    for kernel, constants in (
        (activation._forward_kernel, {"QUICK": False, "BLOCK": activation.BLOCK}),
        (activation._backward_kernel, {"QUICK": True, "BLOCK": activation.BLOCK}),
        (gate._forward_kernel, {"K": 3, "R": 16, "BLOCK": gate.BLOCK}),
        (gate._backward_kernel, {"K": 8, "R": 4, "BLOCK_T": gate.BLOCK_T, "BLOCK_R": 4}),
    ):
        ptx = compiled(kernel, "bf16", 90, constants).asm["ptx"]
        assert "red.global" not in ptx and "atom." not in ptx, "an atomic sum is in no fixed order"
