"""The page in a browser: its files, what serves and publishes it. tests/exchange/test_browser.py opens it."""

import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile  # noqa: TID251
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import optional
from PIL import Image
from runs import EMBEDDING, NAME, face_on, faces, save_run, use_tiny

from vitface.__main__ import main
from vitface.commands.photos.demo import DemoServer
from vitface.errors import ExchangeError
from vitface.exchange import publishing, site
from vitface.exchange.site import LEAST, PAGE, PAGE_FILES, RUNTIME_FILES, describe, runtime_files, stored_as
from vitface.store.faces import open_checkpoint
from vitface.store.sources import SOURCES, Source


def test_the_page_holds_all_that_it_loads_and_may_load_nothing_else():
    texts = {name: (PAGE / name).read_text(encoding="utf-8") for name in PAGE_FILES}
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', texts["index.html"])
    assert policy and policy[1].startswith("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; ")
    assert not re.search(r"unsafe-inline|unsafe-eval'(?<!wasm-unsafe-eval')|http|\*|data:", policy[1])
    for name, text in texts.items():
        assert not re.search(r"https?://\w(?!ww\.w3\.org)", text), name
        assert "eval(" not in text and "document.write" not in text
    assert not re.search(r"<script(?! type=\"module\" src)|<style|\sstyle=|\son\w+=", texts["index.html"])
    named = set(re.findall(r"(?:src|href)=\"([^\"]+)\"", texts["index.html"]))
    named |= {
        name
        for text in texts.values()
        for name in re.findall(r"(?:from|URL\(|open\(|fetch\()\s*'(?:\./)?([\w./]+)'", text)
    }
    written = {
        *PAGE_FILES,
        *RUNTIME_FILES.values(),
        "licences.txt",
        "page.json",
        "face.onnx",
        "face_detection_yunet.onnx",
    }
    assert named - {"."} <= written


def test_two_files_of_the_package_are_taken_and_no_other_is_looked_at(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("../../outside", "package/dist/ort.min.js", *RUNTIME_FILES):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    (tmp_path / "package.tgz").write_bytes(gzip.compress(buffer.getvalue()))
    found = runtime_files(tmp_path / "package.tgz")
    assert found == {here: name.encode() for name, here in RUNTIME_FILES.items()}
    assert [path.name for path in tmp_path.iterdir()] == ["package.tgz"]


@pytest.mark.parametrize(("precision", "share"), [("fp16", 0.55), ("int8", 0.32)])
def test_stored_weights_are_smaller_and_compute_nearly_the_same(precision, share):
    onnx, onnxruntime = optional("onnx"), optional("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    spread = np.exp(rng.normal(size=(1, 96)))  # columns of very different size, each of which needs its own scale
    weights = {
        "patches": rng.normal(size=(64, 3, 8, 8)),
        "matrix": rng.normal(size=(64, 96)) * spread,
        "bias": rng.normal(size=96),
    }
    nodes = [
        helper.make_node("Conv", ["x", "patches"], ["a"], strides=[8, 8]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "matrix"], ["d"]),
        helper.make_node("Add", ["d", "bias"], ["y"]),
    ]
    taken, given = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [4, 3, 32, 32]), ("y", [4, 96]))
    )
    stored = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [taken], [given], stored),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    whole = model.SerializeToString()
    smaller = stored_as(whole, precision)
    assert len(smaller) < share * len(whole) and stored_as(whole, "fp32") == whole
    x = rng.normal(size=(4, 3, 32, 32)).astype(np.float32)
    first, second = (
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for data in (whole, smaller)
    )
    cosine = (first * second).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)
    assert LEAST[precision] <= cosine.min() and not np.array_equal(first, second)
    assert onnx.load_from_string(smaller).ir_version == 8


