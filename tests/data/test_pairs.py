"""Verification sets: legal pickles of every protocol are what `pickle` makes of them, hostile ones execute nothing."""

import contextlib
import os
import pickle
import pickletools
import random
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitface.data.formats.bin_format import parse_bin
from vitface.data.formats.pair_lists import read_pair_list
from vitface.data.formats.pairs import VerificationSet, read_bin, write_bin
from vitface.data.images import decode_image
from vitface.errors import DataError

DATA = Path(os.environ.get("VITFACE_TEST_DATA", Path(__file__).parents[3] / "shared/data"))
JPEG = b"\xff\xd8\xff"
EVERY_BYTE = JPEG + bytes(range(256))
IMAGES = [EVERY_BYTE, JPEG + b"b", JPEG + b"'\"\\\n\r\0\x1a", JPEG + b"b" * 300, b"\x89PNG\r\n\x1a\n...", EVERY_BYTE]
ISSAME = [True, False, True]


def arrays(images, shape=(-1, 1)):
    return [np.frombuffer(image, np.uint8).reshape(shape).copy() for image in images]


def old_numpy(data):
    data = data.replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")
    return data.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray").replace(b"._core.", b".core.")


def python2(images, flags, quote="short"):
    """What Python 2's cPickle wrote: str as STRING (protocol 0), or SHORT_BINSTRING and BINSTRING (1 and 2)."""

    def string(image):
        if quote == "repr":
            return b"S" + repr(image)[1:].encode() + b"\n"
        return b"U" + bytes([len(image)]) + image if len(image) < 256 else b"T" + struct.pack("<i", len(image)) + image

    puts = [f"p{i + 3}\n".encode() if quote == "repr" else b"q" + bytes([i + 3]) for i in range(len(images))]
    flag = (b"I00\n", b"I01\n") if quote == "repr" else (b"\x89", b"\x88")
    if quote == "repr":
        lists = [
            b"(lp1\n" + b"".join(string(x) + p + b"a" for x, p in zip(images, puts, strict=True)),
            b"(lp2\n" + b"".join(flag[f] + b"a" for f in flags),
        ]
        return b"(" + b"".join(lists) + b"tp0\n."
    lists = [
        b"]q\1(" + b"".join(string(x) + p for x, p in zip(images, puts, strict=True)) + b"e",
        b"]q\2(" + b"".join(flag[f] for f in flags) + b"e",
    ]
    return b"\x80\x02" + b"".join(lists) + b"\x86q\0."


LEGAL = {
    **{f"bytes {p}": pickle.dumps((IMAGES, ISSAME), p) for p in range(6)},
    **{f"flags 0 and 1, {p}": pickle.dumps((IMAGES, [1, 0, 1]), p) for p in range(6)},
    **{f"numpy flags {p}": pickle.dumps((IMAGES, list(np.array(ISSAME))), p) for p in range(6)},
    **{f"columns {p}": pickle.dumps((arrays(IMAGES), ISSAME), p) for p in range(6)},
    **{f"rows {p}": pickle.dumps((arrays(IMAGES, -1), ISSAME), p) for p in range(6)},
    **{f"two lists {p}": pickle.dumps([IMAGES, ISSAME], p) for p in range(6)},
    **{f"an array of flags {p}": pickle.dumps((IMAGES, np.array(ISSAME)), p) for p in range(6)},
    **{f"whole numbers {p}": pickle.dumps((arrays(IMAGES), np.array([1, 0, 1])), p) for p in range(6)},
    "read-only arrays": pickle.dumps((tuple(np.frombuffer(x, np.uint8) for x in IMAGES), ISSAME), 5),
    **{f"bytearrays {p}": pickle.dumps((list(map(bytearray, IMAGES)), ISSAME), p) for p in range(6)},
    "big-endian flags": pickle.dumps((IMAGES, np.array([1, 0, 1], ">i4")), 4),
    "a list of int64": pickle.dumps((IMAGES, list(np.array([1, 0, 1]))), 5),
    "decimal flags": pickle.dumps((IMAGES, np.array([1.0, 0.0, 1.0])), 5),
    "columns of numpy 1, protocol 5": b"\x80\5" + old_numpy(pickle.dumps((arrays(IMAGES), np.array(ISSAME)), 5))[11:],
    "columns of numpy 1": old_numpy(pickle.dumps((arrays(IMAGES), list(np.array(ISSAME))), 3)),
    "python 2, protocol 0": python2(IMAGES, ISSAME, "repr"),
    "python 2, protocol 2": python2(IMAGES, ISSAME),
}


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")  # of pickle, for numpy 1's names
@pytest.mark.parametrize("name", LEGAL)
def test_legal_files_are_what_pickle_makes_of_them(tmp_path, name):
    (tmp_path / "tiny.bin").write_bytes(LEGAL[name])
    found = read_bin(tmp_path / "tiny.bin")
    images, flags = pickle.loads(LEGAL[name], encoding="bytes")
    assert found.images == [bytes(image) for image in images] == IMAGES
    assert found.issame.dtype == bool and found.issame.tolist() == [bool(flag) for flag in flags] == ISSAME
    assert found.name == "tiny" and found.folds is None


