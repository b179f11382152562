"""Packed attention: its checks under Triton's interpreter, and its programs compiled for GPUs that are not here."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import optional

triton = optional("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vitface.kernels import fused, fused_packed, packed_triton  # noqa: E402
from vitface.kernels.packed_attention import attention, launch  # noqa: E402

CHECKS = Path(__file__).with_name("packed_attention_checks.py")
SHARED = 99 * 1024  # bytes that a program may have on sm_86 and sm_120; others have more


@pytest.mark.parametrize(("selected", "number"), [("not slow", 40), pytest.param("slow", 30, marks=pytest.mark.slow)])
def test_its_checks_pass_under_the_interpreter(selected, number):
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-m", selected, str(CHECKS)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > number


def test_the_other_operations_are_the_fused_ones():
    assert fused_packed.__all__ == fused.__all__
    assert [name for name in fused.__all__ if getattr(fused_packed, name) is not getattr(fused, name)] == ["attention"]


@pytest.mark.parametrize(
    ("width", "changes", "match"),
    [
        (3 * 48, {}, "head dim"),
        (3 * 32 + 3, {}, "head dim"),
        (3 * 32, {"dtype": torch.float64}, "bf16, fp16 or fp32"),
        (3 * 32, {"num_queries": 0}, "a query or more"),
        (3 * 32, {}, "CUDA"),
    ],
)
def test_what_it_cannot_run_is_refused(width, changes, match):
    dtype = changes.get("dtype", torch.float32)
    with pytest.raises(ValueError, match=match):
        attention(torch.zeros(1, 5, width, dtype=dtype), 2, changes.get("num_queries"))


def build(dtype, arch, tokens, queries, head_dim, backward):
    """The program for six heads, as a launch would specialise it: all pointers divisible by 16."""
    sizes = launch(torch.empty(1, tokens, 18 * head_dim, dtype=dtype, device="meta"), 6, queries, backward)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    kind = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[dtype]
    pointers = {"qkv": kind, "out": kind, "lse": "*fp32", **({"dout": kind, "dqkv": kind} if backward else {})}
    source = ASTSource(
        packed_triton.backward if backward else packed_triton.forward,
        {**pointers, **dict.fromkeys(sizes, "constexpr")},
        sizes,
        {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def assert_fits(dtype, arch, tokens, queries, head_dim, backward, folder):
    built = build(dtype, arch, tokens, queries, head_dim, backward)
    ptx = built.asm["ptx"]
    assert re.search(r"\.target sm_\d+", ptx) and not re.search(r"\b(atom|red)\.", ptx)
    assert built.metadata.shared <= SHARED
    (folder / "x.cubin").write_bytes(built.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "x.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:\d+ STACK:\d+", said)  # a stack is where registers are spilled to
    way = "backward" if backward else "forward"
    print(
        f"sm_{arch} {dtype} N {tokens} Q {queries} hd {head_dim} {way}: {built.metadata.shared} bytes shared, {found}"
    )


@pytest.mark.parametrize("backward", [False, True])
def test_it_compiles(backward, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert_fits(torch.bfloat16, 80, 257, 257, 64, backward, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [*itertools.product((80, 86, 90, 120), (torch.bfloat16, torch.float16)), (86, torch.float32)],
)
def test_it_compiles_for_every_gpu(arch, dtype, backward, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for sizes in ((257, 257, 64), (257, 1, 64), (257, 90, 64), (197, 197, 64), (50, 50, 32), (17, 17, 16), (1, 1, 64)):
        assert_fits(dtype, arch, *sizes, backward, tmp_path)
