"""How many bytes does a compiled training step move on a GPU? It needs no GPU.

    python benchmarks/traffic.py --domains 3

The code that torch.compile makes of a face model for an H100, forward and backward, runs on tensors without memory:
each launch is counted, with the bytes that it reads and writes. So are the launches that turn a batch of crops into the
model's input. Not counted are the margin and the optimiser. It needs g++ and triton, and it depends on internals of
torch 2.13. The last line is JSON.
"""

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
VIEWS = (
    "aten._unsafe_view",
    "aten.empty",
    "aten.new_empty",
    "aten.detach",
    "aten.alias",
    "prim.device",
    "aten.as_strided",
)
OPERATIONS = {
    "formulas": "vitface.model.ops",
    "fused": "vitface.kernels.fused",
    "packed": "vitface.kernels.fused_packed",
}
H100: dict[str, Any] = dict(major=9, minor=0, warp_size=32, multi_processor_count=132)
H100 |= dict(regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048)


def with_a_fake_device() -> None:
    """Starts this script again with the device of fake_cuda.cpp; SystemExit with what came of it."""
    folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as out:
        library = Path(out, "libfake_cuda.so")
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(HERE / "fake_cuda.cpp"), "-o", str(library)]
        command += [f"-I{folder / 'include'}", f"-I{folder / 'include/torch/csrc/api/include'}", f"-L{folder / 'lib'}"]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{folder / 'lib'}"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "VITFACE_FAKE_CUDA": "1"}
        raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


