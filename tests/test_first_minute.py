"""The first minute with a recogniser: README's "Your own photos", word for word, and what the quickstart adds to it.

A recogniser with random weights is saved as LVFace's .pt, and `fetch` gets it from a server on this machine. By default
it is a small one, photos are drawn and the detector is a stub; under `-m slow` it has the shapes of LVFace-T.
"""

import dataclasses
import hashlib
import json
import re
import shlex
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import optional
from PIL import Image
from test_docs import ROOT, command_lines, marked_blocks, run_line

import vitface
from vitface.__main__ import main
from vitface.data.faces.alignment import TEMPLATE
from vitface.data.faces.detect import Face, FaceDetector
from vitface.data.formats.pairs import write_bin
from vitface.data.images import encode_image
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.model.vit import ViT, init_weights
from vitface.presets import VIT_PRESETS
from vitface.store.faces import open_checkpoint
from vitface.store.settings import read_epochs
from vitface.store.sources import SOURCES
from vitface.weights.download import fetch_backbone

PEOPLE, PHOTOS, MARGIN = 22, 5, 24
SMALL = dict(patch_size=28, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0)


def lvface_file(path, config):
    """Random weights under the names of LVFace's files; random ones of a ViT tell drawn people apart a little."""
    vit = ViT(config, 112)
    init_weights(vit, 1)
    state = {name: tensor * (3 if tensor.dim() > 1 else 1) for name, tensor in vit.state_dict().items()}
    parts, theirs = ("pool.fc1", "pool.norm1", "pool.fc2", "pool.norm2"), {}
    for name, tensor in state.items():
        for i, ours in enumerate(parts):
            name = name.replace(ours, f"feature.{i}")
        theirs[name] = tensor
    theirs |= {f"feature.{i}.num_batches_tracked": torch.tensor(5) for i in (1, 3)}
    torch.save({**theirs, "mask_token": torch.zeros(1, 1, config.embed_dim)}, path)


