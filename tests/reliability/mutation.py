"""Files with something changed: bytes, numbers and types in JSON, headers of safetensors and npy, cells of tables."""

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

NUMBERS = [struct.pack("<I", value) for value in (0, 1, 16, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)]
WORDS = [
    *(b"", b"-1", b"0", b"9" * 30, b"1e308", b"nan", b"inf", b"1.5", b"x" * 300, b"../../x", b"/dev/zero"),
    *(
        "王伟".encode(),
        "٣".encode(),
        "\ud800".encode("utf-8", "surrogatepass"),
        b"\xff",
        b"\0",
        b"\r",
        b'"',
        b"\xef\xbb\xbf",
    ),
]
_FLOATS = [float("nan"), float("inf"), 3.5, -1e38, 0.0]
_LENGTHS = [0, 1, 1 << 21, 10**8 + 1, 1 << 40, 1 << 63]


def mutated(rng: random.Random, data: bytes, pieces: Sequence[bytes] = NUMBERS) -> bytes:
    """`data` after one to four of: a byte or a bit changed, a piece put in or over, cut, doubled, shuffled."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(7)
        end = min(len(data), at + rng.choice([1, 2, 4, 8, 64]))
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = rng.choice(pieces)
        elif kind == 3:
            piece = rng.choice(pieces)
            data[at : at + len(piece)] = piece
        elif kind == 4:
            del data[at:end]
        elif kind == 5:
            data[at:at] = data[at:end]
        else:
            other = rng.randrange(len(data) + 1)
            data[at:end] = data[other : other + end - at]
        data = data or bytearray(b"\0")
    return bytes(data)


def _other_value(rng: random.Random, value: Any) -> Any:
    """Something else in place of a JSON value."""
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-8, -1, 1, 4, 8])
    if isinstance(value, float) and rng.random() < 0.3:
        return rng.choice([-value, value * 1e-300, value / 2, 1.0])
    numbers = [None, True, False, -1, 0, 1, 7, 1 << 13, 1 << 40, 2**63, 10**400, 0.5, 1.5, 1e308, 1e-320]
    texts = ["", "F64", "I8", "BF16", "x" * 99, "nan", "\ud800", "../x", "\x1b[2J"]
    return rng.choice([*numbers, *texts, *_FLOATS, [], [1], {}, {"": []}])


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A JSON object with one entry changed, removed, added or renamed, at any depth."""
    at = value = json.loads(json.dumps(value))
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return value
        key = rng.choice(keys)
        if isinstance(at[key], dict | list) and rng.random() < 0.7:
            at = at[key]
            continue
        kind = rng.randrange(6)
        if kind == 0:
            del at[key]
        elif kind == 1 and isinstance(at, dict):
            at[rng.choice(["../../x", "head.extra", "__class__", str(key) + "."])] = at[key]
        elif kind == 2 and isinstance(at, dict):
            at[rng.choice(keys)], at[key] = at[key], at[rng.choice(keys)]
        else:
            at[key] = _other_value(rng, at[key])
        return value


def mutated_text_of_json(rng: random.Random, text: bytes) -> bytes:
    """One JSON value changed, or its text: broken, nested without end, of two values."""
    if rng.random() < 0.7:
        return json.dumps(mutated_json(rng, json.loads(text))).encode()
    if rng.random() < 0.1:
        return rng.choice([b"[" * 50_000, b'{"a":' * 50_000, b"", b"[]", b"3", b"null", text * 2])
    return mutated(rng, text, [b"{", b"}", b'"', b":", b",", b"[", b"\\u0000", *WORDS])


