"""InsightFace's verification sets (lfw.bin, cfp_fp.bin, ...), read without unpickling.

A .bin is a pickle of (2N encoded images, N flags): pair i is images 2i and 2i + 1, a true flag means the same person.
An unpickler would execute what the file asks for. Here a small stack machine reads the opcodes and knows only data:
lists, tuples, bytes, text, whole numbers, booleans. It knows three calls, which numpy and Python 3 write into such
files, and computes their values itself:

    _codecs.encode(text, "latin1")                               bytes in protocols 0-2
    numpy[._core|.core].multiarray._reconstruct + state          an image as a uint8 array of one column
    numpy[._core|.core].multiarray.scalar(dtype b1, byte)        a flag as np.bool_

Every other opcode, name and form of arguments is refused, and the message names its byte. A hostile file costs time and
memory in proportion to its size: lengths are compared with what is left of the file before anything is read, the memo
is a dict (an index of 2^31 costs one entry), no operation copies a value that the file can name again, lists hold no
containers, tuples nest two deep, and the number of opcodes is bounded.
"""

import codecs
import pickletools
import re
import struct
from dataclasses import dataclass
from enum import Enum
from mmap import mmap
from typing import NoReturn

from vitface.errors import DataError

MAX_PAIRS = 1_000_000
MAX_IMAGE_BYTES = 10 << 20
_MAX_TEXT_BYTES = 4 * MAX_IMAGE_BYTES  # an image in text form: \xff for one byte
_MAX_OPCODES = 1_000_000  # and one more per 16 bytes of file; real files have one per 100 bytes or less
_MAX_MARKS = _MAX_TUPLE = _MAX_LISTS = 8
_PYTHON2_ESCAPE = re.compile(rb"""\\(?:x[0-9a-f]{2}|[\\'"nrt])""")
_OPCODE_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}

_Name = Enum("_Name", "ENCODE RECONSTRUCT SCALAR NDARRAY DTYPE")
_NAMES = {
    "_codecs encode": _Name.ENCODE,
    "numpy.core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy.core.multiarray scalar": _Name.SCALAR,
    "numpy._core.multiarray scalar": _Name.SCALAR,
    "numpy ndarray": _Name.NDARRAY,
    "numpy dtype": _Name.DTYPE,
}


class _Dtype(Enum):
    UINT8 = b"u1"
    BOOL = b"b1"


@dataclass(frozen=True)
class _Text:
    """Text, kept as the bytes that `_codecs.encode(text, "latin1")` makes of it."""

    latin1: bytes


@dataclass(eq=False)
class _Array:
    """A uint8 array; `data` is None between its REDUCE and its BUILD."""

    data: bytes | None = None


def parse_bin(data: bytes | mmap, where: str) -> tuple[list[bytes], list[bool]]:
    """(images, issame) of a .bin file's contents; DataError, which begins with `where`, for anything else.

    Images are not decoded; one that the file repeats by reference is one object. The two lengths are not compared.
    """
    return _Machine(data, where).run()


