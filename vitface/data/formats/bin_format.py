"""InsightFace's verification sets (lfw.bin, cfp_fp.bin, ...), read without executing anything.

A .bin is a pickle of (2N encoded images, N flags): pair i is images 2i and 2i + 1, a true flag means the same person.
An ordinary unpickler calls what the file names. `_Reader` is the unpickler that the standard library has in Python,
whose table of opcodes can be replaced. Only those opcodes are left that make lists, tuples, bytes, text, whole numbers
and booleans. A name becomes a member of `_Name`, and REDUCE and BUILD call nothing: they compute the values of the
three calls that numpy and Python 3 write into such files.

    _codecs.encode(text, "latin1"), bytearray(bytes)      bytes in protocols 0-2, a bytearray in 0-4
    numpy[._core|.core].multiarray._reconstruct + state   an array, in protocols 0-4
    numpy[._core|.core].numeric._frombuffer               an array, in protocol 5
    numpy[._core|.core].multiarray.scalar(dtype, bytes)   a flag as np.bool_, np.int64, ...

An array stays the bytes it was stored as; only those of flags become numbers. Every other opcode, name and form of
arguments is refused. A hostile file costs time and memory in proportion to its size: no more is read than there is, the
memo is a dict (an index of 2^31 costs one entry), the text encoded is no longer than the file, and the numbers of
opcodes and of containers are bounded.
"""

import functools
import io
import math
import pickletools
from dataclasses import dataclass
from enum import Enum
from mmap import mmap
from pickle import BUILD, BYTEARRAY8, FRAME, REDUCE, _Unpickler  # the unpickler in C has no table of opcodes
from typing import Any, NoReturn

import numpy as np

from vitface.errors import DataError
from vitface.files import BEGINNING, identify

MAX_PAIRS = 1_000_000
MAX_IMAGE_BYTES = 10 << 20
_OPCODES = {code: repr(chr(code)) for code in range(256)} | {ord(op.code): op.name for op in pickletools.opcodes}
_CONTAINERS = {"MARK", "EMPTY_LIST", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_OTHER = """
PROTO STOP APPEND APPENDS NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 STRING BINSTRING SHORT_BINSTRING
BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE GLOBAL STACK_GLOBAL
PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET MEMOIZE
"""

_Name = Enum("_Name", "ENCODE BYTEARRAY RECONSTRUCT FROMBUFFER SCALAR NDARRAY DTYPE")
_NAMES = {
    "_codecs encode": _Name.ENCODE,
    "builtins bytearray": _Name.BYTEARRAY,
    "__builtin__ bytearray": _Name.BYTEARRAY,
    **{f"numpy.{core}.multiarray _reconstruct": _Name.RECONSTRUCT for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": _Name.SCALAR for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _Name.FROMBUFFER for core in ("core", "_core")},
    "numpy ndarray": _Name.NDARRAY,
    "numpy dtype": _Name.DTYPE,
}
_CODES = ("u1", "b1", "i1", "i2", "i4", "i8", "u2", "u4", "u8", "f4", "f8")  # numpy's, of images and flags

_HOW = (
    "write it as pickle.dump((images, issame), file): 2 N images as JPEG or PNG bytes, N flags that are true or false"
)
_AGAIN = "get the file again"
_OBJECTS = {  # opcodes that people's files have in place of lists, images and flags
    **dict.fromkeys(("EMPTY_DICT", "DICT"), "a dict"),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), "a set"),
    **dict.fromkeys(("FLOAT", "BINFLOAT"), "a decimal number"),
    **dict.fromkeys(("LONG", "LONG1", "LONG4"), "a very large number"),
    "EMPTY_TUPLE": "an empty tuple",
}


@dataclass(eq=False)
class _Dtype:
    code: str
    order: str = "|"

    @property
    def itemsize(self) -> int:
        return int(self.code[1:])

    def values(self, data: bytes) -> list:
        return np.frombuffer(data, np.dtype(self.order + self.code)).tolist()


