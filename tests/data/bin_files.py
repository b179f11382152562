"""One small verification set in every form that a .bin has had: each pickle protocol, numpy 1 and 2, Python 2."""

import pickle
import struct

import numpy as np

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
