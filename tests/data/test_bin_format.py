"""Verification sets: legal pickles of every protocol are what `pickle` makes of them; a damaged one is an error."""

import os
import pickle
import random
import struct
import tracemalloc

import numpy as np
import pytest
from bin_files import IMAGES, ISSAME, JPEG, LEGAL, arrays
from hypothesis import given
from hypothesis import strategies as st

from vitface.data.formats.bin_format import parse_bin
from vitface.data.formats.pairs import VerificationSet, read_bin, write_bin
from vitface.data.images import decode_image
from vitface.errors import DataError


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


def test_real_lfw(real_data):
    tracemalloc.start()
    found = read_bin(real_data / "lfw.bin")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (real_data / "lfw.bin").stat().st_size
    assert held < 1.1 * size and peak < 2 * size
    assert len(found.images) == 12_000 and len({id(image) for image in found.images}) == 7701
    assert found.issame.tolist() == ([True] * 300 + [False] * 300) * 10
    for i in (0, 6001, 11_999):
        assert decode_image(found.images[i]).shape == (112, 112, 3)
