"""The whole face model as one graph, for programs without vitface: torch.export's .pt2, and ONNX.

The graph is `Recogniser.embed`: it includes resize, mean and std, the router, the adapters, the head and the sum with
the mirror image, so the thresholds hold for it. It computes in float32. Letters: B images (any number), E embedding, K
domains.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Graph

from vitface.data.images import CROP_SIZE
from vitface.data.synthetic.worlds import synthetic_pairs
from vitface.errors import ExchangeError
from vitface.model import ops
from vitface.model.face import FaceModel
from vitface.model.inference import attend_crops, embed_crops
from vitface.recogniser import Recogniser
from vitface.version import __version__

MIN_COSINE = 0.99999  # between an exported graph's embeddings and the model's
CHECKED_BATCHES = (1, 32)
OPSET = 18  # the lowest that torch writes; it needs IR 8, which runtimes read since 2022
Layout = Literal["nhwc", "nchw", "seen"]


class Embedder(nn.Module):
    """Aligned faces, uint8 (B, 112, 112, 3) RGB -> unit-norm embeddings (B, E); DA-LoRA: and domain weights (B, K).

    "nchw", as InsightFace's models: float32 (B, 3, 112, 112) RGB, (pixel - 127.5) / 127.5 -> embeddings alone.
    "seen" is "nhwc" and, last, where CLS looks in the last block, the mean over heads: (B, g, g).
    """

    def __init__(self, model: FaceModel, flip: bool, layout: Layout):
        super().__init__()
        self.model, self.flip, self.layout = model, flip, layout

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.layout == "nchw":
            pixels = (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
            return (embed_crops(self.model, pixels.permute(0, 2, 3, 1), self.flip)[0],)
        embeddings, weights = embed_crops(self.model, images, self.flip)
        outputs = (embeddings,) if weights is None else (embeddings, weights)
        if self.layout == "seen":  # of the same batch, so that all but the last block is the same twice, and merged
            pixels = rearrange([images, images.flip(2)], "two b h w c -> (b two) h w c") if self.flip else images
            outputs += (attend_crops(self.model, pixels)[:: 1 + self.flip].mean(dim=1),)
        return outputs


def as_input(crops: np.ndarray, layout: Layout) -> np.ndarray:
    """Aligned faces, uint8 (B, 112, 112, 3) RGB, as a graph of that layout takes them."""
    if layout != "nchw":
        return crops
    return np.ascontiguousarray(((crops.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2))


def trace(model: FaceModel, flip: bool = True, layout: Layout = "nhwc") -> ExportedProgram:
    """The model, on the CPU, in float32 and eval mode, as an exported program with a dynamic batch."""
    if model.config.dtype != "fp32" or model.training:
        raise ValueError("trace takes a model in float32 and eval mode")
    model.use_ops(ops)  # other programs do not have our kernels
    embedder = Embedder(model, flip, layout).eval()
    example = torch.from_numpy(as_input(np.zeros((2, CROP_SIZE, CROP_SIZE, 3), np.uint8), layout))
    with _quiet(), torch.no_grad():
        embedder(example)  # at its first call, einops looks for its backends, which must not be traced
        return torch.export.export(
            embedder, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, strict=True
        )


def torch_bytes(program: ExportedProgram) -> bytes:
    """The contents of a .pt2 file, which torch.export.load reads."""
    for node in (node for module in program.graph_module.modules() for node in getattr(module, "graph", Graph()).nodes):
        node.meta.pop("stack_trace", None)  # from which line of which file of this machine it is
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def onnx_bytes(program: ExportedProgram, model: Recogniser, layout: Layout = "nhwc", fold: bool = True) -> bytes:
    """The contents of a .onnx file: "images" -> "embeddings" and, of DA-LoRA in "nhwc", "domain_weights"; settings as
    metadata.

    Its IR version is the lowest that holds the graph. Without `fold`, each of the model's tensors is in it as it is,
    under its name. It needs onnx and onnxscript.
    """
    import onnx

    gated, seen = model.config.num_domains > 1 and layout != "nchw", layout == "seen"
    outputs = ["embeddings", *["domain_weights"] * gated, *["attention"] * seen]
    with _quiet():
        exported = torch.onnx.export(
            program, input_names=["images"], output_names=outputs, opset_version=OPSET, verbose=False, optimize=fold
        )
        assert exported is not None
        exported.model.metadata_props["vitface"] = json.dumps(describe(model, layout))
        proto = _merged(exported.model_proto) if seen else exported.model_proto
    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")  # of IR 10; torch notes there from which line of which file a node is
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _merged(proto: Any) -> Any:
    """The same graph, in which nothing is computed twice."""
    from onnx_ir import from_proto, to_proto
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateHashedInitializersPass

    graph = from_proto(proto)
    DeduplicateHashedInitializersPass()(graph)
    CommonSubexpressionEliminationPass()(graph)
    return to_proto(graph)


def describe(model: Recogniser, layout: Layout = "nhwc") -> dict:
    """The graph's inputs, outputs and thresholds, for the file's metadata."""
    taken = {
        "nhwc": "uint8 RGB (B, 112, 112, 3)",
        "nchw": "float32 RGB (B, 3, 112, 112), (pixel - 127.5) / 127.5",
    }
    return {
        "vitface_version": __version__,
        "images": f"aligned faces, {taken['nhwc' if layout == 'seen' else layout]}",
        "embeddings": f"float32 (B, {model.config.embedding_dim}), unit norm; the score of two is their dot product",
        "backbone": model.config.backbone,
        "thresholds": {f"{far:g}": threshold for far, threshold in model.thresholds.items()},
    }


def check_onnx(
    data: bytes,
    model: Recogniser,
    flip: bool,
    layout: Layout = "nhwc",
    least: float = MIN_COSINE,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> float:
    """The lowest cosine between ONNX Runtime's embeddings and the model's, on drawn faces in batches of 1 and 32.

    `beside` has the files, by name, that the graph reads. ExchangeError if the cosine is below `least`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    sizes = [*map(len, beside.values())]
    options.add_external_initializers_from_files_in_memory([*beside], [*beside.values()], sizes)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    faces = synthetic_pairs(max(CHECKED_BATCHES) // 2 + 1)[0]
    lowest = 1.0
    for batch in CHECKED_BATCHES:
        found = np.asarray(session.run(["embeddings"], {"images": as_input(faces[:batch], layout)})[0])
        lowest = min(lowest, float((found * model.embed(faces[:batch], flip=flip)).sum(axis=1).min()))
    if not lowest >= least:
        raise ExchangeError(f"ONNX Runtime's embeddings differ (cosine {lowest:.6f}); nothing was written")
    return lowest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporters' warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
