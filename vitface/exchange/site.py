"""The recogniser as a web page: a folder of static files that find, align and compare faces in the visitor's browser.

The page itself is in web/. With it go the graph of `onnx_graph`, YuNet and two files of ONNX Runtime Web, and nothing
else is loaded: index.html has a Content-Security-Policy that allows this folder's own origin only.
"""

import tarfile  # noqa: TID251, for a package of known SHA-256, of which nothing is written
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vitface.data.formats.published import PAIRS
from vitface.data.images import encode_image
from vitface.data.synthetic.render import render_scenes
from vitface.data.synthetic.worlds import SYNTHETIC, TEST_PEOPLE
from vitface.errors import ExchangeError
from vitface.exchange.apart import Stored, backbone_names, read_stored, with_noise, without_backbone
from vitface.exchange.onnx_graph import MIN_COSINE, check_onnx, onnx_bytes, trace
from vitface.files import json_bytes
from vitface.recogniser import Recogniser
from vitface.store.faces import Checkpoint
from vitface.store.sources import SOURCES
from vitface.store.thresholds import Verdict, source_text
from vitface.version import __version__
from vitface.weights.download import fetch_detector, fetch_runtime

PAGE = Path(__file__).parent / "web"
PAGE_FILES = ("index.html", "style.css", "icon.svg", "app.js", "worker.js", "faces.js", "pictures.js")
RUNTIME_FILES = {  # in npm's package -> here; not every server knows .mjs as a script
    "package/dist/ort.wasm.bundle.min.mjs": "ort/ort.wasm.bundle.min.js",
    "package/dist/ort-wasm-simd-threaded.wasm": "ort/ort-wasm-simd-threaded.wasm",
}
Precision = Literal["fp32", "fp16", "int8"]
LEAST = {"fp32": MIN_COSINE, "fp16": 0.9999, "int8": 0.999}  # cosine with PyTorch's embeddings
SMALL = 1024  # numbers in a weight that stays as it is
# of the drawn faces that the page offers: person, yaw in degrees, age, light and the seed of everything else
EXAMPLES = ((4, -10, 0.1, 0.1, 11), (4, 20, 0.2, 0.2, 412), (9, 10, 0.15, 0.1, 413))


def site_files(checkpoint: Checkpoint, precision: Precision = "fp16", apart: bool = False) -> dict[str, bytes]:
    """The page's files by their paths in its folder; the graph's large weights are stored in `precision`.

    With `apart`, no weight of the backbone is in them, and the page asks the visitor for the converted file.
    Fetches ONNX Runtime Web and YuNet where they are not there yet. ExchangeError where the stored graph's embeddings
    differ more from PyTorch's than LEAST.
    """
    model = Recogniser.from_checkpoint(checkpoint, dtype="fp32")
    runtime, detector = runtime_files(fetch_runtime()), fetch_detector().read_bytes()
    stored = read_stored(Path(checkpoint.backbone)) if apart else None
    graph = page_graph(model, precision, stored)
    examples = {f"examples/{n}.png": encode_image(face, "PNG") for n, face in enumerate(drawn(), start=1)}
    about = {**describe(checkpoint, precision), "size": len(graph), "examples": [*examples]}
    if stored:
        about["backbone"] = {**stored.facts, "text": asking(checkpoint.config.backbone)}
    return {
        **{name: (PAGE / name).read_bytes() for name in PAGE_FILES},
        "page.json": json_bytes(about),
        "face.onnx": graph,
        "face_detection_yunet.onnx": detector,
        **runtime,
        **examples,
        "licences.txt": licences(checkpoint.config.backbone).encode(),
    }


def page_graph(model: Recogniser, precision: Precision, stored: Stored | None) -> bytes:
    """The checked graph of a page, which reads the backbone from `stored`; None: it holds it."""
    traced, whole = (with_noise(model.model), backbone_names(model.model)) if stored else (model.model, set())
    graph = stored_as(onnx_bytes(trace(traced, layout="seen"), model, "seen", fold=not stored), precision, whole)
    beside = {}
    if stored:
        graph, beside = without_backbone(graph, model.model, stored), {stored.name: stored.data}
    try:
        check_onnx(graph, model, True, "seen", LEAST[precision], beside)
    except ExchangeError as error:
        more = "" if precision == "fp32" else f"; --precision {'fp16' if precision == 'int8' else 'fp32'} keeps more"
        raise ExchangeError(f"{error}{more}") from None
    return graph