def pretend() -> None:
    """Makes torch, inductor and triton take the fake device for an H100 with nothing to compile or to run on."""
    import torch._inductor.config as inductor
    import torch._inductor.fx_passes.fuse_attention as fuse_attention
    import torch._inductor.fx_passes.misc_patterns as misc_patterns
    import torch._inductor.fx_passes.pad_mm as pad_mm
    import torch._inductor.runtime.hints as hints
    import torch._inductor.scheduler as scheduler
    import torch.utils._triton as triton_utils
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = types.SimpleNamespace(
        name="H100", gcnArchName="", total_memory=80 << 30, L2_cache_size=50 << 20, **H100
    )
    torch.version.cuda = "13.0"
    answers = {"is_available": True, "get_device_properties": properties, "get_device_capability": (9, 0)}
    answers |= {"current_device": 0, "device_count": 1, "is_bf16_supported": True, "is_initialized": True}
    answers |= {"is_current_stream_capturing": False, "_lazy_init": None, "set_device": None}
    answers |= {"get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "manual_seed_all": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in ("getDevice", "getCurrentRawStream", "exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", lambda *_: 0)
    torch._C._cuda_isCurrentStreamCapturing = lambda: False  # type: ignore[attr-defined]
    torch.cuda._DeviceGuard = lambda *_: torch.no_grad()  # any context that does nothing to code without gradients
    target = types.SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    target.get_active_torch_device = lambda: torch.device("cuda", 0)
    driver.set_active(target)
    triton_utils.has_triton = scheduler.has_triton = lambda *_: True
    device = hints.DeviceProperties(type="cuda", index=0, cc=90, **{k: v for k, v in H100.items() if k != "minor"})
    hints.DeviceProperties.create = classmethod(lambda *_: device)
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = misc_patterns._misc_patterns_init = lambda *_: None
    inductor.benchmark_kernel = True  # kernels are written with the bytes that they move
    inductor.compile_threads, inductor.fx_graph_cache, inductor.joint_graph_constant_folding = 1, False, False
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v: attention(q, k, v, 0.0, False, False)[0]


def face_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model of vitface, its tensors on the fake device and without values."""
    from vitface.config import FaceConfig
    from vitface.model.face import FaceModel
    from vitface.model.vit import ViT
    from vitface.presets import VIT_PRESETS, backbone_name

    randn = torch.randn
    torch.randn = lambda *shape, generator=None, **options: randn(*shape, **options)
    torch.Tensor.uniform_ = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    name = backbone_name(args.backbone)
    config = FaceConfig(
        name, "random", VIT_PRESETS[name], 224, lora_rank=16, num_domains=args.domains, head=args.head, dtype="bf16"
    )
    with torch.device("cuda"):
        model = FaceModel(ViT(config.vit, 224), config).train()
    model.use_ops(importlib.import_module(OPERATIONS[args.operations]))
    return model


def nbytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor's distinct elements."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride)


class Products:
    """`extern_kernels` of inductor's code: cuBLAS's products and cuDNN's convolution."""

    def __init__(self, launches: list[tuple[str, float]]):
        self.launches = launches

    def mm(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        self.launches.append(("mm", nbytes(a) + nbytes(b) + nbytes(out)))

    def addmm(self, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor, **_: Any) -> None:
        added = nbytes(bias) * (1 if bias.dim() == 1 or bias.stride(0) == 0 else 3)  # else copied to `out` beforehand
        self.launches.append(("addmm", nbytes(a) + nbytes(b) + nbytes(out) + added))

    def bmm(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        self.launches.append(("bmm", nbytes(a) + nbytes(b) + nbytes(out)))

    def convolution(self, x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        out = torch.ops.aten.convolution(x, weight, None, *(value for name, value in options.items() if name != "bias"))
        self.launches.append(("convolution", nbytes(x) + nbytes(weight) + nbytes(out)))
        return out


def run(source: str, inputs: list[torch.Tensor], mode: Any) -> list[tuple[str, float]]:
    """The launches of inductor's code, in order: (name, bytes)."""
    import re

    import torch._inductor.async_compile as async_compile
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    launches: list[tuple[str, float]] = []

    def kernel(_: Any, name: str, code: str, **__: Any) -> types.SimpleNamespace:
        moved = re.search(r"'kernel_num_gb': ([0-9.e+-]+)", code)
        gigabytes = float(moved[1]) if moved else 0.0
        return types.SimpleNamespace(run=lambda *_, **__: launches.append((name, gigabytes * 1e9)))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            view = function.is_view or str(function).startswith(VIEWS)
            if not view and any(tensor.is_cuda for tensor in tensors):
                launches.append((str(function), sum(map(nbytes, tensors))))
            return out

    async_compile.AsyncCompile.triton = kernel  # type: ignore[method-assign,assignment]
    async_compile.AsyncCompile.wait = lambda *_: None  # type: ignore[method-assign]
    names: dict[str, Any] = {"__name__": "generated", "__file__": "generated"}
    exec(compile(source, "generated", "exec"), names)  # noqa: S102, torch's own code
    names |= {"extern_kernels": Products(launches), "get_raw_stream": lambda _: 0}
    names |= dict.fromkeys(("assert_size_stride", "assert_alignment"), lambda *_: None)
    names["empty_strided_cuda"] = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    names["reinterpret_tensor"] = lambda t, size, stride, at=0: t.as_strided(size, stride, t.storage_offset() + at)
    with mode, Operators():
        names["Runner"](partitions=[]).call(list(inputs)) if "Runner" in names else names["call"](list(inputs))
    return launches


def input_launches(mode: Any, model: torch.nn.Module, batch_size: int) -> tuple[int, int]:
    """(launches, waits for the device) that turn crops into the model's input, eager, on the tensors of a batch."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from vitface.data.augment import NUM_PLANNED
    from vitface.training.batches import training_input

    names: list[str] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            between = {tensor.device.type for tensor in tensors} == {"cpu", "cuda"}
            waits = "nonzero" in str(function) or "_local_scalar_dense" in str(function)
            if between or waits:
                names.append("wait")
            elif not function.is_view and not str(function).startswith(VIEWS) and any(t.is_cuda for t in tensors):
                names.append(str(function))
            return out

    with mode:
        crops = torch.empty(batch_size, 112, 112, 3, dtype=torch.uint8, device="cuda")
        planned = torch.empty(batch_size, NUM_PLANNED, device="cuda")
        for _ in range(2):  # what is kept on the device comes there in the first step
            names.clear()
            with Operators():
                training_input(model, crops, planned, "strong")
    return sum(name != "wait" for name in names), names.count("wait")


def lowered(mode: Any, found: dict[str, list], part: str) -> Callable:
    """A compiler for aot_function: inductor's code of a graph is run on the fake device, its launches noted."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import _recursive_post_grad_passes, fake_tensor_prop, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        with V.set_fake_mode(mode), DebugContext():
            view_to_reshape(graph)
            with V.set_fake_mode(fake_tensor_prop(graph, inputs)):
                _recursive_post_grad_passes(graph, is_inference=False)
                lowering = GraphLowering(graph, example_inputs=inputs, shape_env=None, is_backward=part == "backward")
                with V.set_graph_handler(lowering):
                    lowering.run(*inputs)
                    code, _ = lowering.codegen()
        found[part] = run(getattr(code, "value", code), inputs, mode)
        return make_boxed_func(graph.forward)

    return compiler


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Launches and GB of "forward" and "backward"; launches of the "input" and how often it waits for the device."""
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import _recursive_joint_graph_passes
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, list[tuple[str, float]]] = {}
    with FakeTensorMode() as mode:
        model = face_model(args)
        images = torch.empty(args.batch_size, 3, 224, 224, device="cuda")
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

        def function(*values: torch.Tensor) -> list[torch.Tensor]:
            out = torch.func.functional_call(model, dict(zip(tensors, values, strict=False)), (values[-1],))
            return [tensor for tensor in out if tensor is not None]

        def partition(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
            with V.set_fake_mode(mode):
                _recursive_joint_graph_passes(graph)
            return min_cut_rematerialization_partition(graph, inputs, **{**options, "compiler": "inductor"})

        compiled = aot_function(
            function,
            lowered(mode, found, "forward"),
            lowered(mode, found, "backward"),
            partition,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )
        torch.stack([out.float().sum() for out in compiled(*tensors.values(), images)]).sum().backward()
    summary: dict[str, dict[str, float]] = {
        part: {"launches": len(each), "gigabytes": round(sum(moved for _, moved in each) / 1e9, 2)}
        for part, each in found.items()
    }
    count, waits = input_launches(mode, model, args.batch_size)
    return {**summary, "input": {"launches": count, "waits": waits}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="dinov2", help="backbone preset (default: dinov2)")
    parser.add_argument("--domains", type=int, default=1, help="1: LoRA (the default); more: DA-LoRA")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--head", default="linear")
    parser.add_argument("--operations", choices=OPERATIONS, default="fused", help="of the layers (default: fused)")
    args = parser.parse_args()
    if "VITFACE_FAKE_CUDA" not in os.environ:
        with_a_fake_device()
    pretend()
    summary = measure(args)
    for part, counts in summary.items():
        print(f"{part}: {', '.join(f'{value:,} {name}' for name, value in counts.items())}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