def mutated_tensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file changed in its header's length, its JSON or that in its metadata, its bytes or its values."""
    length = int.from_bytes(data[:8], "little")
    header, values = data[8 : 8 + length], data[8 + length :]
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([*_LENGTHS, length - 1, length + 8]).to_bytes(8, "little") + data[8:]
    if kind == 1:
        return data[:8] + mutated(rng, header, [b"{", b"}", b'"', b":", b",", b"[", b"\\u0000", b"9" * 20]) + values
    if kind == 2:
        return data[: rng.randrange(len(data))]
    if kind == 3:
        at = rng.randrange(0, len(values) - 4, 4)
        return data[: 8 + length] + values[:at] + struct.pack("<f", rng.choice(_FLOATS)) + values[at + 4 :]
    about = json.loads(header)
    if kind == 4:  # a tensor of another type or shape, whose bytes are all there
        about = _cast(rng, about)
    elif kind == 5 and "__metadata__" in about:
        key = rng.choice(list(about["__metadata__"]))
        text = about["__metadata__"][key].encode()
        changed = mutated_text_of_json(rng, text) if text[:1] in b"[{" and len(text) > 2 else mutated(rng, text, WORDS)
        about["__metadata__"][key] = changed.decode("utf-8", "replace")
    else:
        about = mutated_json(rng, about)
    changed = json.dumps(about).encode()
    changed += b" " * (-len(changed) % 8)
    return len(changed).to_bytes(8, "little") + changed + values + bytes(rng.choice([0, 0, 0, 4]))


_WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
}


def _cast(rng: random.Random, about: dict[str, Any]) -> dict[str, Any]:
    """A header in which one tensor's bytes are read as another type, in another shape, or under another name."""
    name = rng.choice([name for name in about if name != "__metadata__"])
    start, end = about[name]["data_offsets"]
    dtype = rng.choice([kind for kind, width in _WIDTHS.items() if (end - start) % width == 0])
    count = (end - start) // _WIDTHS[dtype]
    shape = rng.choice([[count], [1, count], [count, 1], about[name]["shape"], [count // 2, 2], [0, count]])
    if math.prod(shape) != count:
        dtype, shape = about[name]["dtype"], about[name]["shape"][::-1]
    about[rng.choice([name, name, name, f"{name}.x", "/", "x"])] = {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [start, end],
    }
    return about


def mutated_npy(rng: random.Random, data: bytes) -> bytes:
    """An npy file changed in its header's text, or in its bytes."""
    if rng.random() < 0.4:
        return mutated(rng, data)
    descr = rng.choice(["<i8", ">i8", "<i4", "<f8", "|O", "|S8", "<U2", "|b1", "|V8", "<i9", "", "(9,9)<i8"])
    shape = rng.choice(
        ["(3,)", "(3, 1)", "()", "(0,)", "(1099511627776,)", "(-1,)", "(3", "3", "(3.0,)", "('3',)", "(" * 99]
    )
    header = f"{{'descr': '{descr}', 'fortran_order': {rng.choice([False, True])}, 'shape': {shape}, }}\n".encode()
    version = rng.choice([b"\x01\0", b"\x01\0", b"\x02\0", b"\x09\0"])
    return (
        b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\0" else "<I", len(header)) + header + data[-24:]
    )


def mutated_lines(rng: random.Random, data: bytes) -> bytes:
    """A text of lines and cells: a cell changed, a line gone, doubled, exchanged, or the bytes changed."""
    if rng.random() < 0.3:
        return mutated(rng, data, [*WORDS, b",", b"\t", b"\n", b"\r\n", b" "])
    lines = data.split(b"\n")
    for _ in range(rng.randint(1, 2)):
        at, other, kind = rng.randrange(len(lines)), rng.randrange(len(lines)), rng.randrange(6)
        if kind == 0 and len(lines) > 1:
            del lines[at]
        elif kind == 1:
            lines.insert(other % max(len(lines), 1), lines[at])
        elif kind == 2:
            lines[at], lines[other] = lines[other], lines[at]
        else:
            separator = next((mark for mark in (b",", b"\t", b" ") if mark in lines[at]), b" ")
            cells = lines[at].split(separator)
            cells[rng.randrange(len(cells))] = rng.choice([*WORDS, rng.choice(cells), mutated(rng, lines[at])])
            lines[at] = separator.join(cells)
    return b"\n".join(lines)


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".json": mutated_text_of_json,
    ".safetensors": mutated_tensors,
    ".npy": mutated_npy,
    ".txt": mutated_lines,
    ".csv": mutated_lines,
    ".jsonl": mutated_lines,
    ".uint8": lambda rng, data: rng.choice([data[:-1], data + b"\0", b"", mutated(rng, data)]),
}


def mutated_file(rng: random.Random, name: str, data: bytes) -> bytes:
    """The contents of a file with something changed, as fits its suffix."""
    return MUTATIONS[Path(name).suffix](rng, data)


def rewrite(path: Path, data: bytes) -> None:
    """A new file: to truncate one that is there makes some file systems wait for the disk."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
