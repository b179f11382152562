"""Bytes or a path -> uint8 (H, W, 3) RGB, safely decoded.

JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, JPEG 2000, AVIF and, with pillow-heif, HEIC; a JPEG of at most 200 million pixels,
JPEG 2000 of 4096 x 4096, others of 8192 x 8192: both are judged from the header before anything is decoded. What has
more than 4096 x 4096 pixels is reduced by a whole number; a JPEG is decoded at that size. A damaged or truncated file
is an ImageError.

EXIF orientation is applied; grey, palette and CMYK become RGB; 16-bit values lose their low byte; alpha is composited
on mid-grey (128); an animation or a TIFF of several pages gives its first; an ICC profile is ignored.
"""

import importlib.util
import math
import os
import threading
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, features
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vitface.data.jpeg import check_jpeg
from vitface.errors import DataError, ImageError, in_one_line
from vitface.files import BEGINNING, identify, open_regular

CROP_SIZE = 112
MIN_SIDE = 16
MAX_PIXELS = 4096 * 4096  # of an image in memory
LARGEST, LARGEST_JPEG = 8192 * 8192, 200_000_000  # of an image in a file
MAX_FILE_BYTES = 256 << 20
DARKEST = 1 << 14  # of 16 bits: a photo's lightest pixel is above a quarter of white, unless it has 12 or 14 bits
NEEDS_HEIF = "HEIC needs a package: pip install pillow-heif"
NEEDS_AVIF = "AVIF needs Pillow 11.3 or later: pip install -U pillow"

