"""InsightFace's verification sets (lfw.bin, cfp_fp.bin, ...), read without executing anything.

A .bin is a pickle of (2N encoded images, N flags): pair i is images 2i and 2i + 1, a true flag means the same person.
An ordinary unpickler calls what the file names. `_Reader` is the unpickler that the standard library has in Python,
whose table of opcodes can be replaced. Only those opcodes are left that make lists, tuples, bytes, text, whole numbers
and booleans. A name becomes a member of `_Name`, and REDUCE and BUILD call nothing: they compute the values of the
three calls that numpy and Python 3 write into such files.

    _codecs.encode(text, "latin1")                               bytes in protocols 0-2
    numpy[._core|.core].multiarray._reconstruct + state          an image as a uint8 array of one column
    numpy[._core|.core].multiarray.scalar(dtype b1, byte)        a flag as np.bool_

Every other opcode, name and form of arguments is refused, and the message names its byte. A hostile file costs time and
memory in proportion to its size: no more is read than there is, the memo is a dict (an index of 2^31 costs one entry),
the text encoded is no longer than the file, and the numbers of opcodes and of containers are bounded.
"""

import functools
import io
import pickletools
from dataclasses import dataclass
from enum import Enum
from mmap import mmap
from pickle import BUILD, FRAME, REDUCE, _Unpickler  # the unpickler in C has no table of opcodes
from typing import Any, NoReturn

from vitface.errors import DataError

MAX_PAIRS = 1_000_000
MAX_IMAGE_BYTES = 10 << 20
_OPCODES = {code: repr(chr(code)) for code in range(256)} | {ord(op.code): op.name for op in pickletools.opcodes}
_CONTAINERS = {"MARK", "EMPTY_LIST", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_OTHER = """
PROTO STOP APPEND APPENDS NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 STRING BINSTRING SHORT_BINSTRING
BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE GLOBAL STACK_GLOBAL
PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE
"""

_Name = Enum("_Name", "ENCODE RECONSTRUCT SCALAR NDARRAY DTYPE UINT8 BOOL")  # the last two are what DTYPE makes
_NAMES = {
    "_codecs encode": _Name.ENCODE,
    "numpy.core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": _Name.RECONSTRUCT,
    "numpy.core.multiarray scalar": _Name.SCALAR,
    "numpy._core.multiarray scalar": _Name.SCALAR,
    "numpy ndarray": _Name.NDARRAY,
    "numpy dtype": _Name.DTYPE,
}


@dataclass(eq=False)
class _Array:
    """A uint8 array; `data` is None between its REDUCE and its BUILD."""

    data: bytes | None = None


def parse_bin(data: bytes | mmap, where: str) -> tuple[list[bytes], list[bool]]:
    """(images, issame) of a .bin file's contents; DataError, which begins with `where`, for anything else.

    Images are not decoded; one that the file repeats by reference is one object. The two lengths are not compared.
    """
    reader = _Reader(data, where)
    try:
        return reader.checked(reader.load())
    except DataError:
        raise
    except Exception as error:  # the unpickler raises many types, IndexError for a value that is not there and others
        reader.refuse(f"is damaged or cut short ({type(error).__name__} {str(error)[:100]}); get the file again")


class _Reader(_Unpickler):
    stack: list[Any]  # since the last MARK
    metastack: list[list]  # before it

    def __init__(self, data: bytes | mmap, where: str):
        self.file: Any = io.BytesIO(data) if isinstance(data, bytes) else data
        super().__init__(self.file, encoding="bytes")  # what Python 2 wrote as str
        self.size, self.where = len(data), where
        self.name, self.start = "", 0  # of the opcode that is carried out
        self.opcodes = self.containers = self.encoded = 0  # so far
        # real files have one opcode per 100 bytes or less
        self.max_opcodes, self.max_containers = 1_000_000 + self.size // 16, 1000 + self.size // 32

    def refuse(self, why: str) -> NoReturn:
        raise DataError(f"{self.where}: opcode {self.name} at byte {self.start} {why}")

    def find_class(self, module: str, name: str) -> _Name:
        if f"{module} {name}" not in _NAMES:
            self.refuse(f"names {f'{module} {name}'[:80]!r}, which is not data; nothing in the file was executed")
        return _NAMES[f"{module} {name}"]

    def frame(self) -> None:
        """Skips the length of a frame, a hint for reading ahead that is not needed here."""
        if int.from_bytes(self.file.read(8), "little") > self.size - self.file.tell():
            self.refuse("is longer than the file; download it again")

    # In both patterns below, names and codes are text, or bytes where Python 2 wrote them.

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        match function, *(args if isinstance(args, tuple) else ()):
            case _Name.ENCODE, str(text), "latin1":
                self.encoded += len(text)
                if self.encoded > self.size:
                    self.refuse("encodes more text than the file holds")
                self.stack.append(text.encode("latin-1"))
            case _Name.RECONSTRUCT, _Name.NDARRAY, (0,), "b" | b"b":
                self.stack.append(_Array())
            case _Name.DTYPE, "u1" | b"u1", 0, 1:
                self.stack.append(_Name.UINT8)
            case _Name.DTYPE, "b1" | b"b1", 0, 1:
                self.stack.append(_Name.BOOL)
            case _Name.SCALAR, _Name.BOOL, (b"\0" | b"\1") as byte:
                self.stack.append(byte == b"\1")
            case _:
                self.refuse("calls something in a form no verification set has; nothing in the file was executed")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        match target, *(state if isinstance(state, tuple) else ()):
            case _Name.UINT8 | _Name.BOOL, 3, "|" | b"|", None, None, None, -1, -1, 0:
                pass
            case _Array(None), 1, (size,) | (size, 1), _Name.UINT8, 0 | 1, bytes(raw) if size == len(raw):
                target.data = raw
            case _:
                self.refuse("gives a state that is not one of a uint8 array of one column; nothing was executed")

    def checked(self, whole: object) -> tuple[list[bytes], list[bool]]:
        """What STOP returned, as (images, flags)."""
        if self.stack or self.metastack or self.file.tell() != self.size:
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


def _step(code: int, reader: _Reader) -> None:
    """Carries out the opcode that was just read."""
    reader.name, reader.start = _OPCODES[code], reader.file.tell() - 1
    reader.opcodes += 1
    reader.containers += reader.name in _CONTAINERS
    if reader.opcodes > reader.max_opcodes or reader.containers > reader.max_containers:
        reader.refuse("is one too many for a verification set of this size")
    if code not in _ACTIONS:
        reader.refuse("is not data; the file was not loaded and nothing in it was executed")
    _ACTIONS[code](reader)


_ACTIONS: dict[int, Any] = {
    **{code: _Unpickler.dispatch[code] for code, name in _OPCODES.items() if name in {*_CONTAINERS, *_OTHER.split()}},
    REDUCE[0]: _Reader.reduce,
    BUILD[0]: _Reader.build,
    FRAME[0]: _Reader.frame,
}
_TABLE: dict[int, Any] = {code: functools.partial(_step, code) for code in _OPCODES}
_Reader.dispatch = _TABLE
