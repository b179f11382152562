"""The whole face model as one graph, for programs without vitface: torch.export's .pt2, and ONNX.

The graph is `Recogniser.embed`: it includes resize, mean and std, the router, the adapters, the head and the sum with
the mirror image, so the thresholds hold for it. It computes in float32. Letters: B images (any number), E embedding, K
domains.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vitface.data.images import CROP_SIZE
from vitface.data.synthetic.worlds import synthetic_pairs
from vitface.errors import ExchangeError
from vitface.model import ops
from vitface.model.face import FaceModel
from vitface.model.inference import embed_crops
from vitface.recogniser import Recogniser
from vitface.version import __version__

MIN_COSINE = 0.99999  # between an exported graph's embeddings and the model's
CHECKED_BATCHES = (1, 32)


class Embedder(nn.Module):
    """Aligned faces, uint8 (B, 112, 112, 3) RGB -> unit-norm embeddings (B, E); DA-LoRA: and domain weights (B, K)."""

    def __init__(self, model: FaceModel, flip: bool):
        super().__init__()
        self.model, self.flip = model, flip

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        embeddings, weights = embed_crops(self.model, images, self.flip)
        return (embeddings,) if weights is None else (embeddings, weights)


def trace(model: FaceModel, flip: bool = True) -> ExportedProgram:
    """The model, on the CPU, in float32 and eval mode, as an exported program with a dynamic batch."""
    if model.config.dtype != "fp32" or model.training:
        raise ValueError("trace takes a model in float32 and eval mode")
    model.use_ops(ops)  # other programs do not have our kernels
    embedder = Embedder(model, flip).eval()
    example = torch.zeros(2, CROP_SIZE, CROP_SIZE, 3, dtype=torch.uint8)
    with _quiet(), torch.no_grad():
        embedder(example)  # at its first call, einops looks for its backends, which must not be traced
        return torch.export.export(
            embedder, (example,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, strict=True
        )


def torch_bytes(program: ExportedProgram) -> bytes:
    """The contents of a .pt2 file, which torch.export.load reads."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def onnx_bytes(program: ExportedProgram, model: Recogniser) -> bytes:
    """The contents of a .onnx file: "images" -> "embeddings" and, of DA-LoRA, "domain_weights"; settings as metadata.

    It needs onnx and onnxscript.
    """
    outputs = ["embeddings", *(["domain_weights"] if model.config.num_domains > 1 else [])]
    with _quiet():
        exported = torch.onnx.export(program, input_names=["images"], output_names=outputs, verbose=False)
        assert exported is not None
        exported.model.metadata_props["vitface"] = json.dumps(describe(model))
        return exported.model_proto.SerializeToString()


def describe(model: Recogniser) -> dict:
    """The graph's inputs, outputs and thresholds, for the file's metadata."""
    return {
        "vitface_version": __version__,
        "images": "aligned faces, uint8 RGB (B, 112, 112, 3)",
        "embeddings": f"float32 (B, {model.config.embedding_dim}), unit norm; the score of two is their dot product",
        "backbone": model.config.backbone,
        "thresholds": {f"{far:g}": threshold for far, threshold in model.thresholds.items()},
    }


def check_onnx(data: bytes, model: Recogniser, flip: bool) -> float:
    """The lowest cosine between ONNX Runtime's embeddings and the model's, on drawn faces in batches of 1 and 32.

    ExchangeError if it is below MIN_COSINE.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    faces = synthetic_pairs(max(CHECKED_BATCHES) // 2 + 1)[0]
    lowest = 1.0
    for batch in CHECKED_BATCHES:
        found = np.asarray(session.run(["embeddings"], {"images": faces[:batch]})[0])
        lowest = min(lowest, float((found * model.embed(faces[:batch], flip=flip)).sum(axis=1).min()))
    if not lowest >= MIN_COSINE:
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