_COMMON = ((b"\xff\xd8\xff", JpegImageFile), (b"\x89PNG\r\n\x1a\n", PngImageFile), (b"BM", BmpImageFile))
_MAGIC = (
    *_COMMON,
    *((magic, TiffImageFile) for magic in (b"II*\0", b"MM\0*")),
    *((magic, GifImageFile) for magic in (b"GIF87a", b"GIF89a")),
    *((b"P%d" % kind + space, PpmImageFile) for kind in range(1, 7) for space in (b"\n", b" ", b"\r", b"\t")),
    *((magic, Jpeg2KImageFile) for magic in (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
# Of these formats, Pillow warns only about odd EXIF and APNG chunks. Without these names in the data, the lock and the
# change of the process-wide warning filters are not needed.
_QUIET = (*(magic for magic, _ in _COMMON), b"RIFF")
_CAN_WARN = (b"Exif", b"eXIf", b"EXIF", b"acTL", b"Raw profile type")
_warnings_lock = threading.Lock()


def encode_image(image: np.ndarray | Image.Image, kind: str, **options: int) -> bytes:
    """uint8 (H, W, 3) RGB, or a PIL image -> an image file of the `kind` "PNG" or "JPEG"; `options` are Pillow's."""
    buffer = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def decode_image(data: bytes, where: str = "image") -> np.ndarray:
    """Encoded bytes -> uint8 (H, W, 3) RGB; ImageError, which begins with `where`, for anything else."""
    return _decode_safely(data, where)[0]


def read_image(path: str | Path) -> np.ndarray:
    """An image file -> uint8 (H, W, 3) RGB; ImageError if it is missing, not a regular file, too large or damaged."""
    return read_photo(path)[0]


def read_photo(path: str | Path) -> tuple[np.ndarray, int]:
    """`read_image`, and by how much it was reduced: the file has that many pixels for each one, in both directions."""
    return _decode_safely(read_file(path), in_one_line(str(path)))


def _decode_safely(data: bytes, where: str) -> tuple[np.ndarray, int]:
    try:
        if data.startswith(_QUIET) and not any(name in data for name in _CAN_WARN):
            return _decode(data)
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data)
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from None
    except Exception as error:  # for damaged bytes, decoders raise at least eight unrelated types
        raise ImageError(f"{where}: damaged image ({type(error).__name__}: {str(error)[:120]})") from None


def read_file(path: str | Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; ImageError with the reason if it is not one."""
    try:
        with open_regular(Path(path)) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise ImageError(f"{in_one_line(str(path))}: {size} bytes, an image may have {limit}")
            return file.read(limit)
    except OSError as error:
        raise ImageError(f"{in_one_line(str(path))}: {error.strerror or error}") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, or of UTF-16 with its mark (Excel's "Unicode text"); DataError, which begins with its
    path, if it cannot be read."""
    try:
        data = read_file(path)
        return data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except ImageError as error:
        raise DataError(str(error)) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text; save it as UTF-8, in Excel as `CSV UTF-8`") from None


def check_rgb(image: np.ndarray, where: str = "image") -> None:
    """ImageError, with what would help, unless an array is uint8 (H, W, 3) with sides that can show a face."""
    shape, cure = image.shape, ""
    if image.dtype != np.uint8 or image.ndim != 3 or shape[2] != 3:
        if image.dtype.kind == "f":
            cure = "; if it goes from 0 to 1: (255 * image).round().astype(numpy.uint8)"
        elif image.dtype != np.uint8:
            cure = "; its values must go from 0 to 255: image.astype(numpy.uint8)"
        elif image.ndim == 2 or shape[2:] == (1,):
            cure = "; it is grey: numpy.stack([image.squeeze()] * 3, axis=2)"
        elif image.ndim == 3 and shape[0] == 3:
            cure = "; its channels are first: image.transpose(1, 2, 0)"
        elif image.ndim == 3 and shape[2] == 4:
            cure = "; without its alpha: image[..., :3]"
        raise ImageError(f"{where}: {image.dtype} {shape} is not an RGB image, uint8 (H, W, 3){cure}")
    if min(shape[:2]) < MIN_SIDE:
        raise ImageError(f"{where}: {shape[1]} x {shape[0]} pixels is too small for a face, the least is {MIN_SIDE}")


def to_crop(image: np.ndarray, where: str = "image") -> np.ndarray:
    """An aligned face, uint8 (S, S, 3) -> (112, 112, 3), bicubic; one of 112 px is returned untouched.

    ImageError for a side under 16 px, and for an image that is not square: it has to be aligned first.
    """
    check_rgb(image, where)
    height, width = image.shape[:2]
    if height == width == CROP_SIZE:
        return image
    if height != width:
        raise ImageError(f"{where}: {width} x {height} pixels is not a square crop; align the face first")
    return np.array(Image.fromarray(image).resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC))


def _decode(data: bytes) -> tuple[np.ndarray, int]:
    """The pixels, and by how much they were reduced."""
    image = _open(data)
    width, height = image.size
    _check_size(image)
    reduction = math.isqrt((width * height - 1) // MAX_PIXELS) + 1
    if reduction > 1 and isinstance(image, JpegImageFile):
        reduction = 1 << (reduction - 1).bit_length()  # 2, 4 or 8
        image.draft(None, (max(width // reduction, 1), max(height // reduction, 1)))
        if image.size != (-(-width // reduction), -(-height // reduction)):
            raise ImageError(f"{width} x {height} pixels cannot be reduced; save it smaller")
        return to_array(image), reduction
    image.load()
    if reduction == 1:
        return to_array(image), 1
    reducible = image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") else _to_rgb(image)
    return to_array(reducible.reduce(reduction)), reduction


def _check_size(image: ImageFile) -> None:
    """ImageError if an image that was opened, but not decoded, is too large."""
    limit = LARGEST_JPEG if isinstance(image, JpegImageFile) else LARGEST
    limit //= 2 if "progressive" in image.info else 1  # which is held as a whole before it is reduced
    limit = MAX_PIXELS if isinstance(image, Jpeg2KImageFile) else limit  # its decoder takes 12 bytes a pixel
    width, height = image.size
    if isinstance(image, TiffImageFile):  # whose tiles are decoded whole
        tile = [int(image.tag_v2.get(tag, 0)) for tag in (322, 323)]
        width, height = max(width, tile[0]), max(height, tile[1])
    if width * height > limit:
        raise ImageError(_too_many(width, height, limit))


def _too_many(width: int, height: int, limit: int) -> str:
    return f"{width} x {height} pixels, at most {limit:,} are accepted (JPEG: {LARGEST_JPEG:,}); save it smaller"


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) RGB of a Pillow image: turned by its EXIF, 16 bits scaled, alpha on grey."""
    return np.array(_to_rgb(_upright(image)))


def _open(data: bytes) -> ImageFile:
    # The plugin is chosen here and not by Image.open, which warns about the size before it returns and would open
    # some JPEG files with the multi-picture reader.
    for magic, plugin in _MAGIC:
        if data.startswith(magic):
            if plugin is JpegImageFile:
                check_jpeg(data)
            return plugin(BytesIO(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_webp_canvas(data)
        return WebPImageFile(BytesIO(data))
    if data[4:8] == b"ftyp":
        return _open_ftyp(data)
    formats = "JPEG, PNG, WebP, BMP, TIFF, GIF, PPM, JPEG 2000, AVIF or HEIC"
    if other := identify(data[:BEGINNING]):
        raise ImageError(f"no image but {': '.join(filter(None, other))}")
    raise ImageError(f"not a {formats} image (it begins with {data[:8]!r})" if data else "empty file")


def _open_ftyp(data: bytes) -> ImageFile:
    """AVIF and HEIC, told apart by the brands of their first box."""
    box = data[8 : min(int.from_bytes(data[:4], "big"), 256)]
    brands = {box[at : at + 4] for at in range(0, len(box), 4) if at != 4}
    if brands & {b"avif", b"avis"}:
        if not features.check("avif"):
            raise ImageError(NEEDS_AVIF)
        from PIL.AvifImagePlugin import AvifImageFile

        return AvifImageFile(BytesIO(data))
    if brands & _HEIF_BRANDS:
        if importlib.util.find_spec("pillow_heif") is None:
            raise ImageError(NEEDS_HEIF)
        from pillow_heif import HeifImageFile

        return HeifImageFile(BytesIO(data))
    raise ImageError("a video, or a format that is not read; save a photo as JPEG or PNG")


def _check_webp_canvas(data: bytes) -> None:
    """The WebP decoder allocates its canvas when it is opened, so the header has to be read before that."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    if width * height > LARGEST:
        raise ImageError(_too_many(width, height, LARGEST))


def _upright(image: Image.Image) -> Image.Image:
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF is optional: the pixels are good even if it is damaged
        return image


def _shift(least: int, most: int) -> int:
    """By how many bits to shift the grey values of an image that has room for 16: 8, or 0 if 8 bits hold them.

    ImageError where they are of another range, as 12 bits of a camera: they would be shown as nearly black.
    """
    if least >= 0 and most <= 255:
        return 0
    if least < 0 or not DARKEST <= most <= 0xFFFF:
        unknown = f"its grey values are {least} to {most:,}, neither of 8 bits nor of 16"
        raise ImageError(f"{unknown}; save it with 8 bits, as PNG or JPEG")
    return 8


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError(
            "its pixels are floating-point numbers of an unknown range; save it with 8 bits, as PNG or JPEG"
        )
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255
        grey = np.asarray(image)
        shown = (grey >> _shift(int(grey.min()), int(grey.max()))).astype(np.uint8)
        shown[grey == image.info.get("transparency", -1)] = 128
        return Image.fromarray(shown).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGB", image.size, (128, 128, 128))
        ground.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return ground
    return image.convert("RGB")
