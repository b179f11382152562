"""What reading takes: memory and time that a file of its size can ask for, whatever the file says.

Each file is read in a process of its own. `AMPLIFIERS` builds the files that ask for the most: small ones that claim,
repeat or nest without end.
"""

import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import tiny_config
from matrix import ANY, EACH, PICTURE, ROWS, sizes
from test_bad_input import encoded
from tiny import in_child

from vitface.data.faces.folder import COLUMNS, read_report
from vitface.data.faces.landmarks import POINTS, read_landmarks
from vitface.data.formats.packed import PackedSamples
from vitface.data.formats.pair_lists import read_pair_list
from vitface.data.formats.pairs import read_bin
from vitface.data.formats.samples import RecordSamples, read_domains
from vitface.data.images import read_image
from vitface.errors import VitfaceError
from vitface.evaluation.scores import SCORES, load_scores
from vitface.exchange.from_peft import read_peft
from vitface.exchange.peft import CONFIG, TENSORS
from vitface.files import json_bytes, sha256_bytes
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import FORMAT
from vitface.store.backbone import read_backbone
from vitface.store.faces import read_face_config, read_manifest
from vitface.store.settings import read_config, read_epochs
from vitface.store.thresholds import read_calibration
from vitface.weights.conversion import read_source

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


class Amplifier(NamedTuple):
    """`build` (an empty folder, n) writes a file of a size that grows with n; `read` reads it, valid or not."""

    build: Callable[[Path, int], None]
    read: Callable[[Path], object]
    n: tuple[int, int]
    image: bool = False


def put(folder: Path, **files: bytes | str) -> None:
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def tensors(header: dict, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def about(dtype: str, *shape: int) -> dict:
    width = {"F32": 4, "F64": 8, "I64": 8, "U8": 1}[dtype]
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, width * int(np.prod(shape))]}