def drawn() -> np.ndarray:
    """The faces of EXAMPLES, uint8 (3, 112, 112, 3): two photos of one person, and one of another."""
    person, yaw, age, light, seed = np.array(EXAMPLES).T
    return render_scenes(TEST_PEOPLE.start + person.astype(int), yaw, age, light, seed.astype(int))[0]


def in_folders(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """{path: contents} as `write_folder` takes them."""
    folders: dict[str, dict[str, bytes]] = {"": {}}
    for path, data in files.items():
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = data
    return folders


def describe(checkpoint: Checkpoint, precision: Precision) -> dict[str, Any]:
    """What the page tells of its model, without names of files, which may be somebody's."""
    config, calibration = checkpoint.config, checkpoint.calibration
    if calibration and calibration.get("source", "lfw") not in PAIRS:
        calibration = {**calibration, "source": "own pairs"}
    domains = config.num_domains
    named = SYNTHETIC.get(str(checkpoint.settings.get("train_data")), ())
    kind = "frozen" if not config.lora_rank else "with LoRA" if domains == 1 else f"with DA-LoRA, {domains} domains"
    return {
        "text": f"{config.backbone} {kind}: {config.embedding_dim} numbers describe a face. Weights stored in "
        f"{precision}, cosine with PyTorch's embeddings at least {LEAST[precision]:g}. Made by vitface {__version__}.",
        "domains": named if len(named) == domains else [f"domain {k}" for k in range(domains)],
        "thresholds": [
            {"far": far, "threshold": threshold, "words": Verdict(0, threshold, far).far_in_words}
            for far, threshold in sorted(checkpoint.thresholds.items())
        ],
        "thresholds_from": source_text(calibration) if calibration else "",
    }


def asking(backbone: str) -> str:
    """Why the page has no backbone, and what its visitor can do."""
    source = SOURCES[backbone]
    return (
        f"This model runs on {source.origin}, whose licence ({source.licence}) keeps it out of this page. Choose your "
        f"own {backbone}.safetensors, which vitface fetch or vitface convert wrote. It stays in your browser."
    )


def licences(backbone: str) -> str:
    """The licences of all that the folder holds."""
    source = SOURCES.get(backbone)
    about = f"{source.origin}, {source.licence}" if source else "ships with vitface, Apache-2.0"
    return (PAGE / "licences.txt").read_text(encoding="utf-8").replace("BACKBONE", f"{backbone} ({about})")


def runtime_files(package: Path) -> dict[str, bytes]:
    """Those of npm's package of ONNX Runtime Web that the page needs."""
    found = {}
    with tarfile.open(package) as archive:
        for member in archive:
            if member.name in RUNTIME_FILES:
                file = archive.extractfile(member)
                assert file
                found[RUNTIME_FILES[member.name]] = file.read()
    return found


def stored_as(graph: bytes, precision: Precision, whole: Set[str] = frozenset()) -> bytes:
    """A graph whose large weights are stored in `precision`; a runtime turns them into float32 once, as it starts.

    Those named in `whole` stay as they are.

    int8: matrices and convolutions alone, with a scale for each row or column, whichever is closer; others in fp16.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if precision == "fp32":
        return graph
    model, first = onnx.load_from_string(graph), []
    for tensor in list(model.graph.initializer):
        weight, name = numpy_helper.to_array(tensor), tensor.name
        if weight.dtype != np.float32 or weight.size < SMALL or name in whole:
            continue
        model.graph.initializer.remove(tensor)
        if precision == "int8" and weight.ndim in (2, 4):
            stored, scale = quantised(weight)
            first += [
                helper.make_node("Cast", [f"{name}.stored"], [f"{name}.whole"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{name}.whole", f"{name}.scale"], [name]),
            ]
            model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
        else:
            stored = weight.astype(np.float16)
            first.append(helper.make_node("Cast", [f"{name}.stored"], [name], to=TensorProto.FLOAT))
        model.graph.initializer.append(numpy_helper.from_array(stored, f"{name}.stored"))
    nodes = [*first, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def quantised(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 of the same shape, scale float32): their product is nearest to `weight` (O, I) or (O, I, P, P)."""
    found = []
    for axes in [(1,), (0,)] if weight.ndim == 2 else [(1, 2, 3)]:
        scale = np.maximum(np.abs(weight).max(axis=axes, keepdims=True), 1e-12) / np.float32(127)
        stored = np.round(weight / scale).astype(np.int8)
        found.append((float(np.square(stored * scale - weight).sum()), stored, scale.astype(np.float32)))
    return min(found, key=lambda each: each[0])[1:]