@dataclass(eq=False)
class _Array:
    """`data` is None between its REDUCE and its BUILD."""

    data: bytes | None = None
    shape: tuple[int, ...] = ()
    dtype: _Dtype | None = None

    @property
    def flat(self) -> bool:
        """Of one row or column."""
        return self.data is not None and len(self.shape) in (1, 2) and self.shape[1:] in ((), (1,))


def parse_bin(data: bytes | mmap, where: str) -> tuple[list[bytes], list[bool]]:
    """(images, issame) of a .bin file's contents; DataError, which begins with `where`, for anything else.

    Images are not decoded; one that the file repeats by reference is one object. The two lengths are not compared.
    """
    if (other := identify(bytes(data[:BEGINNING]))) and not other[0].startswith("a pickle"):
        what, do = other
        raise DataError(f"{where} is no verification set but {what}; {do or _HOW}")
    reader = _Reader(data, where)
    try:
        return reader.checked(reader.load())
    except DataError:
        raise
    except Exception as error:  # the unpickler raises many types, IndexError for a value that is not there and others
        found = f"{type(error).__name__} {str(error)[:100]}".strip()
        reader.refuse(f"the file is damaged or cut short ({found})", _AGAIN)


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

    def refuse(self, why: str, do: str = _HOW) -> NoReturn:
        raise DataError(f"{self.where}: {why}; {do} (noticed at byte {self.start})")

    def find_class(self, module: str, name: str) -> _Name:
        if f"{module} {name}" not in _NAMES:
            named = f"{module}.{name}"[:80]
            self.refuse(f"the file has an object of {named!r}, which is not data; nothing in the file was executed")
        return _NAMES[f"{module} {name}"]

    def frame(self) -> None:
        """Skips the length of a frame, a hint for reading ahead that is not needed here."""
        if int.from_bytes(self.file.read(8), "little") > self.size - self.file.tell():
            self.refuse("the file was cut short", _AGAIN)

    def bytearray8(self) -> None:
        """Pushes bytes; the unpickler's own would allocate any length before it reads."""
        length = int.from_bytes(self.file.read(8), "little")
        if length > self.size - self.file.tell():
            self.refuse("the file was cut short", _AGAIN)
        self.stack.append(self.file.read(length))

    # In both patterns below, names and codes are text, or bytes where Python 2 wrote them.

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        match function, *(args if isinstance(args, tuple) else ()):
            case _Name.ENCODE, str(text), "latin1":
                self.encoded += len(text)
                if self.encoded > self.size:
                    self.refuse("the file encodes more text than it holds")
                self.stack.append(text.encode("latin-1"))
            case _Name.BYTEARRAY, bytes(raw):
                self.stack.append(raw)
            case _Name.RECONSTRUCT, _Name.NDARRAY, (0,), "b" | b"b":
                self.stack.append(_Array())
            case _Name.FROMBUFFER, bytes(raw), _Dtype() as dtype, tuple(shape), "C" | "F":
                self.stack.append(self.array(raw, shape, dtype))
            case _Name.DTYPE, str() | bytes() as code, 0, 1 if _text(code) in _CODES:
                self.stack.append(_Dtype(_text(code)))
            case _Name.DTYPE, str() | bytes() as code, 0, 1:
                self.refuse(f"the file has values of numpy's type {_text(code)[:40]!r}; nothing in it was executed")
            case _Name.SCALAR, _Dtype() as dtype, bytes(raw) if len(raw) == dtype.itemsize:
                self.stack.append(dtype.values(raw)[0])
            case _:
                self.refuse("the file has an object in a form no verification set has; nothing in it was executed")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        match target, *(state if isinstance(state, tuple) else ()):
            case _Dtype(), 3, "|" | "<" | ">" | b"|" | b"<" | b">" as order, None, None, None, -1, -1, 0:
                target.order = _text(order)
            case _Array(None), 1, tuple(shape), _Dtype() as dtype, 0 | 1, bytes(raw):
                built = self.array(raw, shape, dtype)
                target.data, target.shape, target.dtype = built.data, built.shape, built.dtype
            case _:
                self.refuse("the file has an object in a state no verification set has; nothing in it was executed")

    def array(self, raw: bytes, shape: tuple, dtype: _Dtype) -> _Array:
        if len(shape) > 4 or not all(isinstance(side, int) and side >= 0 for side in shape):
            self.refuse("the file has an array of a shape no verification set has")
        if math.prod(shape) * dtype.itemsize != len(raw):
            self.refuse("the file has an array that is longer or shorter than its data", _AGAIN)
        return _Array(raw, shape, dtype)

    def checked(self, whole: object) -> tuple[list[bytes], list[bool]]:
        """What STOP returned, as (images, flags)."""
        if self.stack or self.metastack or self.file.tell() != self.size:
            self.refuse("there is something left over behind the set", _AGAIN)
        if not isinstance(whole, tuple | list) or len(whole) != 2:
            self.refuse(f"the file holds {_describe(whole)} and not a pair of images and flags")
        images, flags = whole
        if isinstance(flags, _Array) and flags.flat:
            assert flags.dtype and flags.data is not None
            flags = flags.dtype.values(flags.data)
        if not isinstance(images, list | tuple) or not isinstance(flags, list | tuple):
            self.refuse(f"the images are {_describe(images)} and the flags {_describe(flags)}, not two lists")
        encoded = [self.image(i, image) for i, image in enumerate(images)]
        for i, flag in enumerate(flags):
            if not isinstance(flag, int | float) or flag not in (0, 1):
                value = repr(flag) if isinstance(flag, int | float) else _describe(flag)
                self.refuse(f"flag {i} is {value}, neither true (one person) nor false (two people)")
        return encoded, [bool(flag) for flag in flags]

    def image(self, i: int, image: object) -> bytes:
        if isinstance(image, _Array) and image.flat and image.dtype and image.dtype.code == "u1":
            image = image.data
        if not isinstance(image, bytes):
            self.refuse(f"image {i} is {_describe(image)} and not the bytes of a JPEG or PNG file")
        if len(image) > MAX_IMAGE_BYTES:
            self.refuse(f"image {i} has {len(image)} bytes, at most {MAX_IMAGE_BYTES} are accepted")
        return image


