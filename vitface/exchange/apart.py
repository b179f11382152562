"""A graph without its backbone, for whoever may not pass the backbone on: its tensors are read from the converted file.

They are ONNX's external data, each at its place in that file. The graph is traced from `with_noise`, so no number of
the backbone, and none that was computed from it, can be in it.
"""

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitface.errors import ExchangeError
from vitface.files import sha256_bytes
from vitface.model.face import FaceModel
from vitface.model.positions import resample_pos_embed
from vitface.store.backbone import read_backbone
from vitface.store.faces import trained_tensors

PREFIX = "model."  # of a FaceModel's tensors, in a graph


class Stored(NamedTuple):
    """A converted file `name` behind its header: `data`, and where in it each of `tensors` lies.

    The header has the version that wrote the file and what it was made from, which differ where the tensors do not.
    """

    name: str
    data: bytes
    tensors: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """By what a page knows the file."""
        return {"file": self.name, "bytes": len(self.data), "sha256": sha256_bytes(self.data)}


def read_stored(file: Path) -> Stored:
    """The tensors of a converted file; ExchangeError for one of which nobody else has a copy."""
    name, _, _, source = read_backbone(file, tensors=False)
    if "merged" in source:
        raise ExchangeError(f"{file} has LoRA folded in, so no visitor has a copy; publish the run it was made of")
    contents = file.read_bytes()
    start = 8 + int.from_bytes(contents[:8], "little")
    header = json.loads(contents[8:start])
    tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
    return Stored(f"{name}.safetensors", contents[start:], tensors)


def backbone_names(model: FaceModel) -> set[str]:
    """What an unfolded graph calls the tensors of the backbone."""
    return {PREFIX + name for name in model.state_dict().keys() - trained_tensors(model).keys()}


def with_noise(model: FaceModel) -> FaceModel:
    """A copy with noise for each tensor of the backbone; the same noise for every backbone of this shape."""
    noisy, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(backbone_names(noisy)):
            tensor = noisy.get_parameter(name.removeprefix(PREFIX))
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)  # no two are alike, and none is below 0
    return noisy


def without_backbone(graph: bytes, model: FaceModel, stored: Stored) -> bytes:
    """The unfolded graph of `with_noise(model)`, which takes the backbone from `stored`.

    Positions at another grid than their own are a matrix, which has nothing of the backbone, times those of the file.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    proto, names, first = onnx.load_from_string(graph), backbone_names(model), []
    for noise in [tensor for tensor in proto.graph.initializer if tensor.name in names]:
        proto.graph.initializer.remove(noise)
        name, entry = noise.name, stored.tensors[noise.name.removeprefix(f"{PREFIX}vit.")]
        proto.graph.initializer.append(_placed(f"{name}.stored", entry, stored.name))
        native = name if entry["shape"] == [*noise.dims] else f"{name}.native"
        first.append(helper.make_node("Cast", [f"{name}.stored"], [native], to=TensorProto.FLOAT))
        if native != name:  # the positions
            basis, vit = torch.eye(entry["shape"][1])[None], model.config.vit
            matrix = resample_pos_embed(basis, vit.grid(model.config.image_size), vit.pos_interp)[0]
            proto.graph.initializer.append(numpy_helper.from_array(matrix.numpy(), f"{name}.matrix"))
            first.append(helper.make_node("MatMul", [f"{name}.matrix", native], [name]))
    nodes = [*first, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto.SerializeToString()


def _placed(name: str, entry: dict[str, Any], file: str) -> Any:
    """A tensor that lies in a file, as the file's header describes it."""
    from onnx import TensorProto

    kinds = {"F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "F32": TensorProto.FLOAT}
    start, end = entry["data_offsets"]
    tensor = TensorProto(name=name, dims=entry["shape"], data_type=kinds[entry["dtype"]])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": file, "offset": start, "length": end - start}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