def test_the_page_tells_thresholds_and_no_name_of_a_file(monkeypatch, tmp_path):
    run = save_run(tmp_path / "run", face_on(use_tiny(monkeypatch, tmp_path / "home"), num_domains=3))
    thresholds = json.loads((run / "thresholds.json").read_text())
    (run / "thresholds.json").write_text(json.dumps({**thresholds, "source": "anna and bob.csv"}))
    about = describe(open_checkpoint(run), "fp16")
    assert about["thresholds"] == [
        {
            "far": 0.01,
            "threshold": 0.25,
            "words": "FAR 0.01: 1 in 100 pairs of different people passes for the same",
        }
    ]
    assert about["thresholds_from"] == "own pairs, 40 same and 900 different pairs"
    assert about["domains"] == ["domain 0", "domain 1", "domain 2"]
    described = f"{NAME} with DA-LoRA, 3 domains: 8 numbers describe a face. Weights stored in fp16, "
    assert about["text"].startswith(described)
    monkeypatch.setattr(open_checkpoint(run).__class__, "settings", {"train_data": "synthetic"})
    assert describe(open_checkpoint(run), "fp16")["domains"] == ("pose", "age", "light")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "web", "--no-flip"], "which hold with the mirror image only"),
        (["--format", "onnx", "--precision", "int8"], "--precision goes with --format web"),
        (["--format", "web", "--layout", "nchw"], "--layout goes with --format onnx or torch"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, tmp_path, capsys):
    assert main(["export", "vit_nano", *flags, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_weights_that_are_too_coarse_are_refused_with_what_keeps_more(monkeypatch):
    def differ(*_):
        raise ExchangeError("ONNX Runtime's embeddings differ (cosine 0.9); nothing was written")

    monkeypatch.setattr(site, "check_onnx", differ)
    monkeypatch.setattr(site, "trace", lambda *_, **__: None)
    monkeypatch.setattr(site, "onnx_bytes", lambda *_, **__: b"")
    monkeypatch.setattr(site, "stored_as", lambda graph, *_: graph)
    monkeypatch.setattr(site, "fetch_runtime", lambda: None)
    monkeypatch.setattr(site, "fetch_detector", lambda: Path(__file__))
    monkeypatch.setattr(site, "runtime_files", lambda package: {})
    for precision, hint in {
        "int8": "; --precision fp16 keeps more",
        "fp16": "; --precision fp32 keeps more",
        "fp32": "",
    }.items():
        with pytest.raises(ExchangeError, match=re.escape(f"nothing was written{hint}") + "$"):
            site.site_files(open_checkpoint("vit_nano"), precision)


# ---- vitface demo


@pytest.fixture
def server():
    with DemoServer({"index.html": b"<p>", "ort/a.js": b"1", "b.wasm": b"\0asm"}) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(address, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=10) as response:  # noqa: S310
            return response.status, response.headers["Content-Type"], response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, "", b""


def test_the_demo_serves_its_files_to_this_machine(server):
    assert server.server_address[0] == "127.0.0.1"
    assert ask(server.address) == (200, "text/html; charset=utf-8", b"<p>")
    assert ask(f"{server.address}ort/a.js?x=1") == (200, "text/javascript", b"1")
    assert ask(f"{server.address}b.wasm") == (200, "application/wasm", b"\0asm")
    for path in ("ort", "../pyproject.toml", "%2e%2e/pyproject.toml", "/etc/passwd", "page.json"):
        assert ask(server.address + path)[0] == 404, path


def test_the_demo_answers_to_no_other_name(server):
    assert ask(server.address, Host=f"localhost:{server.server_port}")[0] == 200
    for host in (
        "evil.example",
        "localhost.evil.example",
        f"evil.example:{server.server_port}",
        "127.0.0.1.evil.example",
    ):
        assert ask(server.address, Host=host)[0] == 421


def test_a_port_that_is_taken_is_said(server, monkeypatch, capsys):
    optional("onnxruntime"), optional("onnxscript")
    monkeypatch.setattr("vitface.exchange.site.site_files", lambda checkpoint, precision: {})
    assert main(["demo", "vit_nano", "--port", str(server.server_port), "--no-browser"]) == 2
    err = capsys.readouterr().err
    assert f"port {server.server_port} cannot be used (Address already in use); without --port, a free one is" in err


def test_the_demo_opens_the_browser_and_ctrl_c_ends_it(monkeypatch, capsys):
    optional("onnxruntime"), optional("onnxscript")
    opened = []

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("vitface.exchange.site.site_files", lambda checkpoint, precision: {})
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(DemoServer, "serve_forever", interrupt)
    assert main(["demo", "vit_nano"]) == 0 and main(["demo", "vit_nano", "--no-browser"]) == 0
    shown = capsys.readouterr()
    assert len(opened) == 1 and f"{opened[0]} shows it, on this machine only" in shown.out and "stopped" in shown.err


# ---- vitface publish --space

PAGE_OF_A_TEST = {
    "index.html": b"<p>",
    "page.json": b'{"thresholds_from": "lfw, 3 same and 3 different pairs"}',
    "face.onnx": b"graph",
    "ort/a.js": b"1",
    "examples/1.png": b"drawn",
}


def page_of_a_test(checkpoint, apart):
    asking = {"page.json": b'{"thresholds_from": "", "backbone": {"text": "Choose your own file."}}'}
    return {**PAGE_OF_A_TEST, **(asking if apart else {})}


@pytest.fixture
def run(monkeypatch, tmp_path):
    optional("onnxruntime"), optional("onnxscript")
    monkeypatch.chdir(tmp_path)
    backbone = use_tiny(monkeypatch, tmp_path / "home")
    (tmp_path / "people" / "Alice_Example").mkdir(parents=True)
    Image.fromarray(faces(1)[0]).save(tmp_path / "people" / "Alice_Example" / "1.png")
    monkeypatch.setattr(publishing, "site_files", page_of_a_test)
    return save_run(tmp_path / "run", face_on(backbone, num_domains=3), train_data="people")


def publish(*more: str) -> int:
    return main(["publish", "run", "--space", "me/same-person", "--out", "out", *more])


DATA = ("--data", "one person who agreed")


def test_a_space_is_a_dry_run_first_and_then_the_page_and_its_card(run, uploaded, tmp_path, capsys):
    assert publish() == 2 and "describe the training data with --data" in capsys.readouterr().err
    assert publish(*DATA) == 0 and not uploaded
    out = capsys.readouterr().out
    assert "dry run: nothing was uploaded" in out and "nothing is an identity, a photo or an embedding" in out
    assert publish("--upload") == 0
    assert {name: data for name, data in uploaded.items() if name != "README.md"} == PAGE_OF_A_TEST
    card = uploaded["README.md"].decode()
    assert card.startswith('---\ntitle: "same-person"\nsdk: static\napp_file: index.html\n')
    assert "license_name: non-commercial-research" in card and "one person who agreed" in card
    assert "from lfw, 3 same and 3 different pairs" in card


def write(name, data):
    def plant(out, tmp_path):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(data if isinstance(data, bytes) else (tmp_path / data).read_bytes())

    return plant


def add(name, text):
    return lambda out, tmp_path: (out / name).write_text((out / name).read_text() + text)


def link(out, tmp_path):
    (out / "page.json").unlink()
    (out / "page.json").symlink_to(tmp_path / "run" / "config.json")


PHOTO, NOT_WRITTEN = "people/Alice_Example/1.png", "is not what vitface writes for this model"
LEAKS = {
    "a photo": (write("photo.png", PHOTO), "photo.png is not part of a page"),
    "a photo for an example": (write("examples/1.png", PHOTO), NOT_WRITTEN),
    "a photo among the examples": (write("examples/4.png", PHOTO), "4.png is not part of a page"),
    "a photo in a folder of its own": (write("assets/1.png", PHOTO), "assets is not part of a page"),
    "a gallery": (write("people.npy", b"\x93NUMPY"), "people.npy is not part of a page"),
    "embeddings in the page's settings": (add("page.json", json.dumps(EMBEDDING)), NOT_WRITTEN),
    "a name in the page": (add("index.html", "Alice Example"), NOT_WRITTEN),
    "a script": (add("ort/a.js", "fetch('https://evil.example')"), NOT_WRITTEN),
    "another graph": (write("face.onnx", b"with identities"), NOT_WRITTEN),
    "the identity matrix": (write("training.safetensors", b"{}"), "training.safetensors is not part of a page"),
    "the run's settings by a link": (link, "page.json is not part of a page"),
    "a hidden file": (write(".env", b"TOKEN=1"), ".env is not part of a page"),
    "a name in the card": (add("README.md", "Thanks to Alice Example!"), "the name of somebody"),
    "a path in the card": (add("README.md", "trained on /home/alice/photos"), "a path on a machine"),
    "a token in the card": (add("README.md", "hf_" + "aB3" * 11), "a Hugging Face token"),
    "a photo in the card": (add("README.md", "![](data:image/png;base64,iVBORw0KGgo=)"), "an image"),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_planted_in_a_space_is_refused(run, uploaded, tmp_path, leak, capsys):
    assert publish(*DATA) == 0
    plant, message = LEAKS[leak]
    plant(tmp_path / "out", tmp_path)
    assert publish("--upload") == 2 and not uploaded
    assert message in capsys.readouterr().err


def test_the_words_of_the_card_itself_name_nobody(run, tmp_path, capsys):
    """Somebody may be called as a word that vitface writes; in the user's words, the name is found with its line."""
    for name in ("person-01", "Lora", "May"):
        (tmp_path / "people" / "Alice_Example").with_name(name).mkdir()
        Image.fromarray(faces(1)[0]).save(tmp_path / "people" / name / "1.png")
    assert publish("--data", "one person, drawn") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "lora" in card.lower() and "person" in card
    for words, name in (("Lora agreed.", "Lora"), ("Person 01 agreed.", "person-01")):
        (tmp_path / "out" / "README.md").write_text(card + words)
        assert publish() == 2
        assert f"in the training data ({name}, line {card.count(chr(10)) + 1})" in capsys.readouterr().err


def test_a_backbone_that_others_may_not_have_is_asked_of_visitors(run, uploaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SOURCES, NAME, Source("somebody's ViT", "for non-commercial research only"))
    assert publish(*DATA) == 0 and publish("--upload") == 0
    said = "the page is without its backbone, and asks each visitor for it: Choose your own file."
    assert capsys.readouterr().out.count(said) == 2
    assert b'"backbone"' in uploaded["page.json"] and "- Choose your own file." in uploaded["README.md"].decode()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setitem(SOURCES, NAME, Source("somebody's ViT", "MIT"))
    assert publish(*DATA) == 0 and "visitor" not in capsys.readouterr().out


def test_random_weights_are_nobodys(monkeypatch):
    monkeypatch.setitem(SOURCES, "vit_nano", Source("somebody's ViT", "for non-commercial research only"))
    monkeypatch.setattr(publishing, "site_files", lambda checkpoint, apart: apart)
    assert publishing.space_files(open_checkpoint("vit_nano", "random")) is False
    assert publishing.space_files(open_checkpoint("vit_nano")) is True


def test_every_licence_of_a_backbone_is_judged():
    free = {name for name, source in SOURCES.items() if source.licence in publishing.REDISTRIBUTABLE}
    kept = {name for name in SOURCES if name.startswith(("dinov3", "eupe", "lvface", "adaface"))}
    assert kept == set(SOURCES) - free


def test_a_space_is_created_as_static(run, uploaded, monkeypatch):
    huggingface_hub, asked = optional("huggingface_hub"), []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **options: asked.append((name, options)) or "https://x"
    )
    assert publish(*DATA) == 0 and publish("--upload") == 0
    assert asked == [
        ("me/same-person", {"private": True, "exist_ok": True, "repo_type": "space", "space_sdk": "static"})
    ]


def test_the_pinned_package_is_the_one_that_is_kept(tmp_path, monkeypatch):
    from vitface.weights import download

    data = b"a package"
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path))
    monkeypatch.setattr(
        download, "RUNTIME", Source("x", "MIT", "https://host/p-1.tgz", hashlib.sha256(data).hexdigest())
    )
    monkeypatch.setattr(download, "download", lambda source, file: file.write_bytes(data))
    (tmp_path / "p-1.tgz").write_bytes(b"damaged")
    assert download.fetch_runtime().read_bytes() == data
    monkeypatch.delattr(download, "download")
    assert download.fetch_runtime() == tmp_path / "p-1.tgz"  # is not fetched again
