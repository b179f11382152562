"""MXNet's RecordIO, in which InsightFace publishes training sets, read without mxnet.

A record at a byte offset of the .rec file (dmlc-core/src/recordio.cc), all little-endian:

    u32 magic 0xced7230a | u32 cflag << 29 | length | payload | zeros up to a multiple of 4

cflag 0 is a whole record. Where the payload itself contains the magic at a multiple of 4, the writer leaves out those
four bytes and cuts the record there. The parts have cflag 1, 2, ..., 3, and are joined with the magic between them.
Payload (mxnet.recordio.pack): u32 flag, f32 label, u64 id, u64 id2, then `flag` further f32 labels, then the image.
The .idx file has one `key <tab> offset` line per record. Letters: n records.
"""

import itertools
import mmap as mmap_module
import struct
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vitface.data.progress import Progress
from vitface.errors import DataError

MAGIC = 0xCED7230A
MAX_FLAG = 16
BLOCK = 1 << 15  # records whose pages are in memory together
REBUILD = "rebuild the .idx: vitface data index"
_MAGIC_BYTES = struct.pack("<I", MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_LONGEST = (1 << 29) - 1
_MAX_NUMBER = 1 << 62  # of keys and offsets


class Record(NamedTuple):
    """The labels, `image` bytes and id of a record, and the offset behind it."""

    labels: tuple[float, ...]
    image: bytes
    id: int
    end: int


class Records(NamedTuple):
    """The first label of each record, float32 (n,); the offset behind it, int64 (n,); has it an image? bool (n,)."""

    labels: np.ndarray
    ends: np.ndarray
    filled: np.ndarray


def read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The keys and byte offsets of an .idx file, int64 (n,) each, by ascending key.

    A byte order mark and blank lines are ignored. DataError names a wrong line, key or offset.
    """
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n")
    table = _plain_table(data)
    table = _table(data, path) if table is None else table
    if not len(table):
        raise DataError(f"{path}: no records are listed; {REBUILD} {path.parent}")
    table = table[np.argsort(table[:, 0], kind="stable")]
    for numbers, what in ((table[:, 0], "key"), (np.sort(table[:, 1], kind="stable"), "offset")):
        repeated = np.flatnonzero(numbers[1:] == numbers[:-1])
        if len(repeated):
            raise DataError(f"{path}: the {what} {numbers[repeated[0]]} is listed twice; {REBUILD} {path.parent}")
    return table[:, 0].copy(), table[:, 1].copy()


def _plain_table(data: bytes) -> np.ndarray | None:
    """int64 (n, 2) of lines `digits <tab> digits`, as writers make them, in a fifth of the time; None for others."""
    data = data.rstrip() + b"\n"
    separators = data.translate(None, b"0123456789")
    count = len(separators) // 2
    if separators != b"\t\n" * count:
        return None
    at = np.flatnonzero(np.frombuffer(data, np.uint8) < ord("0"))
    lengths = np.diff(at, prepend=-1) - 1
    if lengths.min() < 1 or lengths.max() > 18:
        return None
    return np.fromstring(data, np.int64, 2 * count, sep=" ").reshape(count, 2)


def _table(data: bytes, path: Path) -> np.ndarray:
    entries = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            key, offset = map(int, line.split())
        except ValueError:
            raise DataError(
                f"{path}: line {number} is not `key offset`: {line[:60]!r}; {REBUILD} {path.parent}"
            ) from None
        if not 0 <= key < _MAX_NUMBER or not 0 <= offset < _MAX_NUMBER:
            wrong = f"line {number} has the key {key} and the offset {offset}, out of range"
            raise DataError(f"{path}: {wrong}; {REBUILD} {path.parent}")
        entries.append((key, offset))
    return np.array(entries, np.int64).reshape(-1, 2)


def read_record(data: mmap | bytes, offset: int, where: str) -> Record:
    """The record at `offset`; DataError, which begins with `where`, unless it is whole."""
    parts = list(_parts(data, offset, where))
    payload = _MAGIC_BYTES.join(data[begin : begin + length] for begin, length in parts)
    if len(payload) < _HEADER.size:
        raise DataError(f"{where}: the record at byte {offset} has {len(payload)} bytes, less than its header")
    flag, label, number, _ = _HEADER.unpack_from(payload)
    image = _HEADER.size + 4 * flag
    if flag > MAX_FLAG or image > len(payload):
        raise DataError(f"{where}: the record at byte {offset} claims {flag} labels")
    labels = struct.unpack_from(f"<{flag}f", payload, _HEADER.size) if flag else (label,)
    return Record(labels, payload[image:], number, _end(*parts[-1]))


def read_records(data: mmap | bytes, offsets: np.ndarray, where: str) -> Records:
    """What is to be known of the records at `offsets` (n,) before their images are read; DataError as `read_record`."""
    blocks = []
    for at in range(0, len(offsets), BLOCK):
        blocks.append(_read_block(data, offsets[at : at + BLOCK], where))
        release(data)
    return Records(*map(np.concatenate, zip(*blocks, strict=True)))


def release(data: mmap | bytes) -> None:
    """Lets go of the pages of a mapped file that were read; otherwise a whole pass is held in memory."""
    if isinstance(data, mmap) and hasattr(data, "madvise"):  # not on Windows
        data.madvise(mmap_module.MADV_DONTNEED)


def _read_block(data: mmap | bytes, offsets: np.ndarray, where: str) -> Records:
    size, count = len(data), len(offsets)
    labels, ends, filled = np.empty(count, np.float32), np.empty(count, np.int64), np.empty(count, bool)
    words = np.frombuffer(data, "<u4", size // 4)
    begins = _PART.size + _HEADER.size
    whole = (offsets % 4 == 0) & (offsets <= size - begins)
    at = offsets[whole] // 4
    length, flag = words[at + 1].astype(np.int64), words[at + 2].astype(np.int64)
    header = _HEADER.size + 4 * flag
    ordinary = (words[at] == MAGIC) & (flag <= MAX_FLAG) & (length >= header)  # of one part: then its cflag is 0
    ordinary &= length <= np.minimum(_LONGEST, size - _PART.size - offsets[whole])
    at, length, flag, header = (x[ordinary] for x in (at, length, flag, header))
    whole[whole] = ordinary
    label_at = at + np.where(flag > 0, begins // 4, 3)
    labels[whole] = words.view("<f4")[label_at]
    ends[whole] = _end(4 * at + _PART.size, length)
    filled[whole] = length > header
    others, end = np.flatnonzero(~whole), 0
    for i in others[np.argsort(offsets[others])].tolist():
        if offsets[i] < end:  # now, for many records could have the same long end
            raise DataError(f"{where}: two records overlap at byte {offsets[i]}; is this its .idx?")
        record = read_record(data, int(offsets[i]), where)
        labels[i], ends[i], filled[i], end = record.labels[0], record.end, bool(record.image), record.end
    return Records(labels, ends, filled)


def header_images(data: mmap | bytes, keys: np.ndarray, offset: int, where: str) -> int:
    """The number of images that InsightFace's record 0, at `offset`, says there are; `keys` (n,) are all, ascending.

    That record is no image. It has two labels, the first key behind the images and the number of records; behind the
    images there is one (first, last + 1) range per person. DataError if these images are not all listed.
    """
    labels = read_record(data, offset, where).labels
    if len(labels) != 2 or not np.isfinite(labels).all() or labels[0] != int(labels[0]):
        raise DataError(f"{where}: record 0 has the labels {labels} and no image, expected (images + 1, records)")
    end = int(labels[0])
    if not 2 <= end <= labels[1]:
        raise DataError(f"{where}: record 0 claims images up to key {end - 1} of {labels[1]:.0f} records")
    listed = keys[:end]
    if len(listed) < end or listed[-1] != end - 1:
        raise DataError(
            f"{where}: record 0 claims {end - 1} images, the .idx lists {np.sum(keys[1:] < end)} of them; "
            f"{REBUILD} {Path(where).parent}, and if that does not help, get the .rec again: it was cut"
        )
    return end - 1


def unlisted(offsets: np.ndarray, ends: np.ndarray, size: int, where: str) -> int:
    """How many bytes of a .rec file of `size` bytes lie between its listed records.

    DataError if the .idx leaves out its beginning or its end, or if two records overlap.
    """
    order = np.argsort(offsets, kind="stable")
    offsets, ends = offsets[order], ends[order]
    gaps = offsets[1:] - ends[:-1]
    if len(gaps) and gaps.min() < 0:
        raise DataError(f"{where}: two records overlap at byte {offsets[1:][gaps.argmin()]}; is this its .idx?")
    if offsets[0] or ends[-1] < size:
        part = f"records end at byte {ends[-1]} of {size}" if ends[-1] < size else f"first is at byte {offsets[0]}"
        folder = Path(where).parent
        raise DataError(f"{where}: the .idx is not whole, its {part}; {REBUILD} {folder}")
    return int(gaps.sum())


def index(data: mmap | bytes, where: str) -> bytes:
    """The .idx of a .rec file, from its records alone; DataError where it is damaged.

    The keys are the records' ids if no two are equal; else, or if record 0 is InsightFace's, 0, 1, 2, ...
    """
    offsets, numbers, offset, header = [], [], 0, False
    with Progress(desc="reading", total=len(data), unit="B", unit_scale=True, leave=False, dynamic_ncols=True) as bar:
        while offset < len(data):
            try:
                (begin, length), *rest = _parts(data, offset, where)
                whole = length >= _HEADER.size
                numbers.append(_HEADER.unpack_from(data, begin)[2] if whole else read_record(data, offset, where).id)
            except DataError as error:
                keep = f"to keep the {len(offsets):,} records before it: truncate -s {offset} {where}"
                raise DataError(f"{error}; get the file again, or, {keep}") from None
            offsets.append(offset)
            offset = _end(*(rest[-1] if rest else (begin, length)))
            bar.update(offset - offsets[-1])
    if offsets:
        first = read_record(data, 0, where)
        header = len(first.labels) == 2 and not first.image
    own = not header and len(set(numbers)) == len(numbers) and max(numbers, default=0) < _MAX_NUMBER
    keys = numbers if own else range(len(offsets))
    return "".join(f"{key}\t{offset}\n" for key, offset in sorted(zip(keys, offsets, strict=True))).encode()


def _parts(data: mmap | bytes, offset: int, where: str) -> Iterator[tuple[int, int]]:
    """(begin, length) of the payload of each part of a record; DataError unless it is whole."""
    start = offset
    for number in itertools.count():
        if offset % 4 or offset + _PART.size > len(data):
            raise DataError(f"{where}: no record fits at byte {offset} of {len(data)}; the file may be truncated")
        magic, lrec = _PART.unpack_from(data, offset)
        cflag, length = lrec >> 29, lrec & _LONGEST
        if magic != MAGIC:
            raise DataError(
                f"{where}: no record begins at byte {offset} (magic {magic:#010x}): damaged, or not its .idx"
            )
        if cflag not in ((2, 3) if number else (0, 1)):
            raise DataError(f"{where}: the record at byte {start} has its parts out of order (cflag {cflag})")
        begin = offset + _PART.size
        if length > len(data) - begin:
            raise DataError(f"{where}: the record at byte {start} runs past the end; the file is truncated")
        yield begin, length
        if cflag in (0, 3):
            return
        offset = _end(begin, length)


def _end(begin, length):
    """Behind the padding of a part."""
    return begin + (length + 3 & ~3)
