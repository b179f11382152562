"""Hostile verification sets: nothing in them is executed, and refusing them takes neither memory nor time."""

import contextlib
import pickle
import pickletools
import struct
import time
import tracemalloc

import numpy as np
import pytest
from bin_files import IMAGES, ISSAME, JPEG

from vitface.data.formats.bin_format import parse_bin
from vitface.data.formats.pairs import read_bin
from vitface.errors import DataError


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
    with pytest.raises(DataError, match=r"far more parts .*at byte 1187\d\d\d"):
        parse_bin(b"](" + b"\x88" * 3_000_000, "x")
