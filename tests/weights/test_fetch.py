"""Downloads against a server on localhost: whole, broken, resumed, replaced, refused; and what to do by hand."""

import contextlib
import dataclasses
import hashlib
import os
import shlex
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from vitface.__main__ import main
from vitface.data import progress
from vitface.errors import WeightsError
from vitface.model.vit import ViT
from vitface.presets import VIT_PRESETS
from vitface.store.backbone import find_backbone, load_backbone, read_backbone
from vitface.store.sources import SOURCES
from vitface.weights import download
from vitface.weights.download import fetch_backbone, fetch_detector

NAME = "dinov2_vits14"


class Server(ThreadingHTTPServer):
    """Serves `content`; the attributes say how badly. `requests` are the Range headers it got, None without one."""

    daemon_threads = True

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.ranges = True
        self.shift = 0
        self.status = 200
        self.sends: int | None = None
        self.stall = 0.0
        self.length: str | None = None  # another Content-Length than the true one, "" for none
        self.location: str | None = None  # of a redirect
        self.pieces = 1  # of the body, with `stall` seconds after each
        self.requests: list[str | None] = []
        self.agents: list[str] = []

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append(asked)
        server.agents.append(self.headers["User-Agent"])
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if server.status != 200 or start >= len(server.content):
            self.send_error(server.status if server.status != 200 else 416)
            return
        if server.location is not None:
            self.send_response(302)
            self.send_header("Location", server.location)
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            first, last = start + server.shift, len(server.content) - 1
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(server.content)}")
        if server.length != "":
            self.send_header("Content-Length", server.length or str(len(body)))
        self.end_headers()
        body = body[: server.sends]
        for piece in range(server.pieces):
            self.wfile.write(body[piece * len(body) // server.pieces : (piece + 1) * len(body) // server.pieces])
            self.wfile.flush()
            time.sleep(server.stall)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """A tiny DINOv2 as Meta's .pth."""
    config = dataclasses.replace(VIT_PRESETS[NAME], native_size=28, embed_dim=16, depth=2, num_heads=2)
    generator = torch.Generator().manual_seed(0)
    shapes = {key: tensor.shape for key, tensor in ViT(config, 28).state_dict().items()} | {"mask_token": (1, 16)}
    path = tmp_path_factory.mktemp("original") / "original.pth"
    torch.save({key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}, path)
    return path.read_bytes()


@pytest.fixture
def server(content, monkeypatch, tmp_path):
    """The preset tiny, its original on localhost, an empty $VITFACE_HOME."""
    config = dataclasses.replace(VIT_PRESETS[NAME], native_size=28, embed_dim=16, depth=2, num_heads=2)
    with Server(content) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{running.server_port}/dinov2/original.pth"
        source = dataclasses.replace(SOURCES[NAME], url=url, sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(SOURCES, NAME, source)
        monkeypatch.setitem(VIT_PRESETS, NAME, config)
        monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.chdir(tmp_path)
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def part(tmp_path):
    """Where the unfinished download lies."""
    (tmp_path / "home" / "sources").mkdir(parents=True)
    return tmp_path / "home" / "sources" / "original.pth.part"


def assert_complete(home, content: bytes) -> None:
    """The converted file holds the original's tensors, and nothing else is left in the cache."""
    path = home / f"{NAME}.safetensors"
    assert find_backbone(NAME) == path
    name, config, tensors, source = read_backbone(path)
    assert (name, config) == (NAME, VIT_PRESETS[NAME])
    assert source["sha256"] == hashlib.sha256(content).hexdigest()
    assert source["licence"] == "Apache-2.0 (Meta's DINOv2)"
    (home.parent / "again.pth").write_bytes(content)
    original = torch.load(home.parent / "again.pth", weights_only=True)  # noqa: TID251
    original.pop("mask_token")
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[key], original[key]) for key in original)
    assert [*(home / "sources").iterdir()] == []


def test_a_download_is_checked_converted_and_found(server, content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)  # each line of a log
    done = fetch_backbone("dinov2")
    assert done is not None and done.published and done.used == len(read_backbone(done.out)[2])
    assert_complete(tmp_path / "home", content)
    bar = capsys.readouterr().err
    assert "original.pth" in bar and "100%" in bar
    assert server.requests == [None] and server.agents[0].startswith("vitface/")
    assert load_backbone(NAME, image_size=28).config == VIT_PRESETS[NAME]


@pytest.mark.parametrize("after", [0, 1, 1000, -1])
def test_a_broken_download_goes_on_where_it_stopped(after, server, content, part, tmp_path, capsys):
    server.sends = after % len(content)
    with pytest.raises(WeightsError, match=f"broke after {server.sends} of {len(content)} bytes") as caught:
        fetch_backbone(NAME)
    assert "Run the same command again to continue" in str(caught.value)
    assert part.read_bytes() == content[: server.sends]
    assert not part.with_suffix("").exists()
    server.sends = None
    fetch_backbone(NAME)
    assert server.requests == [None, f"bytes={after % len(content)}-" if after else None]
    assert_complete(tmp_path / "home", content)


def test_it_may_break_more_than_once(server, content, part, tmp_path):
    server.sends = len(content) // 4
    for _ in range(3):
        with pytest.raises(WeightsError, match="broke"):
            fetch_backbone(NAME)
    server.sends = None
    fetch_backbone(NAME)
    starts = [0 if asked is None else int(asked[6:-1]) for asked in server.requests]
    assert starts == [step * (len(content) // 4) for step in range(4)]
    assert_complete(tmp_path / "home", content)


def test_a_server_without_ranges_sends_it_anew(server, content, part, tmp_path):
    part.write_bytes(content[:5000])
    server.ranges = False
    fetch_backbone(NAME)
    assert server.requests == ["bytes=5000-"]
    assert_complete(tmp_path / "home", content)


def test_a_part_that_is_complete_is_used(server, content, part, tmp_path):
    part.write_bytes(content)
    fetch_backbone(NAME)
    assert server.requests == [f"bytes={len(content)}-"]
    assert_complete(tmp_path / "home", content)


@pytest.mark.parametrize("wrong", ["another file's", "too long", "another length"])
def test_a_wrong_part_is_deleted_and_the_next_run_is_right(wrong, server, content, part, tmp_path):
    parts = {"another file's": b"x" * 5000, "too long": content + b"x", "another length": b"x" * len(content)}
    part.write_bytes(parts[wrong])
    with pytest.raises(WeightsError, match="download was deleted"):
        fetch_backbone(NAME)
    assert not part.exists() and not (tmp_path / "home" / f"{NAME}.safetensors").exists()
    fetch_backbone(NAME)
    assert_complete(tmp_path / "home", content)


def test_another_range_than_asked_for_is_not_appended(server, content, part, tmp_path):
    part.write_bytes(content[:5000])
    server.shift = 7
    with pytest.raises(WeightsError, match="another range"):
        fetch_backbone(NAME)
    fetch_backbone(NAME)
    assert server.requests == ["bytes=5000-", None]
    assert_complete(tmp_path / "home", content)


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_a_changed_byte_is_caught_and_deleted(place, server, content, part, tmp_path):
    changed = bytearray(content)
    changed[place] ^= 1
    server.content = bytes(changed)
    with pytest.raises(WeightsError) as caught:
        fetch_backbone(NAME)
    message = str(caught.value)
    assert hashlib.sha256(changed).hexdigest() in message and hashlib.sha256(content).hexdigest() in message
    assert "deleted" in message
    assert [*part.parent.iterdir()] == [] and not (tmp_path / "home" / f"{NAME}.safetensors").exists()


def test_without_a_network_it_says_what_to_do_and_that_works(server, content, monkeypatch, tmp_path, capsys):
    source = SOURCES[NAME]
    monkeypatch.setitem(SOURCES, NAME, dataclasses.replace(source, url="http://127.0.0.1:9/dinov2/original.pth"))
    assert main(["fetch", NAME]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{NAME}: Meta's DINOv2, about ")
    assert captured.err.startswith("error: cannot download http://127.0.0.1:9/")
    file = tmp_path / "home" / "sources" / "original.pth"
    for part in ("1. download http://127.0.0.1:9/dinov2/original.pth", source.sha256, f"2. put it at {file}"):
        assert part in captured.err
    file.write_bytes(content)
    command = shlex.split(captured.err.split("3. ")[1])
    assert command[:2] == ["vitface", "convert"]
    assert main(["convert", *command[2:]]) == 0
    assert load_backbone(NAME, image_size=28).config == VIT_PRESETS[NAME]


@pytest.mark.parametrize("status", [403, 404, 500])
def test_a_refusal_is_said(status, server, part):
    server.status = status
    with pytest.raises(WeightsError, match=f"HTTP Error {status}"):
        fetch_backbone(NAME)
    assert not part.exists()


def test_a_refusal_keeps_the_part(server, content, part):
    part.write_bytes(content[:5000])
    server.status = 503
    with pytest.raises(WeightsError, match="HTTP Error 503"):
        fetch_backbone(NAME)
    assert part.read_bytes() == content[:5000]


def test_a_server_that_falls_silent_is_given_up(server, content, part, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.sends, server.stall = 3000, 1.0
    with pytest.raises(WeightsError, match=r"cannot download .*timed out"):
        fetch_backbone(NAME)
    assert part.read_bytes() in (b"", content[:3000])


def test_a_file_put_there_by_hand_needs_no_network(server, content, part, tmp_path):
    part.with_suffix("").write_bytes(content)
    fetch_backbone(NAME)
    assert server.requests == []
    assert_complete(tmp_path / "home", content)


def test_another_file_put_there_by_hand_is_refused_and_kept(server, content, part):
    part.with_suffix("").write_bytes(content[:-1])
    with pytest.raises(WeightsError, match="does not have the published sha256"):
        fetch_backbone(NAME)
    assert part.with_suffix("").read_bytes() == content[:-1] and server.requests == []


def test_what_is_there_is_not_fetched_again(server, tmp_path, capsys):
    assert main(["fetch", NAME]) == 0
    printed = capsys.readouterr().out
    assert "the published original" in printed and printed.endswith(f"next      vitface train --backbone {NAME}\n")
    assert main(["fetch", "dinov2"]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path / 'home' / NAME}.safetensors is there already\nnext      vitface train --backbone {NAME}\n"
    )
    assert len(server.requests) == 1


def test_a_damaged_converted_file_is_fetched_again(server, content, tmp_path):
    fetch_backbone(NAME)
    path = tmp_path / "home" / f"{NAME}.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    fetch_backbone(NAME)
    assert len(server.requests) == 2
    assert_complete(tmp_path / "home", content)


def test_an_original_that_does_not_convert_is_kept(server, monkeypatch, part):
    monkeypatch.setitem(VIT_PRESETS, NAME, dataclasses.replace(VIT_PRESETS[NAME], depth=3))
    with pytest.raises(WeightsError, match=r"blocks\.2\..* is missing"):
        fetch_backbone(NAME)
    assert part.with_suffix("").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_tiny_patch16", "vitface convert vit_tiny_patch16 --src FILE --out"),
        ("vit_nano", "ships with the package"),
        ("resnet50", "unknown backbone 'resnet50'; known: dinov2, dinov3, clip"),
    ],
)
def test_names_without_an_original_say_what_to_do(name, says, capsys):
    assert main(["fetch", name]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and says in captured.err and captured.out == ""


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fetch", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "vitface fetch dinov2" in printed and "vit_tiny" not in printed


def test_the_detector_is_fetched_once_and_checked(server, content, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "DETECTOR", SOURCES[NAME])
    file = tmp_path / "home" / "face_detection_yunet.onnx"
    for _ in range(2):
        assert main(["fetch", "yunet"]) == 0
        assert file.read_bytes() == content and len(server.requests) == 1
    file.write_bytes(b"another file")
    assert fetch_detector().read_bytes() == content
    monkeypatch.setattr(download, "DETECTOR", dataclasses.replace(SOURCES[NAME], sha256="0" * 64))
    assert main(["fetch", "yunet"]) == 2
    assert "not the pinned" in capsys.readouterr().err


@pytest.mark.parametrize("length", ["abc", "1e9", "-5", str(1 << 50)])
def test_lengths_that_cannot_be(server, length):
    server.length = length
    with pytest.raises(WeightsError, match="cannot download"):
        fetch_backbone(NAME)


@pytest.mark.parametrize("location", ["http://[::1/x", "http://a..b/x", "gopher://x/", "http://x:port/"])
def test_redirects_that_lead_nowhere(server, location):
    server.location = location
    with pytest.raises(WeightsError, match="cannot download"):
        fetch_backbone(NAME)


def test_a_body_without_end(server, monkeypatch, part):
    monkeypatch.setattr("vitface.weights.download.MAX_BYTES", 1000)
    server.length = ""
    with pytest.raises(WeightsError, match="the server sends more than 1,000 bytes"):
        fetch_backbone(NAME)
    assert part.stat().st_size == 0


def test_a_body_that_drips(server, monkeypatch):
    monkeypatch.setattr("vitface.weights.download.MINUTE", 0.05)
    server.pieces, server.stall = 40, 0.02
    with pytest.raises(WeightsError, match="the server sent .* bytes in 0 s"):
        fetch_backbone(NAME)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_fetches_at_once_are_one_download(server, content, part, tmp_path):
    """Both would write into the same part: one of them waits, and finds what the other one has fetched."""
    server.pieces, server.stall = 5, 0.05
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            fetch_backbone(NAME)
            os._exit(0)
        os._exit(1)
    fetch_backbone(NAME)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and server.requests == [None]
    assert_complete(tmp_path / "home", content)