def segment(marker: int, payload: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload


def progressive(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded("JPEG", side, progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + b"\xff\xd9"


def png(side: int, *chunks: bytes) -> bytes:
    """A black image, after other chunks."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeezed = zlib.compress(bytes(side * (side + 1)), 9)
    head = chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, 0, 0, 0, 0))
    parts = [chunk(kind[:4], kind[4:]) for kind in chunks]
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(parts) + chunk(b"IDAT", squeezed) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    data = encoded("GIF", 16)
    at = data.index(b"\x2c")
    return data[:at] + data[at:-1] * frames + b"\x3b"


def image(make: Callable[[int], bytes], *n: int) -> Amplifier:
    return Amplifier(lambda folder, n: put(folder, x_img=make(n)), lambda folder: read_image(folder / "x.img"), n, True)


def part(kind: int, payload: bytes) -> bytes:
    """A part of a record: 0 alone, 1 the first, 2 in the middle, 3 the last."""
    return struct.pack("<II", 0xCED7230A, kind << 29 | len(payload)) + payload + bytes(-len(payload) % 4)


def shared_chain(folder: Path, n: int) -> None:
    """n records that begin one after the other, reach to one and the same place, and go on with the same parts."""
    header = struct.pack("<IfQQ", 0, 0, 0, 0)
    each = 8 + len(header)
    firsts = b"".join(struct.pack("<II", 0xCED7230A, 1 << 29 | each * (n - i) - 8) + header for i in range(n))
    put(folder, train_rec=firsts + part(2, b"") * (20 * n) + part(3, b""))
    put(folder, train_idx="".join(f"{i}\t{each * i}\n" for i in range(n)), property="1,112,112")


def same_offset(folder: Path, n: int) -> None:
    shared_chain(folder, 1)
    put(folder, train_rec=part(1, bytes(24)) + part(2, b"") * (20 * n) + part(3, b""))
    put(folder, train_idx="".join(f"{i}\t0\n" for i in range(n)))


def packed(folder: Path, labels: bytes, **changes) -> None:
    about = {"format": "vitface packed 1", "names": ["a"], "source": {"identity": "i"}, "skipped": [], "shards": []}
    put(folder, images_uint8=b"", labels_npy=labels)
    put(folder, manifest_json=json_bytes({**about, "labels_sha256": sha256_bytes(labels), **changes}))


def claimed_npy(shape: str) -> bytes:
    text = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


def gallery(folder: Path, part: bytes) -> None:
    put(folder, gallery_json=json_bytes({"format": FORMAT, "model": None, "align": False, "thresholds": {}}))
    (folder / "part-000000.safetensors").write_bytes(part)


def one_row(folder: Path, n: int) -> None:
    """A row of n numbers."""
    row = np.zeros(n, np.float32)
    row[0] = 1
    header = {"__metadata__": {"format": FORMAT, "names": '["a"]'}, "embeddings": about("F32", 1, n)}
    gallery(folder, tensors(header, row.tobytes()))


def many_parts(folder: Path, n: int) -> None:
    one_row(folder, 8)
    for i in range(1, n):
        os.link(folder / "part-000000.safetensors", folder / f"part-{i:06d}.safetensors")


def scores(folder: Path, fold: int, n: int = 20) -> None:
    parts = {
        "distance": ("F64", np.linspace(0, 4, n)),
        "issame": ("U8", np.arange(n) % 2),
        "folds": ("I64", np.arange(n) % 2),
    }
    parts["folds"][1][-1] = fold
    header, data = {}, b""
    for name, (dtype, values) in parts.items():
        raw = values.astype({"F64": "<f8", "U8": "u1", "I64": "<i8"}[dtype]).tobytes()
        header[f"lfw/x.{name}"] = {"dtype": dtype, "shape": [n], "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    put(folder, scores_safetensors=tensors(header, data))


class Hungry:
    def __init__(self, size: int):
        self.size = size

    def __reduce__(self):
        return bytearray, (self.size,)


def deflated(folder: Path, n: int) -> None:
    torch.save({"x": torch.zeros(n, 1 << 18)}, folder / "plain.pth")
    with (
        zipfile.ZipFile(folder / "plain.pth") as plain,
        zipfile.ZipFile(folder / "x.pth", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in plain.namelist():
            out.writestr(entry, plain.read(entry))
    (folder / "plain.pth").unlink()


def expanded(folder: Path, n: int) -> None:
    """A tensor that claims n times the numbers that its storage has."""
    torch.save({"x": torch.zeros(1).expand(n << 20)}, folder / "x.pth")


def peft(folder: Path, n: int) -> None:
    settings = {"peft_type": "LORA", "r": n, "lora_alpha": 1, "target_modules": ["[" * 1000] * n}
    names = {f"base_model.model.blocks.{i}.attn.qkv.lora_A.weight": about("F32", 0) for i in range(n)}
    (folder / CONFIG).write_bytes(json_bytes(settings))
    (folder / TENSORS).write_bytes(tensors(names))


def fold_of(read: Callable[[Path], object], name: str, text: Callable[[int], str], *n: int) -> Amplifier:
    return Amplifier(lambda folder, n: (folder / name).write_text(text(n)) and None, read, n)


def csv_of(columns: list[str], *n: int, read: Callable[[Path], object]) -> Amplifier:
    lines = ",".join(columns) + "\n"
    return fold_of(lambda folder: read(folder / "x.csv"), "x.csv", lambda n: lines + '"' + ",\n" * n, *n)


JSON = {
    "nested": lambda n: "[" * n,
    "a long number": lambda n: '{"x": ' + "9" * n + "}",
    "many objects": lambda n: '{"files": [' + "{}," * n + "{}]}",
}
AMPLIFIERS = {
    "JPEG of many scans": image(lambda n: progressive(512, n), 500, 2000),
    "JPEG of empty segments": image(
        lambda n: b"\xff\xd8" + segment(0xE5, b"") * n + encoded("JPEG", 16)[2:], 10**5, 10**6
    ),
    "JPEG of large Exif segments": image(
        lambda n: b"\xff\xd8" + segment(0xE1, b"Exif\0\0" + bytes(65_000)) * n + encoded("JPEG", 16)[2:], 50, 200
    ),
    "JPEG of padding": image(lambda n: b"\xff\xd8" + b"\xff" * n + encoded("JPEG", 16)[2:], 10**5, 10**6),
    "PNG of one colour": image(png, 2048, 8192),
    "PNG of empty chunks": image(lambda n: png(16, *[b"abCd"] * n), 10**4, 10**5),
    "PNG of texts that inflate": image(
        lambda n: png(16, *[b"zTXtk\0\0" + zlib.compress(bytes(10**6), 9)] * n), 20, 200
    ),
    "PNG of a profile that inflates": image(
        lambda n: png(16, b"iCCPk\0\0" + zlib.compress(bytes(n << 20), 9)), 16, 128
    ),
    "GIF of many frames": image(gif, 10**3, 10**4),
    "RecordIO, one record under many keys": Amplifier(same_offset, RecordSamples, (500, 2000)),
    "RecordIO, records that share their end": Amplifier(shared_chain, RecordSamples, (500, 2000)),
    ".bin that repeats one image": Amplifier(
        lambda folder, n: put(folder, x_bin=pickle.dumps(([b"\xff\xd8\xff" + bytes(1000)] * 2 * n, [True] * n))),
        lambda folder: read_bin(folder / "x.bin"),
        (10**4, 10**5),
    ),
    ".bin of nested lists": Amplifier(
        lambda folder, n: put(folder, x_bin=b"\x80\2" + b"(" * n + b"l" * n + b"."),
        lambda folder: read_bin(folder / "x.bin"),
        (10**5, 10**6),
    ),
    "pair list with one long name": fold_of(
        lambda folder: read_pair_list("calfw", folder / "x.txt", folder),
        "x.txt",
        lambda n: f"{'x' * n}.jpg 1\na.jpg 1\n" * 2 + "a.jpg 0\nb.jpg 0\n" * 5000,
        10**5,
        10**6,
    ),
    "pair list of one line": fold_of(
        lambda folder: read_pair_list("agedb_30", folder / "x.txt", folder),
        "x.txt",
        lambda n: "1 " + "a.jpg " * n,
        10**5,
        10**6,
    ),
    "pair list of short lines": fold_of(
        lambda folder: read_pair_list("agedb_30", folder / "x.txt", folder),
        "x.txt",
        lambda n: "0 a b\n" * n,
        10**4,
        10**5,
    ),
    "packed labels that claim more": Amplifier(
        lambda folder, n: packed(folder, claimed_npy(f"({n},)")), PackedSamples, (1 << 20, 1 << 40)
    ),
    "packed labels, a nested header": Amplifier(
        lambda folder, n: packed(folder, claimed_npy("(" * n)), PackedSamples, (1000, 60_000)
    ),
    "packed, many shards and names": Amplifier(
        lambda folder, n: packed(folder, claimed_npy("(0,)"), names=[""] * n, shards=[{"images": 0, "sha256": ""}] * n),
        PackedSamples,
        (10**4, 10**5),
    ),
    "gallery of one wide row": Amplifier(one_row, Gallery.load, (10**5, 2 * 10**6)),
    "gallery of many parts": Amplifier(many_parts, Gallery.load, (100, 1000)),
    "gallery of names alone": Amplifier(
        lambda folder, n: gallery(
            folder,
            tensors(
                {"__metadata__": {"format": FORMAT, "names": json.dumps(["a"] * n)}, "embeddings": about("F32", n, 0)}
            ),
        ),
        Gallery.load,
        (10**4, 10**6),
    ),
    "scores, one fold of a large number": Amplifier(
        lambda folder, n: scores(folder, n), lambda folder: load_scores(folder / SCORES), (10**6, 10**9)
    ),
    "scores of many folds": Amplifier(
        lambda folder, n: scores(folder, 0, n), lambda folder: load_scores(folder / SCORES), (10**4, 10**5)
    ),
    "backbone of empty tensors": Amplifier(
        lambda folder, n: put(folder, x_safetensors=tensors({f"{i}": about("F32", 0) for i in range(n)})),
        lambda folder: read_backbone(folder / "x.safetensors"),
        (10**4, 10**5),
    ),
    "source of empty tensors": Amplifier(
        lambda folder, n: put(folder, x_safetensors=tensors({f"{i}": about("F32", 0) for i in range(n)})),
        lambda folder: read_source(folder / "x.safetensors", ""),
        (10**4, 10**5),
    ),
    ".pth that makes a bytearray": Amplifier(
        lambda folder, n: put(folder, x_pth=pickle.dumps({"x": Hungry(n << 20)}, 2)),
        lambda folder: read_source(folder / "x.pth", ""),
        (512, 8192),
    ),
    ".pth that is deflated": Amplifier(deflated, lambda folder: read_source(folder / "x.pth", ""), (50, 200)),
    ".pth of expanded tensors": Amplifier(expanded, lambda folder: read_source(folder / "x.pth", ""), (512, 8192)),
    "PEFT folder of long lists": Amplifier(
        peft, lambda folder: read_peft(folder, "dinov2_vits14", tiny_config()), (100, 1000)
    ),
    **{
        f"{name}, {what}": fold_of(read, name, text, 10**4, 10**6)
        for name, read in {
            "manifest.json": lambda folder: read_manifest(folder, ("model.safetensors",)),
            "model.json": read_face_config,
            "config.json": read_config,
            "thresholds.json": lambda folder: read_calibration(folder, "m"),
            "gallery.json": Gallery.load,
            CONFIG: lambda folder: read_peft(folder, "dinov2_vits14", tiny_config()),
        }.items()
        for what, text in JSON.items()
    },
    "align.csv, a quote without end": csv_of(COLUMNS, 10**4, 10**6, read=read_report),
    "landmarks, a quote without end": csv_of(["file", *POINTS], 10**4, 10**6, read=read_landmarks),
    "domain labels, a quote without end": csv_of(
        ["image", "domain"], 10**4, 10**6, read=lambda path: read_domains(path, ["a"])
    ),
    "domain labels of many columns": fold_of(
        lambda folder: read_domains(folder / "x.csv", ["a"]),
        "x.csv",
        lambda n: "image,domain" + ",x" * n + "\n\n" + "a\n" * 1000,
        100,
        10_000,
    ),
    "log.csv of many columns": fold_of(
        read_epochs, "log.csv", lambda n: "loss" + ",x" * n + "\n" + "1\n" * 1000, 100, 10_000
    ),
}


def taken(read: Callable[[Path], object], folder: Path) -> tuple[float, float]:
    """(seconds of a core, MB by which memory ever grew) that reading takes, in a process of its own."""
    reader, writer = os.pipe()

    def measured():
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with suppress(VitfaceError):
            read(folder)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writer, struct.pack("<dd", time.process_time() - began, grown / 1024))

    code = in_child(measured)
    os.close(writer)
    with open(reader, "rb") as file:
        assert code == 0, code
        return struct.unpack("<dd", file.read())


@sizes("amplifiers")
def test_what_reading_takes(tmp_path, ran, cases):
    """The smaller file of each kind, or both: work that grows with the square of the size passes with the smaller."""
    torch.set_num_threads(1)
    chosen = [(name, n) for name, amplifier in AMPLIFIERS.items() for n in amplifier.n[: cases // len(AMPLIFIERS)]]
    over = []
    for name, n in chosen:
        build, read, _, image = AMPLIFIERS[name]
        folder = tmp_path / "files"
        folder.mkdir()
        build(folder, n)
        megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        seconds, grown = taken(read, folder)
        allowed = [each * megabytes + least for each, least in zip(EACH, PICTURE if image else ANY, strict=True)]
        if grown > allowed[0] or seconds > allowed[1]:
            over.append(f"{name}, {n}: {megabytes:.3f} MB took {grown:.0f} MB and {seconds:.1f} s")
        shutil.rmtree(folder)
    assert not over, "\n".join(over)
    assert len(chosen) == cases
    ran(ROWS["amplifiers"].fault, cases)


def compute(folder):
    """A fifth of a second, on any machine."""
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("read", [lambda folder: bytearray(200 << 20), compute])
def test_more_than_that_is_noticed(tmp_path, monkeypatch, ran, read):
    planted = Amplifier(lambda folder, n: put(folder, x=bytes(n)), read, (100,))
    monkeypatch.setattr(f"{__name__}.ANY", (96, 0.1))
    monkeypatch.setattr(f"{__name__}.AMPLIFIERS", {"planted": planted})
    with pytest.raises(AssertionError, match=r"planted, 100: 0.000 MB took"):
        test_what_reading_takes(tmp_path, ran, 1)
