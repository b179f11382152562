"""ONNX files for programs that expect what InsightFace's model zoo has."""

import json
from pathlib import Path

import numpy as np
import pytest
from cases import case
from conftest import optional, tiny_recogniser

from vitface.exchange.onnx_graph import as_input, check_onnx, onnx_bytes, trace

KIND = "API"
onnx, onnxruntime = optional("onnx"), optional("onnxruntime")
optional("onnxscript")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nchw():
    """A DA-LoRA model, and its ONNX file in InsightFace's layout."""
    model = tiny_recogniser(num_domains=3)
    return model, onnx_bytes(trace(model.model, True, "nchw"), model, "nchw")


@case("`vitface export --format onnx --layout nchw`", "float32 (B, 3, 112, 112), (pixel - 127.5) / 127.5, one output")
def test_the_layout_of_insightfaces_models(nchw):
    model, data = nchw
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    assert taken.type == "tensor(float)" and taken.shape[1:] == [3, 112, 112] and given.name == "embeddings"
    crops = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    blob = np.stack([(crop.astype(np.float32) - 127.5) / 127.5 for crop in crops]).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(session.run(None, {"images": blob})[0], model.embed(crops), atol=5e-5)
    np.testing.assert_array_equal(blob, as_input(crops, "nchw"))
    assert check_onnx(data, model, True, "nchw") > 0.99999


@case("an ONNX file for a runtime of 2023", "IR 8, opset 18, and no path of the machine in it")
def test_the_lowest_ir_version(nchw):
    proto = onnx.load_from_string(nchw[1])
    assert proto.ir_version == 8 and [(item.domain, item.version) for item in proto.opset_import] == [("", 18)]
    assert str(Path(__file__).parents[2]).encode() not in nchw[1] and b".py" not in nchw[1]
    described = json.loads({item.key: item.value for item in proto.metadata_props}["vitface"])
    assert described["images"].startswith("aligned faces, float32 RGB (B, 3, 112, 112)")


@case("the file in `insightface.model_zoo`", "recognised as ArcFace, fed (pixel - 127.5) / 127.5")
def test_what_insightface_looks_for(nchw):
    """Its router wants 112 x 112 and one output; a node named Sub... and one named Mul... would make it feed pixels."""
    graph = onnx.load_from_string(nchw[1]).graph
    shape = [size.dim_value for size in graph.input[0].type.tensor_type.shape.dim]
    assert shape[2:] == [112, 112] and len(graph.output) == 1
    assert not any(node.name.startswith(("Sub", "_minus", "Mul", "_mul")) for node in graph.node[:8])
