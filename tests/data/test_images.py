"""Exact pixels for every kind of image a folder may hold, and a named error for the rest."""

import os
import random
import struct
import tracemalloc
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile

from vitface.data.images import decode_image, read_image, to_crop
from vitface.errors import DataError, ImageError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def encode(image, kind="PNG", **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def smooth(height=112, width=112):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 2 % 256, y * 2 % 256, (x + y) % 256], -1).astype(np.uint8)


def png(width, height, depth, colour, rows, *extra):
    """A PNG by hand: `rows` are the raw bytes without filter bytes, `extra` chunks go before the pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*e) for e in extra) + pixels + chunk(b"IEND", b"")


def on_grey(rgb, alpha):
    exact = (rgb.astype(float) * alpha[..., None] + 128.0 * (255 - alpha[..., None])) / 255
    return np.floor(exact + 0.5).astype(np.uint8)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_rgb_is_exact(kind, options):
    decoded = decode_image(encode(PIXELS, kind, **options))
    assert decoded.dtype == np.uint8 and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, PIXELS)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}])
def test_jpeg_is_what_pillow_decodes(options):
    data = encode(smooth(), "JPEG", quality=90, **options)
    np.testing.assert_array_equal(decode_image(data), np.asarray(Image.open(BytesIO(data))))


def test_grey_one_bit_and_palette_become_rgb():
    grey = PIXELS[..., 0]
    np.testing.assert_array_equal(decode_image(encode(grey)), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(decode_image(encode(grey > 127)), np.repeat(grey[..., None] > 127, 3, -1) * 255)
    palette = RNG.integers(0, 256, (256, 3), np.uint8)
    image = Image.fromarray(grey)
    image.putpalette(palette.tobytes())
    np.testing.assert_array_equal(decode_image(encode(image)), palette[grey])
    np.testing.assert_array_equal(decode_image(encode(image, "BMP")), palette[grey])


def test_jpeg_of_one_channel_is_grey():
    data = encode(smooth()[..., 0], "JPEG")
    expected = np.asarray(Image.open(BytesIO(data)))
    np.testing.assert_array_equal(decode_image(data), np.repeat(expected[..., None], 3, -1))


def test_sixteen_bits_are_scaled_not_clipped():
    grey = RNG.integers(0, 65536, (9, 7), np.uint16)
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, -1)
    np.testing.assert_array_equal(decode_image(encode(grey)), expected)
    rgb = RNG.integers(0, 65536, (9, 7, 3), np.uint16)
    data = png(7, 9, 16, 2, [row.astype(">u2").tobytes() for row in rgb])
    np.testing.assert_array_equal(decode_image(data), (rgb >> 8).astype(np.uint8))


def test_alpha_is_composited_on_mid_grey():
    alpha = RNG.integers(0, 256, PIXELS.shape[:2], np.uint8)
    alpha[0], alpha[1] = 0, 255
    rgba = np.dstack([PIXELS, alpha])
    expected = on_grey(PIXELS, alpha)
    assert (expected[0] == 128).all() and (expected[1] == PIXELS[1]).all()
    np.testing.assert_array_equal(decode_image(encode(rgba)), expected)
    np.testing.assert_array_equal(decode_image(encode(rgba, "WEBP", lossless=True, exact=True)), expected)
    grey = PIXELS[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, -1)
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    np.testing.assert_array_equal(decode_image(encode(la)), on_grey(as_rgb, alpha))


def test_transparent_colours_become_mid_grey():
    grey = PIXELS[..., 0].copy()
    grey[0] = 5
    key = (grey == 5)[..., None]
    as_rgb = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(decode_image(encode(grey, transparency=5)), np.where(key, 128, as_rgb))
    palette = RNG.integers(0, 256, (256, 3), np.uint8)
    image = Image.fromarray(grey)
    image.putpalette(palette.tobytes())
    np.testing.assert_array_equal(decode_image(encode(image, transparency=5)), np.where(key, 128, palette[grey]))
    alphas = RNG.integers(0, 256, 256, np.uint8)
    expected = on_grey(palette[grey], alphas[grey])
    np.testing.assert_array_equal(decode_image(encode(image, transparency=alphas.tobytes())), expected)
    rgb = PIXELS.copy()
    rgb[3] = (1, 2, 3)
    expected = np.where((rgb == (1, 2, 3)).all(-1, keepdims=True), 128, rgb)
    np.testing.assert_array_equal(decode_image(encode(rgb, transparency=(1, 2, 3))), expected)
    deep = np.array([[10_000, 20_000]], np.uint16)
    data = png(2, 1, 16, 0, [deep.astype(">u2").tobytes()], (b"tRNS", struct.pack(">H", 20_000)))
    np.testing.assert_array_equal(decode_image(data), [[[39] * 3, [128] * 3]])


@pytest.mark.parametrize(
    ("cmyk", "rgb"),
    [
        ((0, 0, 0, 0), (255, 255, 255)),
        ((0, 255, 255, 0), (255, 0, 0)),
        ((255, 0, 255, 0), (0, 255, 0)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((255, 128, 0, 0), (0, 127, 255)),
        ((0, 0, 0, 100), (155, 155, 155)),
    ],
)
def test_cmyk_jpeg(cmyk, rgb):
    data = encode(Image.new("CMYK", (16, 16), cmyk), "JPEG", quality=100)
    assert b"Adobe" in data  # stored inverted, as Photoshop does
    assert np.abs(decode_image(data).astype(int) - rgb).max() <= 2


EXIF_ORACLE = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", EXIF_ORACLE)
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})])
def test_exif_orientation_is_applied(orientation, kind, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(encode(PIXELS, kind, **options))
    turned = decode_image(encode(PIXELS, kind, exif=exif.tobytes(), **options))
    np.testing.assert_array_equal(turned, EXIF_ORACLE[orientation](upright))


@pytest.mark.parametrize("value", [0, 9, 255])
def test_unknown_orientation_is_ignored(value):
    exif = Image.Exif()
    exif[0x0112] = value
    np.testing.assert_array_equal(decode_image(encode(PIXELS, exif=exif.tobytes())), PIXELS)


def test_damaged_exif_is_ignored_without_a_warning():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\x00" + b"\x12\x01\x02\x00\xff\xff\x00\x00\xff\xff\xff\x7f" * 3
    plain, damaged = encode(smooth(), "JPEG"), encode(smooth(), "JPEG", exif=exif)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Image.open(BytesIO(damaged)).getexif().get(0x0112)
        assert caught  # the planted block does make Pillow warn
        seen = len(caught)
        np.testing.assert_array_equal(decode_image(damaged), decode_image(plain))
        assert len(caught) == seen


def test_first_frame_of_an_animation_and_icc_ignored():
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
        assert Image.open(BytesIO(data)).n_frames == 2
        np.testing.assert_array_equal(decode_image(data), PIXELS)
    np.testing.assert_array_equal(decode_image(encode(PIXELS, icc_profile=b"\0" * 200)), PIXELS)


def test_extreme_shapes_decode():
    for shape in ((1, 1, 3), (1, 10_000, 3), (10_000, 1, 3)):
        pixels = RNG.integers(0, 256, shape, np.uint8)
        np.testing.assert_array_equal(decode_image(encode(pixels)), pixels)


def webp_vp8x(width, height):
    body = (
        b"VP8X" + struct.pack("<II", 10, 0x10) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def jpeg_of_size(width, height):
    data = bytearray(encode(PIXELS, "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "png 1 bit": png(12_000, 12_000, 1, 0, [bytes(1500)] * 12_000),
    "png one over": png(8193, 8192, 1, 0, [bytes(1025)]),
    "png 2^31": png(2**31 - 1, 2**31 - 1, 8, 2, [b""]),
    "jpeg": jpeg_of_size(65_500, 65_500),
    "webp canvas": webp_vp8x(16_000, 11_000),
    "webp lossless": b"RIFF\x40\0\0\0WEBPVP8L\x30\0\0\0\x2f" + b"\xff" * 60,
    "webp lossy": b"RIFF\x40\0\0\0WEBPVP8 \x30\0\0\0\0\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(50),
    "bmp": b"BM" + struct.pack("<IIIIiiHHIIIIII", 100, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(50),
}


@pytest.mark.parametrize("name", BOMBS)
def test_too_many_pixels_are_refused_before_decoding(name, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    tracemalloc.start()
    with pytest.raises(ImageError, match="pixels, at most"):
        decode_image(BOMBS[name])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_the_limit_itself_is_accepted():
    assert decode_image(png(4096, 4096, 1, 0, [bytes(512)] * 4096)).shape == (4096, 4096, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_anywhere(kind):
    data = encode(smooth(), kind)
    for size in sorted({len(data) - 1, *range(0, len(data) - 1, max(1, len(data) // 60))}):
        if kind == "PNG" and size > len(data) - 24:  # only checksums and the end chunk are missing
            np.testing.assert_array_equal(decode_image(data[:size]), smooth())
            continue
        with pytest.raises(ImageError):
            decode_image(data[:size])


@pytest.mark.parametrize(
    "data", [b"", b"<!DOCTYPE html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"BM"]
)
def test_not_an_image(data):
    with pytest.raises(ImageError, match=r"^here: "):
        decode_image(data, "here")


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PCX", "SGI"])
def test_formats_not_on_the_list_are_refused(kind):
    with pytest.raises(ImageError, match="not a JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, JPEG 2000, AVIF or HEIC image"):
        decode_image(encode(smooth(64, 64), kind))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF"])
def test_mutations_give_an_image_or_an_image_error(kind):
    rng = random.Random(kind)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif.tobytes()} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    base = encode(smooth(24, 24), kind, **options)
    outcomes = set()
    for _ in range(700):
        data = bytearray(base)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            image = decode_image(bytes(data))
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            outcomes.add("image")
        except ImageError:
            outcomes.add("error")
    assert outcomes == {"image", "error"}


def test_read_image_trusts_the_content_not_the_extension(tmp_path):
    (tmp_path / "face.jpg").write_bytes(encode(PIXELS))
    np.testing.assert_array_equal(read_image(tmp_path / "face.jpg"), PIXELS)
    np.testing.assert_array_equal(read_image(str(tmp_path / "face.jpg")), PIXELS)


def test_read_image_names_what_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"no")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate((256 << 20) + 1)
    for name in ("missing.jpg", "fifo.jpg", "loop.jpg", "bad.jpg", "huge.jpg", "."):
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    assert issubclass(ImageError, DataError)


def test_to_crop():
    crop = smooth()
    assert to_crop(crop) is crop
    large = smooth(160, 160)
    expected = np.asarray(Image.fromarray(large).resize((112, 112), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(to_crop(large), expected)
    assert to_crop(smooth(16, 16)).shape == (112, 112, 3)
    assert (to_crop(np.full((40, 40, 3), 77, np.uint8)) == 77).all()
    with pytest.raises(ImageError, match=r"(?s)here: 112 x 96 pixels.*align"):
        to_crop(smooth(96, 112), "here")
    for shape in ((15, 15), (1, 1), (1, 10_000)):
        with pytest.raises(ImageError, match="too small"):
            to_crop(np.zeros((*shape, 3), np.uint8))


def progressive(side=32):
    data = BytesIO()
    Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)).save(
        data, "JPEG", progressive=True
    )
    return data.getvalue()


def test_jpegs_with_more_scans_or_segments_than_a_photo_are_not_decoded():
    """Each costs a decoder a pass over the whole image, or joins segments again and again."""
    whole = progressive()
    scan = whole.index(b"\xff\xda")
    end = next(
        i for i in range(scan + 20, len(whole)) if whole[i] == 0xFF and whole[i + 1] not in (0, *range(0xD0, 0xD8))
    )
    assert decode_image(whole[:end] + whole[scan:end] * 50 + whole[end:]).shape == (32, 32, 3)
    for planted, what in (
        (whole[:end] + whole[scan:end] * 100 + whole[end:], "more than 100 scans"),
        (whole[:2] + b"\xff\xe5\x00\x02" * 100_000 + whole[2:], "more than 300 segments"),
        (whole[:2] + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * 101 + whole[2:], "more than 100 segments"),
        (whole[:2] + b"\xff" * 50 + b"\xe5\x00\x02" + b"\xff\xe5\x00\x02" * 300 + whole[2:], "more than 300 segments"),
    ):
        with pytest.raises(ImageError, match=what):
            decode_image(planted)


def test_a_film_behind_a_photo_is_not_counted():
    """As in a phone's "motion photo"; any two of its bytes may look like the start of a scan."""
    np.testing.assert_array_equal(decode_image(progressive() + b"\xff\xda" * 1000), decode_image(progressive()))