@pytest.fixture(params=["small", pytest.param("lvface_t", marks=pytest.mark.slow)])
def place(request, tmp_path, monkeypatch):
    """Photos of 22 people, a.jpg and b.jpg, a data/lfw.bin of their crops, and LVFace's file on a server."""
    config = VIT_PRESETS["lvface_t"]
    config = dataclasses.replace(config, **SMALL) if request.param == "small" else config
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setitem(VIT_PRESETS, "lvface_b", config)
    face = Face(np.array([MARGIN + 20.0, MARGIN + 20, 72, 80]), TEMPLATE + MARGIN, 0.9)
    monkeypatch.setattr(FaceDetector, "__init__", lambda self, model=None: None)
    monkeypatch.setattr(FaceDetector, "detect", lambda self, image: [face])
    samples = SyntheticSamples(PEOPLE, PHOTOS)
    crops = [samples.read(i) for i in range(PEOPLE * PHOTOS)]
    for i, crop in enumerate(crops):
        photo = Image.fromarray(np.pad(crop, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge"))
        path = tmp_path / "photos" / f"person-{samples.labels[i]}" / f"{i % PHOTOS}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.save(path, quality=95)
        if i in (0, 1):
            photo.save(tmp_path / ("a.jpg", "b.jpg")[i], quality=95)
    chosen = np.random.default_rng(0)
    same = np.arange(6000) % 2 == 0
    first = chosen.integers(0, len(crops), 6000)
    second = np.where(same, first // PHOTOS * PHOTOS + (first + 1) % PHOTOS, (first + PHOTOS) % len(crops))
    encoded = [encode_image(crop, "PNG") for crop in crops]
    (tmp_path / "data").mkdir()
    write_bin(tmp_path / "data" / "lfw.bin", [encoded[i] for i in np.stack([first, second], 1).ravel()], same)
    (tmp_path / "server").mkdir()
    lvface_file(tmp_path / "server" / "LVFace.pt", config)
    digest = hashlib.sha256((tmp_path / "server" / "LVFace.pt").read_bytes()).hexdigest()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "server"))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/LVFace.pt"
        monkeypatch.setitem(SOURCES, "lvface_b", dataclasses.replace(SOURCES["lvface_b"], url=url, sha256=digest))
        yield tmp_path
        server.shutdown()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_section_of_the_readme(place, capsys):
    (block,) = marked_blocks((ROOT / "README.md").read_text(encoding="utf-8"), "test_first_minute.py")
    lines = command_lines(block)
    assert [shlex.split(line)[1] for line in lines] == [
        *("fetch", "fetch", "calibrate", "verify", "embed", "search", "align", "train.py")
    ]
    codes, printed = {}, {}
    for line in lines:
        if line == "vitface fetch yunet":
            continue
        name = shlex.split(line)[1]
        codes[name] = run_line(line)
        printed[name] = capsys.readouterr().out
    assert {name: code for name, code in codes.items() if name not in ("verify", "search")} == dict.fromkeys(
        ("fetch", "calibrate", "embed", "align", "train.py"), 0
    )
    before = printed["fetch"].splitlines()[:3]
    assert "LVFace" in before[0] and " MB" in before[0] and "non-commercial research only" in before[1]
    assert before[2].split()[1] == SOURCES["lvface_b"].sha256
    assert "thresholds on the cosine, from lfw, 3,000 same and 3,000 different pairs" in printed["calibrate"]
    assert re.search(r"FAR 0\.01: -?\d\.\d{4}, accepts", printed["calibrate"])
    verdict = printed["verify"]
    assert verdict.startswith(("same person", "different people")[codes["verify"]]) and "FAR 0.01" in verdict
    assert "threshold from lfw, 3,000 same and 3,000 different pairs" in verdict
    assert f"people: {PEOPLE * PHOTOS} images" in printed["embed"] and "--backbone lvface_b" in printed["embed"]
    assert re.search(
        r"a\.jpg: cosine and person, threshold .*\n +1\.0000  person-0  \(person-0/0\.jpg\)", printed["search"]
    )
    check_training(printed["train.py"], place)


def check_training(text, place):
    """The recogniser's figures come first and last: held-out people, and LFW before and after in one table."""
    assert "starts at the mean embeddings of 20 people" in text
    assert text.index("epoch 0/3  held-out AUC") < text.index("epoch 1/3")
    page = (place / "runs" / "mine" / "results.md").read_text(encoding="utf-8")
    assert page.index("## frozen recogniser") < page.index("## adapted")
    assert len(re.findall(r"^lfw ", page, re.MULTILINE)) == 2
    assert [row["epoch"] for row in read_epochs(place / "runs" / "mine")] == ["0", "1", "2", "3"]
    assert open_checkpoint(place / "runs" / "mine").config.head == "pretrained"


def test_what_else_takes_a_recogniser(place, capsys, monkeypatch):
    """evaluate, info, load, cluster, verify without and with a threshold of one's own, and what contradicts itself."""
    fetch_backbone("lvface_b")
    assert main(["verify", "a.jpg", "b.jpg", "--backbone", "lvface_b"]) == 2
    assert "vitface calibrate" in capsys.readouterr().err
    assert main(["calibrate", "--backbone", "lvface_b", "--bench", "lfw"]) == 0
    assert main(["evaluate", "--backbone", "lvface_b", "--bench", "all"]) == 0
    assert "lfw " in capsys.readouterr().out
    assert main(["verify", "a.jpg", "b.jpg", "--backbone", "lvface_b", "--json"]) in (0, 1)
    result = json.loads(capsys.readouterr().out)
    assert result["far"] == 0.01 and result["threshold_from"].startswith("lfw, ")
    model = vitface.load("lvface_b")
    assert model.thresholds == {0.01: pytest.approx(result["threshold"], abs=1e-6)}
    verdict = model.verify("a.jpg", "b.jpg")
    assert verdict.score == pytest.approx(result["score"], abs=2e-2) and verdict.far == 0.01
    assert main(["info", "lvface_b"]) == 0
    printed = capsys.readouterr().out
    assert "lfw, 3,000 same and 3,000 different pairs" in printed and "non-commercial research only" in printed
    assert main(["embed", "photos", "people", "--backbone", "lvface_b"]) == 0
    assert main(["cluster", "people"]) == 0
    assert main(["calibrate", "--checkpoint", "runs/none", "--backbone", "lvface_b", "--bench", "lfw"]) == 2
    assert "either --checkpoint or --backbone" in capsys.readouterr().err
    assert main(["verify", "a.jpg", "b.jpg", "--backbone", "lvface_b", "--image-size", "224"]) == 2
    assert "takes images of 112 px, not 224" in capsys.readouterr().err
    assert main(["calibrate", "--backbone", "lvface_b", "--weights", "random", "--bench", "lfw"]) == 2
    assert "no file to store a threshold beside" in capsys.readouterr().err
    few = [encode_image(SyntheticSamples(2, 2).read(i), "PNG") for i in (0, 1, 2, 0, 2, 3, 1, 2)]
    write_bin(place / "mine.bin", few, [True, False, True, False])
    assert main(["calibrate", "--backbone", "lvface_b", "--bench", "mine.bin"]) == 2
    assert "too few pairs" in capsys.readouterr().err


@pytest.mark.slow
def test_a_recogniser_is_exported(place, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        optional(package)
    fetch_backbone("lvface_b")
    assert main(["export", "lvface_b", "--format", "onnx", "--out", "face.onnx"]) == 0
    cosine = re.search(r"cosine with PyTorch at least (\d\.\d+)", capsys.readouterr().out)
    assert cosine and float(cosine[1]) > 0.9999
    assert main(["export", "lvface_b", "--format", "merged", "--out", "merged"]) == 2
    assert "without adapters" in capsys.readouterr().err
