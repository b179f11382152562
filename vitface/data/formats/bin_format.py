"""InsightFace's verification sets (lfw.bin, cfp_fp.bin, ...), read without unpickling.

A .bin is a pickle of (2N encoded images, N flags): pair i is images 2i and 2i + 1, a true flag means the same person.
An unpickler would execute what the file asks for. Here `pickletools` reads the opcodes, and a small stack machine knows
what data is: lists, tuples, bytes, text, whole numbers, booleans. It knows three calls, which numpy and Python 3 write
into such files, and computes their values itself:

    _codecs.encode(text, "latin1")                               bytes in protocols 0-2
    numpy[._core|.core].multiarray._reconstruct + state          an image as a uint8 array of one column
    numpy[._core|.core].multiarray.scalar(dtype b1, byte)        a flag as np.bool_

Every other opcode, name and form of arguments is refused, and the message names its byte. A hostile file costs time and
memory in proportion to its size: no more is read than there is, the memo is a dict (an index of 2^31 costs one entry),
no operation copies a value that the file can name again, lists hold no containers, tuples nest two deep, and the number
of opcodes is bounded.
"""

import codecs
import io
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from mmap import mmap
from typing import Any, NoReturn

from vitface.errors import DataError

MAX_PAIRS = 1_000_000
MAX_IMAGE_BYTES = 10 << 20
_MAX_OPCODES = 1_000_000  # and one more per 16 bytes of file; real files have one per 100 bytes or less
_MAX_MARKS = _MAX_TUPLE = _MAX_LISTS = 8
_PYTHON2_ESCAPE = re.compile(rb"""\\(?:x[0-9a-f]{2}|[\\'"nrt])""")

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
        self.file: Any = io.BytesIO(data) if isinstance(data, bytes) else data
        self.size, self.where = len(data), where
        self.name, self.start = "", 0  # of the opcode that is carried out
        self.stack: list = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}
        self.lists = 0

    def run(self) -> tuple[list[bytes], list[bool]]:
        for _ in range(_MAX_OPCODES + self.size // 16):
            self.start, code = self.file.tell(), self.file.read(1).decode("latin-1")
            if not code:
                raise DataError(f"{self.where}: cut short, it ends at byte {self.start} without a STOP; get it again")
            opcode = _OPCODES.get(code)
            self.name = opcode.name if opcode else repr(code)
            if self.name == "STOP":
                return self.result()
            if opcode is None or self.name not in _ACTIONS:
                self.refuse("is not data; the file was not loaded and nothing in it was executed")
            try:
                read = _READERS.get(self.name) or (opcode.arg and opcode.arg.reader)
                argument = read and read(self.file)
            except ValueError as error:
                self.refuse(f"is damaged or cut short ({error}); get the file again")
            _ACTIONS[self.name](self, argument)
        self.refuse("is one too many for a verification set of this size")

    def result(self) -> tuple[list[bytes], list[bool]]:
        whole = self.pop()
        if self.stack or self.marks or self.file.tell() != self.size:
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
        raise DataError(f"{self.where}: opcode {self.name} at byte {self.start} {why}")

    def push_text(self, text: str) -> None:
        try:
            self.push(_Text(text.encode("latin-1")))
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

    def protocol(self, version: int) -> None:
        if version > 5:
            self.refuse(f"asks for protocol {version}, known are 0 to 5")

    def frame(self, size: int) -> None:
        if size > self.size - self.file.tell():
            self.refuse("is longer than the file; download it again")

    def push_name(self, name: str) -> None:
        if name not in _NAMES:
            self.refuse(f"names {name[:80]!r}, which is not data; nothing in the file was executed")
        self.push(_NAMES[name])

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, _Text) or not isinstance(module, _Text):
            self.refuse("names something by what is not text")
        self.push_name((module.latin1 + b" " + name.latin1).decode("latin-1"))

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


def _read_string(file: io.BytesIO | mmap) -> bytes:
    line = file.readline()[:-1]
    quoted = len(line) >= 2 and line[:1] in b"'\"" and line[:1] == line[-1:]
    if not quoted or b"\\" in _PYTHON2_ESCAPE.sub(b"", line[1:-1]):
        raise ValueError("not a quoted string")
    return codecs.escape_decode(line[1:-1])[0]


def _read_global(file: io.BytesIO | mmap) -> str:
    return (file.readline()[:-1] + b" " + file.readline()[:-1]).decode("latin-1")


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_READERS = {"STRING": _read_string, "GLOBAL": _read_global}  # for these two, pickletools' own know ASCII only


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "MARK": lambda m, _: m.mark(),
    "EMPTY_LIST": lambda m, _: m.push_list([]),
    "LIST": lambda m, _: m.push_list(m.pop_to_mark()),
    "APPEND": lambda m, _: m.extend([m.pop()]),
    "APPENDS": lambda m, _: m.extend(m.pop_to_mark()),
    "TUPLE": lambda m, _: m.push_tuple(m.pop_to_mark()),
    "TUPLE1": lambda m, _: m.push_last(1),
    "TUPLE2": lambda m, _: m.push_last(2),
    "TUPLE3": lambda m, _: m.push_last(3),
    "NONE": _Machine.push,
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "GLOBAL": _Machine.push_name,
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "REDUCE": lambda m, _: m.reduce(),
    "BUILD": lambda m, _: m.build(),
    "FRAME": _Machine.frame,
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2"), _Machine.push),
    **dict.fromkeys(("STRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), _Machine.push),
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING"), lambda m, text: m.push(text.encode("latin-1"))),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE"), _Machine.push_text),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
}