class _Machine:
    def __init__(self, data: bytes | mmap, where: str):
        self.data, self.where = data, where
        self.pos = self.start = 0
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.lists = 0

    def run(self) -> tuple[list[bytes], list[bool]]:
        for _ in range(_MAX_OPCODES + len(self.data) // 16):
            self.start = self.pos
            code = self.take(1)
            if code == b".":
                return self.result()
            if code not in _OPCODES:
                self.refuse("is not data; the file was not loaded and nothing in it was executed")
            _OPCODES[code](self)
        self.refuse("is one too many for a verification set of this size")

    def result(self) -> tuple[list[bytes], list[bool]]:
        whole = self.pop()
        if self.stack or self.marks or self.pos != len(self.data):
            self.refuse("ends the set with something left over")
        if not isinstance(whole, tuple) or [type(part) for part in whole] != [list, list]:
            self.refuse("ends something else than (images, flags)")
        images: list = [image.data if isinstance(image, _Array) else image for image in whole[0]]
        for i, image in enumerate(images):
            if not isinstance(image, bytes) or len(image) > MAX_IMAGE_BYTES:
                self.refuse(f"ends a set whose image {i} is not at most {MAX_IMAGE_BYTES} bytes")
        for i, flag in enumerate(whole[1]):
            if not isinstance(flag, int) or flag not in (0, 1):
                self.refuse(f"ends a set whose flag {i} is neither true nor false")
        return images, [bool(flag) for flag in whole[1]]

    def refuse(self, why: str) -> NoReturn:
        code = self.data[self.start : self.start + 1].decode("latin-1")
        raise DataError(f"{self.where}: opcode {_OPCODE_NAMES.get(code, repr(code))} at byte {self.start} {why}")

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.pos:
            raise DataError(
                f"{self.where}: cut short, byte {self.start} of {len(self.data)} asks for {size} more; get it again"
            )
        self.pos += size
        return self.data[self.pos - size : self.pos]

    def uint(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def blob(self, size: int, limit: int = MAX_IMAGE_BYTES) -> bytes:
        if size > limit:
            self.refuse(f"has {size} bytes, an element may have {limit}")
        return self.take(size)

    def line(self, limit: int) -> bytes:
        end = self.data.find(b"\n", self.pos, self.pos + limit)
        if end < 0:
            self.refuse(f"has no end of line within {limit} bytes")
        return self.take(end + 1 - self.pos)[:-1]

    def text(self, raw: bytes, encoding: str) -> _Text:
        try:
            return _Text(raw.decode(encoding).encode("latin-1"))
        except UnicodeError:
            self.refuse("has text outside latin-1")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.refuse("needs a value that is not there")
        return self.stack.pop()

    def top(self) -> object:
        self.push(value := self.pop())
        return value

    def mark(self) -> None:
        if len(self.marks) == _MAX_MARKS:
            self.refuse("nests too deep")
        self.marks.append(len(self.stack))

    def pop_to_mark(self) -> list:
        if not self.marks:
            self.refuse("needs a mark that is not there")
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def push_list(self, values: list) -> None:
        self.lists += 1
        if self.lists > _MAX_LISTS:
            self.refuse("is one list too many; a verification set has two")
        self.push([])
        self.extend(values)

    def extend(self, values: list) -> None:
        target = self.top()
        if not isinstance(target, list) or len(target) + len(values) > 2 * MAX_PAIRS:
            self.refuse(f"does not extend a list of at most {2 * MAX_PAIRS}")
        for value in values:
            if not isinstance(value, (bytes, int, _Array)):
                self.refuse(f"puts a {type(value).__name__} into a list; images are bytes, flags are booleans")
        target.extend(values)

    def push_tuple(self, values: list) -> None:
        if len(values) > _MAX_TUPLE:
            self.refuse("makes a tuple too long")
        if any(isinstance(item, tuple) for value in values if isinstance(value, tuple) for item in value):
            self.refuse("nests too deep")
        self.push(tuple(values))

    def push_last(self, size: int) -> None:
        self.push_tuple([self.pop() for _ in range(size)][::-1])

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            self.refuse(f"asks for the value {index}, which was not stored")
        self.push(self.memo[index])

    def protocol(self) -> None:
        if (version := self.uint(1)) > 5:
            self.refuse(f"asks for protocol {version}, known are 0 to 5")

    def frame(self) -> None:
        if self.uint(8) > len(self.data) - self.pos:
            self.refuse("is longer than the file; download it again")

    def decimal(self, pattern: bytes) -> int:
        line = self.line(16)
        if not re.fullmatch(pattern, line):
            self.refuse(f"has {line!r} for a whole number")
        return int(line)

    def python2_string(self) -> None:
        line = self.line(_MAX_TEXT_BYTES)
        quoted = len(line) >= 2 and line[:1] in b"'\"" and line[:1] == line[-1:]
        if not quoted or b"\\" in _PYTHON2_ESCAPE.sub(b"", line[1:-1]):
            self.refuse("is not a quoted string")
        self.push(codecs.escape_decode(line[1:-1])[0])

    def push_name(self, module: object, name: object) -> None:
        if not isinstance(module, bytes) or not isinstance(name, bytes):
            self.refuse("names something by what is not text")
        full = (module + b" " + name).decode("latin-1")
        if full not in _NAMES:
            self.refuse(f"names {full[:80]!r}, which is not data; nothing in the file was executed")
        self.push(_NAMES[full])

    def stack_global(self) -> None:
        name, module = (value.latin1 if isinstance(value, _Text) else None for value in (self.pop(), self.pop()))
        self.push_name(module, name)

    # In both patterns below, names and codes are text, or bytes where Python 2 wrote them.

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        match function, *(args if isinstance(args, tuple) else ()):
            case _Name.ENCODE, _Text(raw), _Text(b"latin1"):
                self.push(raw)
            case _Name.RECONSTRUCT, _Name.NDARRAY, (0,), _Text(b"b") | b"b":
                self.push(_Array())
            case _Name.DTYPE, _Text(code) | bytes(code), 0, 1 if code in (b"u1", b"b1"):
                self.push(_Dtype(code))
            case _Name.SCALAR, _Dtype.BOOL, (b"\0" | b"\1") as byte:
                self.push(byte == b"\1")
            case _:
                self.refuse("calls something in a form no verification set has; nothing in the file was executed")

    def build(self) -> None:
        state, target = self.pop(), self.top()
        match target, *(state if isinstance(state, tuple) else ()):
            case _Dtype(), 3, _Text(b"|") | b"|", None, None, None, -1, -1, 0:
                pass
            case _Array(None), 1, (size,) | (size, 1), _Dtype.UINT8, 0 | 1, bytes(raw) if size == len(raw):
                target.data = raw
            case _:
                self.refuse("gives a state that is not one of a uint8 array of one column; nothing was executed")


_OPCODES = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": _Machine.mark,
    b"]": lambda m: m.push_list([]),
    b"l": lambda m: m.push_list(m.pop_to_mark()),
    b"a": lambda m: m.extend([m.pop()]),
    b"e": lambda m: m.extend(m.pop_to_mark()),
    b"t": lambda m: m.push_tuple(m.pop_to_mark()),
    b"\x85": lambda m: m.push_last(1),
    b"\x86": lambda m: m.push_last(2),
    b"\x87": lambda m: m.push_last(3),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(m.decimal(rb"-?[0-9]{1,12}")),  # protocol 0 writes booleans as 00 and 01
    b"J": lambda m: m.push(*struct.unpack("<i", m.take(4))),
    b"K": lambda m: m.push(m.uint(1)),
    b"M": lambda m: m.push(m.uint(2)),
    **dict.fromkeys((b"C", b"U"), lambda m: m.push(m.blob(m.uint(1)))),
    **dict.fromkeys((b"B", b"T"), lambda m: m.push(m.blob(m.uint(4)))),
    b"\x8e": lambda m: m.push(m.blob(m.uint(8))),
    b"S": _Machine.python2_string,
    b"V": lambda m: m.push(m.text(m.line(_MAX_TEXT_BYTES), "raw-unicode-escape")),
    b"X": lambda m: m.push(m.text(m.blob(m.uint(4), _MAX_TEXT_BYTES), "utf-8")),
    b"\x8c": lambda m: m.push(m.text(m.blob(m.uint(1)), "utf-8")),
    b"p": lambda m: m.put(m.decimal(rb"[0-9]{1,12}")),
    b"q": lambda m: m.put(m.uint(1)),
    b"r": lambda m: m.put(m.uint(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"g": lambda m: m.get(m.decimal(rb"[0-9]{1,12}")),
    b"h": lambda m: m.get(m.uint(1)),
    b"j": lambda m: m.get(m.uint(4)),
    b"c": lambda m: m.push_name(m.line(256), m.line(256)),
    b"\x93": _Machine.stack_global,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