def _text(code: str | bytes) -> str:
    return code if isinstance(code, str) else code.decode("latin-1")


def _describe(value: object) -> str:
    """What a value is, for the person who wrote the file."""
    match value:
        case None:
            return "nothing (None)"
        case str():
            return f"the text {value[:40]!r}"
        case bool() | int() | float():
            return f"the number {value}"
        case list() | tuple():
            return f"a {type(value).__name__} of {len(value)}"
        case _Array(dtype=_Dtype(code=code)):
            return f"an array of {' x '.join(map(str, value.shape)) or 'no'} values ({code})"
        case bytes():
            return f"{len(value)} bytes"
    return "an unfinished object"


def _step(code: int, reader: _Reader) -> None:
    """Carries out the opcode that was just read."""
    reader.name, reader.start = _OPCODES[code], reader.file.tell() - 1
    reader.opcodes += 1
    reader.containers += reader.name in _CONTAINERS
    if reader.opcodes > reader.max_opcodes or reader.containers > reader.max_containers:
        reader.refuse("the file has far more parts than a verification set of its size", _AGAIN)
    if code not in _ACTIONS:
        what = _OBJECTS.get(reader.name, "an object")
        reader.refuse(f"the file holds {what}, which no verification set has; nothing in it was executed")
    _ACTIONS[code](reader)


_ACTIONS: dict[int, Any] = {
    **{code: _Unpickler.dispatch[code] for code, name in _OPCODES.items() if name in {*_CONTAINERS, *_OTHER.split()}},
    REDUCE[0]: _Reader.reduce,
    BUILD[0]: _Reader.build,
    FRAME[0]: _Reader.frame,
    BYTEARRAY8[0]: _Reader.bytearray8,
}
_TABLE: dict[int, Any] = {code: functools.partial(_step, code) for code in _OPCODES}
_Reader.dispatch = _TABLE