def test_python2_arrays():
    """numpy under Python 2 wrote its codes as str and its flags as whole numbers."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1K\4K\1\x86"
        b"cnumpy\ndtype\nU\2u1K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89U\4\xff\xd8\xff1tb"
    )
    data = b"\x80\x02](" + array + array.replace(b"\xff1", b"\xff2") + b"e](\x88e\x86."
    assert parse_bin(data, "x") == ([JPEG + b"1", JPEG + b"2"], [True])
    theirs = pickle.loads(data, encoding="bytes")[0]
    assert [bytes(image) for image in theirs] == [JPEG + b"1", JPEG + b"2"]


def test_large_opcodes():
    """BINBYTES8 and BINSTRING, which pickle writes only above 255 bytes or 4 GB."""
    data = b"\x80\x04](\x8e" + struct.pack("<Q", 4) + JPEG + b"1T" + struct.pack("<I", 4) + JPEG + b"2e](I01\ne\x86."
    assert parse_bin(data, "x") == ([JPEG + b"1", JPEG + b"2"], [True])


@given(
    st.lists(st.binary(max_size=300).map(JPEG.__add__), min_size=1, max_size=4).map(lambda x: 2 * x),
    st.integers(0, 5),
    st.booleans(),
)
def test_any_images_round_trip(images, protocol, as_arrays):
    flags = [i % 2 == 0 for i in range(len(images) // 2)]
    stored = arrays(images) if as_arrays else images
    assert parse_bin(pickle.dumps((stored, flags), protocol), "x") == (images, flags)


def test_repeated_images_are_one_object():
    images, flags = parse_bin(pickle.dumps(([IMAGES[0], IMAGES[1]] * 500, [True] * 500), 4), "x")
    assert len({id(image) for image in images}) == 2 and flags == [True] * 500


def short(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def live_payloads(command):
    """Pickles that do run `command` when they are unpickled; the test proves it."""
    c = command.encode()
    python = f"__import__('os').system('{command}')"
    reduce_os = b"cos\nsystem\n(V" + c + b"\ntR"
    return {
        "global": reduce_os + b".",
        "posix": b"cposix\nsystem\n(S'" + c + b"'\ntR.",
        "stack_global": b"\x80\x04" + short("os") + short("system") + b"\x93" + short(c) + b"\x85R.",
        "memoised": b"\x80\x04" + short("os") + b"\x94" + short("system") + b"\x94\x93\x94" + short(c) + b"\x85R\x94.",
        "inst": b"(V" + c + b"\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nV" + c + b"\no.",
        "subprocess": b"csubprocess\ncall\n((lVsh\naV-c\naV" + c + b"\natR.",
        "eval": b"cbuiltins\neval\n(V" + python.encode() + b"\ntR.",
        "exec": b"c__builtin__\nexec\n(V" + python.encode() + b"\ntR.",
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V" + c + b"\ntR.",
        "dotted": b"\x80\x04" + short("os") + short("path.os.system") + b"\x93" + short(c) + b"\x85R.",
        "build": b"cfunctools\npartial\n(cbuiltins\nprint\ntR(cos\nsystem\n(V" + c + b"\nt}Ntb(tR.",
        "list element": b"(](C\4" + JPEG + b"1" + reduce_os + b"e](\x88et.",
        "scalar object": b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(VO8\nI00\nI01\ntR" + reduce_os + b"tR.",
        "before stop": pickle.dumps((IMAGES, ISSAME), 2)[:-1] + reduce_os + b"0.",
        "pickle in pickle": b"c_pickle\nloads\n(" + b"B" + struct.pack("<I", len(reduce_os) + 1) + reduce_os + b".tR.",
    }


LIVE = list(live_payloads("true"))


@pytest.mark.parametrize("name", LIVE)
def test_nothing_is_executed(tmp_path, name):
    sentinel = tmp_path / "executed"
    payload = live_payloads(f"touch {sentinel}")[name]
    with contextlib.suppress(Exception):
        pickle.loads(payload)
    assert sentinel.exists()  # the payload is live
    sentinel.unlink()
    (tmp_path / "evil.bin").write_bytes(payload)
    with pytest.raises(DataError, match=r"evil\.bin: .*nothing in .* was executed; .*noticed at byte \d+"):
        read_bin(tmp_path / "evil.bin")
    assert not sentinel.exists()


def call(module, name, args):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n(" + args + b"tR"


DTYPE_U1 = call("numpy", "dtype", b"X\2\0\0\0u1\x89\x88") + b"(K\3X\1\0\0\0|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
ARRAY = call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n(K\0tC\1b")


def array(state):
    """A set whose first image is a numpy array of this state."""
    return b"](" + ARRAY + b"(" + state + b"tbC\4" + JPEG + b"2e](\x88e\x86."


def pair(images=b"C\4\xff\xd8\xff1C\4\xff\xd8\xff2", flags=b"\x88"):
    return b"](" + images + b"e](" + flags + b"e\x86."


TEXT, SECOND = b"V\xff\xd8\xff1\n", b"C\4\xff\xd8\xff2"
DTYPE_I8 = DTYPE_U1.replace(b"u1", b"i8")


def buffer(raw=b"\x96\4\0\0\0\0\0\0\0\xff\xd8\xff1", dtype=DTYPE_U1, shape=b"K\4\x85", order=b"VC\n"):
    """A set whose first image is an array as protocol 5 writes it."""
    return pair(call("numpy._core.numeric", "_frombuffer", raw + dtype + shape + order) + SECOND)


HOSTILE = {
    "empty": b"",
    "stop alone": b".",
    "memo bomb, 9 bytes": b"\x80\2Nr\0\xe1\xf5\5.",
    "memo bomb": b"Nr\xff\xff\xff\xff.",
    "text memo bomb": b"]p99999999999999999999\n.",
    "get without put": b"h\7.",
    "text get": b"g-1\n.",
    "BINBYTES8 of 2^40": b"\x80\4](\x8e" + struct.pack("<Q", 1 << 40) + b"x",
    "BINBYTES8 of 2^64-1": b"\x80\4](\x8e" + b"\xff" * 8,
    "BINBYTES8 of 2^62": b"](\x8e" + struct.pack("<Q", 1 << 62) + JPEG,
    "BINBYTES past the end": b"](B" + struct.pack("<I", 9 << 20) + b"x",
    "BINSTRING negative": b"T\xff\xff\xff\xff.",
    "BINUNICODE of 2^31": b"X\xff\xff\xff\x7f.",
    "BINUNICODE8": b"\x8d" + struct.pack("<Q", 1 << 40),
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 40),
    "LONG4": b"\x8b\xff\xff\xff\x7f.",
    "LONG": b"L" + b"9" * 100_000 + b"L\n.",
    "INT of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "INT text": b"Iten\n.",
    "FLOAT": b"F1.0\n.",
    "line without an end": b"V" + b"a" * 1000,
    "frame past the end": b"\x80\4\x95" + b"\xff" * 8 + b".",
    "protocol 6": b"\x80\6" + pair(),
    "marks a million deep": b"(" * 1_000_000,
    "lists a million deep": b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "tuples a million deep": b"N" + b"\x85" * 1_000_000 + b".",
    "tuple of 100,000": b"(" + b"N" * 100_000 + b"t.",
    "list in itself": b"]q\0h\0a.",
    "list in a list": b"](]e.",
    "dict": b"}.",
    "set": b"\x8f.",
    "dup": b"N2\x86.",
    "extension 1": b"\x82\1.",
    "extension 2": b"\x83\1\0.",
    "extension 4": b"\x84\1\0\0\0.",
    "persistent id": b"Pos.system\n.",
    "binary persistent id": b"NQ.",
    "INST": b"(V1\ni_codecs\nencode\n.",
    "OBJ": b"(c_codecs\nencode\nV1\nVlatin1\no.",
    "NEWOBJ": b"csubprocess\nPopen\n(Vsh\nt\x81.",
    "NEWOBJ of an array": b"cnumpy\nndarray\n(K\2t\x81.",
    "NEWOBJ_EX": b"\x80\4c_codecs\nencode\n(tN\x92.",
    "next buffer": b"\x80\5\x97.",
    "load_from_bytes": call("torch.storage", "_load_from_bytes", b"C\1x") + b".",
    "numpy.load": call("numpy", "load", b"Vx\n") + b".",
    "numpy name under a name": call("numpy.core", "multiarray._reconstruct", b"") + b".",
    "numpy.core.ndarray": b"cnumpy.core\nndarray\n.",
    "frombuffer": call("numpy._core.numeric", "_frombuffer", b"C\1x") + b".",
    "bytes": call("builtins", "bytes", b"J\xff\xff\xff\x7f") + b".",
    "bytearray": call("builtins", "bytearray", b"J\xff\xff\xff\x7f") + b".",
    "name from a list": b"]q\0]h\0\x93.",
    "name from numbers": b"K\1K\2\x93.",
    "name with a newline": b"\x80\4" + short("os\nsystem") + short("x") + b"\x93.",
    "codecs decode": call("_codecs", "decode", b"C\1xVzip\n") + b".",
    "codecs lookup": call("_codecs", "lookup", b"Vlatin1\n") + b".",
    **{
        f"encode as {codec}": pair(call("_codecs", "encode", TEXT + b"V" + codec.encode() + b"\n") + SECOND)
        for codec in ("rot13", "utf-8", "latin-1", "idna", "unicode_escape", "zip", "mbcs", "LATIN1")
    },
    "encode with errors": pair(call("_codecs", "encode", TEXT + b"Vlatin1\nVignore\n") + SECOND),
    "encode of bytes": pair(call("_codecs", "encode", b"C\4" + JPEG + b"1Vlatin1\n") + SECOND),
    "encode as a value": pair(b"c_codecs\nencode\n"),
    "text outside latin-1": b"X\4\0\0\0\xf0\x9f\x98\x80.",
    "text not UTF-8": b"X\1\0\0\0\xff.",
    "raw unicode escape cut": b"V\\u12\n.",
    "string with an odd escape": b"S'\\q'\n.",
    "string without quotes": b"Sa\n.",
    "string with one quote": b"S'\n.",
    "call of a number": b"K\1(tR.",
    "call without arguments": b"c_codecs\nencode\nR.",
    "call with a list": b"c_codecs\nencode\n](C\1aC\6latin1eR.",
    "build of a list": b"]Nb.",
    "build of nothing": b"b.",
    "build of a function": pair(b"c_codecs\nencode\nNbC\4\xff\xd8\xff1" + SECOND),
    "build of a class": pair(b"cnumpy\nndarray\n(NK\1tbC\4\xff\xd8\xff1" + SECOND),
    "build of bytes": pair(b"C\4\xff\xd8\xff1(NK\1tb" + SECOND),
    "call of an array": pair(ARRAY + b"(tR" + SECOND),
    "call of a function that a call returned": pair(call("_codecs", "encode", TEXT + b"Vlatin1\n") + b"(tR" + SECOND),
    "call of a class": pair(call("numpy", "ndarray", b"(J\xff\xff\xff\x7ft") + SECOND),
    "reconstruct a dtype": call("numpy.core.multiarray", "_reconstruct", b"cnumpy\ndtype\n(K\0tC\1b") + b".",
    "reconstruct 10^9": call("numpy.core.multiarray", "_reconstruct", b"cnumpy\nndarray\n(J\0\xca\x9a;tC\1b") + b".",
    "object dtype": call("numpy", "dtype", b"Vobject\n\x89\x88") + b".",
    "O8 dtype": call("numpy", "dtype", b"VO8\n\x89\x88") + b".",
    "dtype from a dict": call("numpy", "dtype", b"}\x89\x88") + b".",
    "dtype state with fields": call("numpy", "dtype", b"Vu1\n\x89\x88") + b"(K\3V|\nNNVx\nNJ\0\0\0\0K\0tb.",
    "scalar of u1": call("numpy.core.multiarray", "scalar", DTYPE_U1 + b"C\1\1") + b".",
    "array never built": pair(ARRAY + b"C\4\xff\xd8\xff2"),
    "array longer than its data": array(b"K\1(J\0\xca\x9a;t" + DTYPE_U1 + b"\x89C\4\xff\xd8\xff1"),
    "array of two columns": array(b"K\1(K\2K\2t" + DTYPE_U1 + b"\x89C\4\xff\xd8\xff1"),
    "array of list data": array(b"K\1(K\4t" + DTYPE_U1 + b"\x89]"),
    "array without dtype": array(b"K\1(K\4tN\x89C\4\xff\xd8\xff1"),
    "array of version 2": array(b"K\2(K\4t" + DTYPE_U1 + b"\x89C\4\xff\xd8\xff1"),
    "array of 4 x 2 in 4 bytes": array(b"K\1(K\4K\2t" + DTYPE_U1 + b"\x89C\4\xff\xd8\xff1"),
    "array built twice": pair(ARRAY + 2 * (b"(K\1(K\4t" + DTYPE_U1 + b"\x89C\4\xff\xd8\xff1tb") + SECOND),
    "BYTEARRAY8 of 2^62": b"\x80\5](\x96" + struct.pack("<Q", 1 << 62) + JPEG,
    "BYTEARRAY8 past the end": b"\x80\5](\x96" + struct.pack("<Q", 9 << 20) + b"x",
    "BYTEARRAY8 cut": b"\x80\5](\x96\4\0",
    "readonly buffer": b"\x80\5\x96" + struct.pack("<Q", 1) + b"x\x98.",
    "buffer longer than its data": buffer(shape=b"J\0\xca\x9a;\x85"),
    "buffer of huge sides": buffer(shape=b"(" + 4 * b"J\xff\xff\xff\x7f" + b"t"),
    "buffer of a negative side": buffer(shape=b"J\xff\xff\xff\xffJ\xfc\xff\xff\xff\x86"),
    "buffer of five sides": buffer(shape=b"(" + 4 * b"K\1" + b"K\4t"),
    "buffer without a shape": buffer(shape=b"N"),
    "buffer of objects": buffer(dtype=call("numpy", "dtype", b"X\2\0\0\0O8\x89\x88")),
    "buffer without dtype": buffer(dtype=b"N"),
    "buffer of text": buffer(raw=b"V\xff\xd8\xff1\n"),
    "buffer of a name": buffer(raw=b"cnumpy\nndarray\n"),
    "buffer in another order": buffer(order=b"VK\n"),
    "buffer with a fifth argument": buffer(order=b"VC\nN"),
    "buffer called by another name": pair(call("numpy._core.numeric", "frombuffer", b"C\1x") + SECOND),
    "bytearray of text": pair(call("builtins", "bytearray", b"V\xff\xd8\xff1\nVlatin1\n") + SECOND),
    "dtype of 8 bytes for a scalar of 1": pair(flags=call("numpy.core.multiarray", "scalar", DTYPE_I8 + b"C\1\1")),
    "scalar of text": pair(flags=call("numpy.core.multiarray", "scalar", DTYPE_I8 + b"V12345678\n")),
    "flags of 2 x 2": pickle.dumps((IMAGES[:4], np.ones((2, 2), bool)), 5),
    "flags of 2": pickle.dumps((IMAGES[:4], np.array([2, 0])), 5),
    "flags nan": pickle.dumps((IMAGES[:4], np.array([np.nan, 0])), 5),
    "odd images": pair(b"C\4\xff\xd8\xff1"),
    "no images": pair(b""),
    "no pairs": pair(b"", b""),
    "one flag too many": pair(flags=b"\x88\x89"),
    "flag 2": pair(flags=b"K\2"),
    "flag -1": pair(flags=b"J\xff\xff\xff\xff"),
    "flag bytes": pair(flags=b"C\1\1"),
    "flag none": pair(flags=b"N"),
    "text image": pair(b"C\4\xff\xd8\xff1X\7\0\0\0" + "\xff\xd8\xff2".encode()),
    "true image": pair(b"C\4\xff\xd8\xff1\x88"),
    "gif image": pair(b"C\4\xff\xd8\xff1C\4GIF8"),
    "empty image": pair(b"C\4\xff\xd8\xff1C\0"),
    "lists the other way": b"](\x88e](C\4\xff\xd8\xff1C\4\xff\xd8\xff2e\x86.",
    "three lists": b"]]]\x87.",
    "one list": b"].",
    "a list of both": b"(]]l.",
    "the same list twice": b"](C\4\xff\xd8\xff1\x88eq\0h\0\x86.",
    "two values": pair()[:-1] + b"N.",
    "open mark": b"(" + pair(),
    "bytes after the end": pair() + b"x",
    "append to a tuple": b"(tNa.",
    "append to nothing": b"Na.",
    "appends without mark": b"]e.",
    "pop below a mark": b"N(\x85.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_no_cost(tmp_path, name):
    path = tmp_path / "evil.bin"
    path.write_bytes(HOSTILE[name])
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(DataError, match="evil"):
        read_bin(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - began < 1 and peak < 8 << 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memo bomb", r"holds nothing \(None\) .*at byte 6"),  # one entry of a dict
        ("BINBYTES8 of 2^40", "damaged or cut short .*at byte 4"),
        ("BINBYTES past the end", "cut short"),
        ("marks a million deep", "far more parts .*at byte 32250"),
        ("lists a million deep", "far more parts .*at byte 63500"),
        ("tuples a million deep", "far more parts .*at byte 32251"),
        ("tuple of 100,000", "holds a tuple of 100000"),
        ("string with one quote", "must be quoted"),
        ("pop below a mark", "damaged or cut short .IndexError.*at byte 2"),
    ],
)
def test_bounds_are_met_where_they_are_crossed(name, message):
    with pytest.raises(DataError, match=message):
        parse_bin(HOSTILE[name], "x")


def test_the_fixtures_of_hostile_files_are_legal_without_the_fault():
    assert parse_bin(pair(), "x") == ([JPEG + b"1", JPEG + b"2"], [True])
    legal = array(b"K\1(K\4K\1t" + DTYPE_U1 + b"\x89C\4\xff\xd8\xff1")
    assert parse_bin(legal, "x") == ([JPEG + b"1", JPEG + b"2"], [True])
    assert parse_bin(buffer(), "x") == ([JPEG + b"1", JPEG + b"2"], [True])
    assert parse_bin(pair(flags=call("numpy.core.multiarray", "scalar", DTYPE_I8 + b"C\x08\1" + bytes(7))), "x")[1] == [
        True
    ]
    legal = pair(call("_codecs", "encode", TEXT + b"Vlatin1\n") + SECOND)
    assert parse_bin(legal, "x") == ([JPEG + b"1", JPEG + b"2"], [True])


def test_opcodes_that_make_no_data_are_refused_at_once():
    refused = """
    LONG LONG1 LONG4 FLOAT BINFLOAT BINUNICODE8 NEXT_BUFFER READONLY_BUFFER EMPTY_TUPLE EMPTY_DICT DICT
    SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET POP DUP POP_MARK EXT1 EXT2 EXT4 INST OBJ NEWOBJ NEWOBJ_EX
    PERSID BINPERSID
    """
    for opcode in pickletools.opcodes:
        with pytest.raises(DataError) as caught:
            parse_bin(opcode.code.encode("latin-1"), "x")
        said = "which no verification set has; nothing in it was executed" in str(caught.value)
        assert said == (opcode.name in refused.split()), opcode.name


def test_an_image_named_many_times_is_not_copied():
    """10 MB of text, encoded by call 20,000 times: computed literally that would be 200 GB."""
    text = JPEG.decode("latin-1") + "a" * (10 << 20 - 3)
    raw = text[: (10 << 20) - 3].encode()
    again = b"c_codecs\nencode\n(h\0h\1tR"
    data = b"X" + struct.pack("<I", len(raw)) + raw + b"q\0Vlatin1\nq\1\x86q\2" + b"](" + again * 20_000 + b"e."
    tracemalloc.start()
    with pytest.raises(DataError, match="encodes more text than it holds.*at byte 1310793"):
        parse_bin(data, "x")
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_opcodes_are_bounded():
    began = time.process_time()
    with pytest.raises(DataError, match=r"far more parts .*at byte 1187\d\d\d"):
        parse_bin(b"](" + b"\x88" * 3_000_000, "x")
    assert time.process_time() - began < 3


def test_images_are_bounded():
    big = JPEG + bytes((10 << 20) - 2)
    for protocol in (2, 4):
        with pytest.raises(DataError, match="image 0 has 10485761 bytes, at most 10485760"):
            parse_bin(pickle.dumps(([big, big], [True]), protocol), "x")


@pytest.mark.parametrize(
    "name", ["bytes 0", "bytes 2", "bytes 4", "columns 0", "columns 3", "columns 5", "python 2, protocol 0"]
)
def test_truncation_at_every_byte(name):
    data = LEGAL[name]
    for size in range(0, len(data), max(1, len(data) // 300)):
        with pytest.raises(DataError):
            parse_bin(data[:size], "x")


@pytest.mark.parametrize("name", LEGAL)
def test_mutations_give_a_set_or_a_data_error(name):
    parse_mutations(name, 150)


def parse_mutations(name, count):
    rng, outcomes = random.Random(name), set()
    for _ in range(count):
        data = bytearray(LEGAL[name])
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randint(1, 20)]
                case 2:
                    data[at:at] = rng.choice([rng.randbytes(3), b"(", b"e", b".", b"R", b"b", b"\x93", b"h\1", b"N"])
        try:
            images, flags = parse_bin(bytes(data), "x")
            assert all(type(image) is bytes for image in images) and all(type(flag) is bool for flag in flags)
            VerificationSet("x", images, np.array(flags, bool))
            outcomes.add("set")
        except DataError:
            outcomes.add("error")
    assert "error" in outcomes


def test_write_bin_is_what_insightface_reads(tmp_path):
    path = tmp_path / "tiny.bin"
    write_bin(path, IMAGES, np.array(ISSAME))
    images, flags = pickle.loads(path.read_bytes())
    assert images == IMAGES and flags == ISSAME and all(type(flag) is bool for flag in flags)
    assert read_bin(path).images == IMAGES and read_bin(path).issame.tolist() == ISSAME


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "tiny.bin"
    write_bin(path, IMAGES, ISSAME)
    before = path.read_bytes()
    with open(path, "rb") as earlier:
        write_bin(path, IMAGES[::-1], ISSAME)
        assert earlier.read() == before != path.read_bytes()  # replaced whole, not written over
    before = path.read_bytes()
    for images, flags in ((IMAGES, [True]), ([b"gif"] * 6, ISSAME), ([], [])):
        with pytest.raises(DataError):
            write_bin(path, images, flags)

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitface.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_bin(path, IMAGES, ISSAME)
    assert path.read_bytes() == before


def test_read_bin_names_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.bin")
    with open(tmp_path / "huge.bin", "wb") as file:
        file.truncate((2 << 30) + 1)
    for name in ("missing.bin", "fifo.bin", "huge.bin", "."):
        with pytest.raises(DataError) as caught:
            read_bin(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def image(tag):
    return JPEG + tag.encode()


def lfw(root, lines, people):
    for person, count in people.items():
        (root / person).mkdir()
        for i in range(1, count + 1):
            (root / person / f"{person}_{i:04d}.jpg").write_bytes(image(f"{person}{i}"))
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    return root / "pairs.txt", root


LFW_LINES = ["2\t2", "A\t1\t2", "B\t1\t3", "A\t1\tB\t1", "B\t2\tC\t1", "B\t1\t2", "A\t2\t1", "C\t1\tA\t2", "C\t1\tB\t3"]


def test_lfw_pairs(tmp_path):
    listed = lfw(tmp_path, LFW_LINES, {"A": 2, "B": 3, "C": 0})
    (tmp_path / "C" / "C_0001.png").write_bytes(b"\x89PNG\r\n\x1a\nC1")
    found = read_pair_list("lfw", *listed)
    named = [x.removeprefix(JPEG).removeprefix(b"\x89PNG\r\n\x1a\n").decode() for x in found.images]
    assert list(zip(named[::2], named[1::2], strict=True)) == [
        ("A1", "A2"),
        ("B1", "B3"),
        ("A1", "B1"),
        ("B2", "C1"),
        ("B1", "B2"),
        ("A2", "A1"),
        ("C1", "A2"),
        ("C1", "B3"),
    ]
    assert found.issame.tolist() == [True, True, False, False] * 2
    assert found.folds.tolist() == [0] * 4 + [1] * 4
    assert found.images[0] is found.images[4] and found.name == "lfw"


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (0, "2", "line 1 has one number, as View 1 of LFW"),
        (0, "two 2", "line 1 has 'two'"),
        (0, "0 0", "promises 0 folds"),
        (0, "10 300", "promises 10 folds of 300 same and 300 different pairs, not 8"),
        (1, "A\t1\tB\t2", "line 2 is not a same pair"),
        (3, "A\t1\t2", "line 4 is not a different pair"),
        (1, "A\t1\tx", "line 2 has 'x'"),
        (1, "A\t1\t-2", "line 2 has '-2'"),
        (1, "A\t1\t" + "9" * 5000, "line 2 has '999"),
        (1, "A\t1\t3", "line 2 names an image that cannot be read: .*A_0003.jpg: No such file"),
        (1, "../A\t1\t2", "line 2 names '../A/../A_0001.jpg', which is outside"),
        (1, "..\t1\t2", "line 2 names '../.._0001.jpg', which is outside"),
        (1, "A\0\t1\t2", "line 2 has NUL bytes"),
        (1, "/A\t1\t2", "line 2 names "),
        (1, "C:\\A\t1\t2", "line 2 names "),
    ],
)
def test_lfw_faults_name_the_line(tmp_path, number, line, message):
    lines = LFW_LINES.copy()
    lines[number] = line
    listed = lfw(tmp_path, lines, {"A": 2, "B": 3, "C": 1})
    with pytest.raises(DataError, match=message):
        read_pair_list("lfw", *listed)


def calfw(root, pairs):
    for name in {name for pair in pairs for name in pair[:2]}:
        (root / name).write_bytes(image(name))
    (root / "pairs.txt").write_text("".join(f"{a} {t}\n{b} {t}\n" for a, b, t in pairs))
    return root / "pairs.txt", root


def test_calfw_pairs_balance_the_folds(tmp_path):
    same = [(f"s{i}a.jpg", f"s{i}b 2.jpg", 1 + i // 3) for i in range(30)]
    different = [(f"d{i}.jpg", f"s{i}a.jpg", 0) for i in range(30)]
    found = read_pair_list("calfw", *calfw(tmp_path, same + different))
    assert found.issame.tolist() == [True] * 30 + [False] * 30
    assert found.folds[:30].tolist() == [i // 3 for i in range(30)]
    assert found.folds[30:].tolist() == [i % 10 for i in range(30)]
    for fold in range(10):
        assert found.issame[found.folds == fold].tolist() == [True] * 3 + [False] * 3
    assert found.images[:2] == [image("s0a.jpg"), image("s0b 2.jpg")]
    assert found.images[60:62] == [image("d0.jpg"), image("s0a.jpg")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("a.jpg 1\n", "1 lines, expected two per pair"),
        ("a.jpg 1\nb.jpg 0\n", "line 2 and the one before are a pair, but have the tokens 1 and 0"),
        ("a.jpg 1\nb.jpg\n", "line 2 has ''"),
        ("a.jpg 1\nb.jpg x\n", "line 2 has 'x'"),
        ("a.jpg 1\n\nb.jpg x\n", "line 3 has 'x'"),
        ("a.jpg 2\nb.jpg 2\n", r"tokens \[2\]"),
        ("a.jpg 0\nb.jpg 0\n", r"tokens \[\]"),
        ("a.jpg 1\nc.jpg 1\na.jpg 2\nb.jpg 2\n", "line 1 or the next names an image that cannot be read: .*c.jpg"),
        ("../a.jpg 1\nb.jpg 1\n", "line 1 names '../a.jpg', which is outside"),
        ("a.jpg 1\ngif.jpg 1\na.jpg 2\nb.jpg 2\n", "image 1 is neither JPEG nor PNG"),
    ],
)
def test_calfw_faults_name_the_line(tmp_path, text, message):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(image(name))
    (tmp_path / "gif.jpg").write_bytes(b"GIF89a")
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_pair_list("calfw", tmp_path / "pairs.txt", tmp_path)


def cfp(root):
    """Two folds would do for reading, but CFP has ten: each with one same pair and one different pair per protocol."""
    protocol = root / "Protocol"
    for letter, kind in (("F", "frontal"), ("P", "profile")):
        lines = []
        for i in range(1, 12):
            path = root / "Data" / kind / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(f"{letter}{i}"))
            lines.append(f"{i} ../Data/{kind}/{i}.jpg")
        protocol.mkdir(exist_ok=True)
        (protocol / f"Pair_list_{letter}.txt").write_text("\n".join(lines))
    for kind in ("FP", "FF"):
        for fold in range(1, 11):
            folder = protocol / "Split" / kind / f"{fold:02d}"
            folder.mkdir(parents=True)
            (folder / "same.txt").write_text(f"{fold},{fold}\n")
            (folder / "diff.txt").write_text(f"{fold},{fold + 1}\n")
    return protocol


@pytest.mark.parametrize(("kind", "right"), [("FP", "P"), ("FF", "F")])
def test_cfp_pairs_take_the_second_image_from_the_right_list(tmp_path, kind, right):
    found = read_pair_list(f"cfp_{kind.lower()}", cfp(tmp_path) / "Pair_list_F.txt", tmp_path)
    expected = [image(x) for i in range(1, 11) for x in (f"F{i}", f"{right}{i}", f"F{i}", f"{right}{i + 1}")]
    assert found.images == expected and found.name == f"cfp_{kind.lower()}"
    assert found.issame.tolist() == [True, False] * 10 and found.folds.tolist() == np.repeat(np.arange(10), 2).tolist()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Pair_list_P.txt", "1 ../../secret.jpg", "line 1 names '../../secret.jpg', which is outside"),
        ("Pair_list_P.txt", "1 /etc/passwd", "line 1 names '/etc/passwd', which is outside"),
        ("Pair_list_P.txt", "x ../Data/profile/1.jpg", "line 1 has 'x'"),
        ("Pair_list_P.txt", "1", "line 1 "),
        ("Pair_list_P.txt", "1 ../Data/profile/1.jpg", r"01/diff.txt: line 1 names the images 1 and 2"),
        ("Split/FP/03/diff.txt", "3", "diff.txt: line 1 has ''"),
        ("Split/FP/03/diff.txt", "3,x", "diff.txt: line 1 has 'x'"),
        ("Split/FP/03/diff.txt", "3,99", "diff.txt: line 1 names the images 3 and 99"),
        ("Split/FP/03/diff.txt", None, "diff.txt: No such file"),
        ("Pair_list_F.txt", None, "Pair_list_F.txt: No such file"),
        ("../Data/profile/5.jpg", None, r"04/diff.txt: line 1 names an image that cannot be read"),
    ],
)
def test_cfp_faults_name_the_line(tmp_path, file, text, message):
    protocol = cfp(tmp_path / "cfp")
    if text is None:
        (protocol / file).unlink()
    else:
        (protocol / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read_pair_list("cfp_fp", protocol / "Pair_list_F.txt", tmp_path / "cfp")


@pytest.mark.skipif(not (DATA / "lfw.bin").is_file(), reason="real data is absent")
def test_real_lfw():
    tracemalloc.start()
    found = read_bin(DATA / "lfw.bin")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (DATA / "lfw.bin").stat().st_size
    assert held < 1.1 * size and peak < 2 * size
    assert len(found.images) == 12_000 and len({id(image) for image in found.images}) == 7701
    assert found.issame.tolist() == ([True] * 300 + [False] * 300) * 10
    for i in (0, 6001, 11_999):
        assert decode_image(found.images[i]).shape == (112, 112, 3)
