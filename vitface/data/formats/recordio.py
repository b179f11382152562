"""MXNet's RecordIO, in which InsightFace publishes training sets, read without mxnet.

A record at a byte offset of the .rec file (dmlc-core/src/recordio.cc), all little-endian:

    u32 magic 0xced7230a | u32 cflag << 29 | length | payload | zeros up to a multiple of 4

cflag 0 is a whole record. Where the payload itself contains the magic at a multiple of 4, the writer leaves out those
four bytes and cuts the record there. The parts have cflag 1, 2, ..., 3, and are joined with the magic between them.
Payload (mxnet.recordio.pack): u32 flag, f32 label, u64 id, u64 id2, then `flag` further f32 labels, then the image.
The .idx file has one `key <tab> offset` line per record.
"""

import struct
from mmap import mmap
from pathlib import Path

import numpy as np

from vitface.errors import DataError

MAGIC = 0xCED7230A
MAX_FLAG = 16
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_START = struct.Struct("<IIIf16x")  # of a record, up to the end of its header
_LONGEST = (1 << 29) - 1


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The keys and byte offsets of an .idx file, int64 (n,) each, by ascending key; DataError names a wrong line."""
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            key, offset = map(int, line.split())
        except ValueError:
            raise DataError(f"{path}: line {number} is not `key offset`: {line[:60]!r}") from None
        if not 0 <= key < 1 << 62 or not 0 <= offset < 1 << 62:
            raise DataError(f"{path}: line {number} has the key {key} and the offset {offset}, out of range")
        entries.append((key, offset))
    if not entries:
        raise DataError(f"{path}: no records are listed")
    table = np.array(entries, np.int64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    repeated = np.flatnonzero(table[1:, 0] == table[:-1, 0])
    if len(repeated):
        raise DataError(f"{path}: the key {table[repeated[0], 0]} is listed twice")
    return table[:, 0].copy(), table[:, 1].copy()


def read_record(data: mmap | bytes, offset: int, where: str) -> tuple[tuple[float, ...], bytes]:
    """(labels, image bytes) of the record at `offset`; DataError, which begins with `where`, unless it is whole."""
    payload = _join_parts(data, offset, where)
    if len(payload) < _HEADER.size:
        raise DataError(f"{where}: the record at byte {offset} has {len(payload)} bytes, less than its header")
    flag, label, _, _ = _HEADER.unpack_from(payload)
    if flag == 0:
        return (label,), payload[_HEADER.size :]
    image = _HEADER.size + 4 * flag
    if flag > MAX_FLAG or image > len(payload):
        raise DataError(f"{where}: the record at byte {offset} claims {flag} labels")
    return struct.unpack_from(f"<{flag}f", payload, _HEADER.size), payload[image:]


def read_labels(data: mmap | bytes, offsets: np.ndarray, where: str) -> np.ndarray:
    """The (first) label of each record, float32 (n,); DataError as `read_record`.

    Every header is checked; images are not read, apart from records of several parts or labels.
    """
    labels, size = np.empty(len(offsets), np.float32), len(data)
    for i, offset in enumerate(offsets.tolist()):
        ordinary = False
        if offset % 4 == 0 and offset <= size - _START.size:
            magic, length, flag, label = _START.unpack_from(data, offset)  # if its cflag is 0, lrec is the length
            ordinary = (
                magic == MAGIC and flag == 0 and _HEADER.size <= length <= min(_LONGEST, size - offset - _PART.size)
            )
        labels[i] = label if ordinary else read_record(data, offset, where)[0][0]
    return labels


def image_records(data: mmap | bytes, keys: np.ndarray, offsets: np.ndarray, where: str) -> np.ndarray:
    """The positions in `keys` (ascending) of the records that are images, int64 (n,).

    InsightFace's record 0 is no image: it has two labels, the first key after the images and the number of records;
    behind the images there is one (first, last + 1) range per person. A record 0 with one label, as other tools write
    it, is an image, and so is every other record.
    """
    if keys[0] != 0:
        raise DataError(f"{where}: record 0, which holds the number of images, is not in the .idx")
    labels, _ = read_record(data, int(offsets[0]), where)
    if len(labels) == 1:
        return np.arange(len(keys))
    if len(labels) != 2 or not np.isfinite(labels).all() or labels[0] != int(labels[0]):
        raise DataError(f"{where}: record 0 has the labels {labels}, expected (images + 1, records)")
    end = int(labels[0])
    if not 2 <= end <= labels[1]:
        raise DataError(f"{where}: record 0 claims images up to key {end - 1} of {labels[1]:.0f} records")
    listed = keys[:end]
    if len(listed) < end or listed[-1] != end - 1:
        raise DataError(f"{where}: record 0 claims {end - 1} images, the .idx lists {np.sum(keys[1:] < end)} of them")
    return np.arange(1, end)


def _join_parts(data: mmap | bytes, offset: int, where: str) -> bytes:
    parts: list[bytes] = []
    start = offset
    while True:
        if offset % 4 or offset + _PART.size > len(data):
            raise DataError(f"{where}: no record fits at byte {offset} of {len(data)}; the file may be truncated")
        magic, lrec = _PART.unpack_from(data, offset)
        cflag, length = lrec >> 29, lrec & _LONGEST
        if magic != MAGIC:
            raise DataError(f"{where}: no record begins at byte {offset} (magic {magic:#010x}); is the .idx its own?")
        if cflag not in ((2, 3) if parts else (0, 1)):
            raise DataError(f"{where}: the record at byte {start} has its parts out of order (cflag {cflag})")
        begin = offset + _PART.size
        if length > len(data) - begin:
            raise DataError(f"{where}: the record at byte {start} runs past the end; the file is truncated")
        parts.append(data[begin : begin + length])
        if cflag in (0, 3):
            return parts[0] if cflag == 0 else _MAGIC_BYTES.join(parts)
        offset = begin + (length + 3 & ~3)
