"""The page in a headless Chromium, without a network: it computes what PyTorch does, and asks for nothing else."""

import base64
import dataclasses
import functools
import http.server
import json
import shutil
import tarfile  # noqa: TID251
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, chromium
from conftest import TEST_DATA, randomise_adapters, write_thresholds
from PIL import Image

import vitface
from vitface.__main__ import main
from vitface.config import FaceConfig
from vitface.data.faces.alignment import TEMPLATE, align_face
from vitface.data.faces.photos import CropReader
from vitface.errors import WeightsError
from vitface.exchange.site import drawn
from vitface.model.face import FaceModel
from vitface.store.backbone import load_backbone, weights_sha256
from vitface.store.faces import trained_tensors
from vitface.store.sources import Source
from vitface.training.runs.checkpoint import save_checkpoint
from vitface.weights.download import download, fetch_detector, fetch_runtime

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]
AXE = Source(
    "axe-core 4.14.1",
    "MPL-2.0",
    "https://registry.npmjs.org/axe-core/-/axe-core-4.14.1.tgz",
    "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
)
KNOWN = (TEST_DATA, Path.home() / ".cache" / "vitface")  # where what is fetched here may lie already


@pytest.fixture(scope="module")
def fetched(own_cache, tmp_path_factory):
    """A VITFACE_HOME with all that a page is made of."""
    home = tmp_path_factory.mktemp("home")
    for folder in KNOWN:
        for name in ("face_detection_yunet.onnx", "onnxruntime-web-1.30.0.tgz", "axe-core-4.14.1.tgz"):
            if (folder / name).is_file() and not (home / name).exists():
                shutil.copy(folder / name, home / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VITFACE_HOME", str(home))
        try:
            fetch_detector(), fetch_runtime()
        except WeightsError as error:
            pytest.skip(str(error).split("\n")[0])
        yield home


@pytest.fixture(scope="module")
def run(fetched, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "a")


def save_run(run, image_size=112):
    """A DA-LoRA model on vit_nano, of three domains that differ, and a threshold between the page's own pairs."""
    vit = load_backbone("vit_nano", image_size=image_size)
    config = FaceConfig(
        "vit_nano",
        weights_sha256("vit_nano", None),
        vit.config,
        vit.image_size,
        lora_rank=2,
        num_domains=3,
        head="linear",
    )
    model = FaceModel(vit, config).eval()
    randomise_adapters(model)
    with torch.no_grad():
        model.router.fc2.weight.mul_(20)
        for layer in model.vit.modules():
            if getattr(layer, "has_lora", False):
                layer.lora_b.mul_(0.2)
    save_checkpoint(run, 1, trained_tensors(model), dataclasses.asdict(config), {}, {}, is_best=True)
    (run / "config.json").write_text(json.dumps({"train_data": "synthetic"}))
    same, other = (
        vitface.load(run, dtype="fp32").embed(list(drawn())) @ vitface.load(run, dtype="fp32").embed(drawn()[:1])[0]
    )[1:]
    assert same > other + 0.02
    between = float(same + other) / 2
    write_thresholds(run, {"0.01": {"threshold": -0.5, "tar": 1.0}, "0.001": {"threshold": between, "tar": 1.0}})
    return run


@pytest.fixture(scope="module")
def site(run, tmp_path_factory):
    """What the export writes, behind Python's own web server: its address."""
    out = tmp_path_factory.mktemp("site") / "site"
    assert main(["export", str(run), "--format", "web", "--out", str(out)]) == 0
    with serve(out) as address:
        yield address


@contextmanager
def serve(folder):
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def open_page(browser, site, **how):
    browser.open(site, **how)
    browser.wait("document.querySelector('#status').textContent.startsWith('The model is ready')")


def put(browser, side, path):
    """Chooses a photo for a side, and waits for what the page says of it."""
    note = f"document.querySelectorAll('.photo .note')[{side}].textContent"
    browser.run(f"{note} = ''")
    browser.choose(f"document.querySelectorAll('.photo input')[{side}]", path)
    return browser.wait(f"!{note}.startsWith('Looking') && {note}")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of the page's drawn faces: two of one person, and one of another."""
    paths = [tmp_path_factory.mktemp("photos") / f"{number}.png" for number in range(3)]
    for path, face in zip(paths, drawn(), strict=True):
        Image.fromarray(face).save(path)
    return paths


def text_of(browser, selector):
    return browser.run(f"document.querySelector('{selector}').textContent")


def test_a_same_and_a_different_pair_get_pytorchs_scores(site, run, browser, photos):
    model = vitface.load(run, dtype="fp32")
    rows, weights = model.embed(drawn()), model.domain_weights(drawn())
    open_page(browser, site)
    taken = put(browser, 0, photos[0])
    assert taken.startswith("Taken as an aligned crop, as it has 112 × 112 pixels; computed in ")
    for number, verdict in ((1, "The same person"), (2, "Different people")):
        put(browser, 1, photos[number])
        assert text_of(browser, "#verdict") == verdict
        cosine = float(browser.run("document.querySelector('#answer').dataset.cosine"))
        assert abs(cosine - rows[0] @ rows[number]) < 1e-3
        cells = "[...t.rows].map(r => r.innerText.trim().split(/\\s+/))"
        bars = browser.run(f"[...document.querySelectorAll('.bars')].map(t => {cells})")
        for side, photo in enumerate((0, number)):
            assert [row[0] for row in bars[side]] == ["pose", "age", "light"]
            np.testing.assert_allclose([float(row[1]) for row in bars[side]], weights[photo], atol=0.006)
    reason = text_of(browser, "#reason")
    assert "FAR 0.001: 1 in 1,000 pairs of different people passes for the same" in reason
    assert "people held out of training, 9 same and 30,000 different pairs" in reason
    browser.run("(s => { s.value = 1; s.dispatchEvent(new Event('change')) })(document.querySelector('#far select'))")
    assert text_of(browser, "#verdict") == "The same person"  # of FAR 0.01, -0.5
    asked = {address.removeprefix(site) for address in browser.requests if not address.startswith("blob:")}
    assert asked - {"icon.svg"} == {
        *("", "style.css", "app.js", "pictures.js", "page.json", "worker.js", "faces.js", "face.onnx"),
        *("ort/ort.wasm.bundle.min.js", "ort/ort-wasm-simd-threaded.wasm"),
    }
    assert browser.faults == []


def test_everybody_can_use_it(site, browser, fetched, photos, tmp_path):
    """axe-core finds nothing, nothing is wider than the screen, and all can be reached without a mouse."""
    open_page(browser, site, width=390)
    put(browser, 0, photos[0]), put(browser, 1, photos[1])
    browser.run("document.querySelector('#gallery input').value = 'Ada'")
    browser.run("document.querySelector('#gallery form').requestSubmit()")
    assert text_of(browser, "#gallery .note") == "Ada is in the list."
    assert "earest in the list: Ada, cosine 1.0000, the same person" in put(browser, 1, photos[0])
    browser.run("document.querySelector('#look').click()")
    label = browser.run("document.querySelector('.drop canvas').getAttribute('aria-label')")
    assert "; the model looks most at its " in label
    seen = "[...document.querySelectorAll('button, input, select, a')].filter(e => e.checkVisibility())"
    assert browser.run(f"{seen}.every(e => e.tabIndex === 0)")
    browser.run(axe(fetched))
    for width, dark in ((390, False), (390, True), (1280, False), (1280, True)):
        browser.look(width, dark)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        found = browser.run("axe.run().then(r => r.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html)]))")
        assert found == [], (width, dark)
        (tmp_path / f"{width}-{dark}.png").write_bytes(browser.screenshot())


def axe(home):
    """The source of axe-core; the test is skipped where it cannot be had."""
    file = home / "axe-core-4.14.1.tgz"
    try:
        if not file.is_file():
            download(AXE, file)
    except WeightsError as error:
        pytest.skip(str(error).split("\n")[0])
    with tarfile.open(file) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


def test_the_policy_holds_in_the_page_and_in_its_worker(site, browser):
    browser.open(site)
    ask = "fetch('https://example.org/').then(() => 'sent', () => 'blocked')"
    script = f"new Worker(URL.createObjectURL(new Blob(['{ask.replace(chr(39), chr(34))}.then(postMessage)'])))"
    assert browser.run(ask) == "blocked"
    assert browser.run(f"new Promise((found) => {{ ({script}).onmessage = (e) => found(e.data) }})") == "blocked"
    assert str(browser.faults).count("violates the following Content Security Policy directive") >= 2
    browser.faults.clear()


def test_the_camera_and_files_that_are_no_faces(site, browser, tmp_path):
    (tmp_path / "not.jpg").write_text("text")
    Image.new("RGB", (400, 300), "green").save(tmp_path / "green.jpg")
    Image.new("RGB", (9, 9)).save(tmp_path / "tiny.png")
    open_page(browser, site)
    assert put(browser, 0, tmp_path / "not.jpg").startswith("This file is no image that the browser can show")
    assert put(browser, 0, tmp_path / "tiny.png") == "9 × 9 pixels are too few for a face."
    assert put(browser, 0, tmp_path / "green.jpg").startswith(
        "No face found in 400 × 300 pixels; take one that shows it whole"
    )
    browser.run("document.querySelectorAll('.camera')[1].click()")
    browser.wait("document.activeElement === document.querySelector('.take')")
    browser.run("document.querySelector('.take').click()")
    assert browser.wait("/No face found/.test(document.querySelectorAll('.photo .note')[1].textContent)")
    assert browser.run("document.querySelector('video').srcObject") is None
    assert text_of(browser, "#verdict") == "No answer yet"


def crop_in(browser, make, path):
    """The crop that a script makes of a photo."""
    script = """(async () => {
      const pictures = await import('./pictures.js'), faces = await import('./faces.js');
      const bytes = Uint8Array.from(atob('%s'), (c) => c.charCodeAt(0));
      const picture = await pictures.decode(new Blob([bytes]));
      return btoa(String.fromCharCode(...(await %s).crop.data));
    })()"""
    found = browser.run(script % (base64.b64encode(path.read_bytes()).decode(), make))
    return np.frombuffer(base64.b64decode(found), np.uint8).reshape(112, 112, 3).astype(int)


def test_landmarks_give_the_crop_of_vitface_align(site, browser, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "photo.png"
    browser.open(site)
    for face, angle, scale in zip(drawn(), (0, 0.7, -2.5), (1.4, 0.6, 2.2), strict=True):
        Image.fromarray(face).resize((300, 260)).save(path)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        landmarks = (TEMPLATE - 56) @ turn + (150, 130) + rng.normal(0, 2, (5, 2))
        expected = align_face(np.asarray(Image.open(path)), landmarks).astype(int)
        found = crop_in(browser, f"faces.cropAt(picture, {landmarks.tolist()})", path)
        assert np.abs(found - expected).max() <= 1


def test_photos_give_the_crops_of_vitface_align(site, browser, real_data, tmp_path):
    real = sorted((real_data / "raw_faces").glob("*.jpg"))[::9]
    large, turned = tmp_path / "large.png", tmp_path / "turned.jpg"
    Image.open(real[0]).resize((900, 900)).save(large)
    Image.open(real[1]).transpose(Image.Transpose.ROTATE_270).save(turned, quality=95)
    browser.open(site)
    detect = """(async () => {
      const ort = await import('./ort/ort.wasm.bundle.min.js');
      ort.env.wasm.numThreads = 1;
      const session = await ort.InferenceSession.create('face_detection_yunet.onnx');
      self.detect = async (data, shape) => {
        const found = await session.run({ input: new ort.Tensor('float32', data, shape) });
        return Object.fromEntries(Object.entries(found).map(([name, tensor]) => [name, tensor.data]));
      };
    })()"""
    browser.run(detect)
    for path in (*real, large, turned):
        expected = CropReader(True)(path).astype(int)
        assert np.abs(crop_in(browser, "faces.align(picture, detect)", path) - expected).mean() <= 2, path
