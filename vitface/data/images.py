"""Bytes or a path -> uint8 (H, W, 3) RGB, safely decoded.

JPEG, PNG, WebP and BMP only, at most 4096 x 4096 pixels, both judged from the header before anything is decoded. A
damaged or truncated file is an ImageError.

EXIF orientation is applied; grey, palette and CMYK become RGB; 16-bit values lose their low byte; alpha is composited
on mid-grey (128); an animation gives its first frame; an ICC profile is ignored.
"""

import os
import stat
import threading
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vitface.errors import DataError, ImageError

CROP_SIZE = 112
MIN_SIDE = 16
MAX_PIXELS = 4096 * 4096
MAX_FILE_BYTES = 64 << 20

_MAGIC = ((b"\xff\xd8\xff", JpegImageFile), (b"\x89PNG\r\n\x1a\n", PngImageFile), (b"BM", BmpImageFile))
# Pillow warns only about odd EXIF and APNG chunks. Without these names in the data, the lock and the change of the
# process-wide warning filters are not needed.
_CAN_WARN = (b"Exif", b"eXIf", b"EXIF", b"acTL", b"Raw profile type")
_warnings_lock = threading.Lock()


def decode_image(data: bytes, where: str = "image") -> np.ndarray:
    """Encoded bytes -> uint8 (H, W, 3) RGB; ImageError, which begins with `where`, for anything else."""
    try:
        if not any(name in data for name in _CAN_WARN):
            return _decode(data)
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data)
    except ImageError as error:
        raise ImageError(f"{where}: {error}") from None
    except Exception as error:  # for damaged bytes, decoders raise at least eight unrelated types
        raise ImageError(f"{where}: damaged image ({type(error).__name__}: {str(error)[:120]})") from None


def read_image(path: str | Path) -> np.ndarray:
    """An image file -> uint8 (H, W, 3) RGB; ImageError if it is missing, not a regular file, too large or damaged."""
    return decode_image(read_file(path), str(path))


def read_file(path: str | Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; ImageError with the reason if it is not one."""
    try:
        status = os.stat(path)  # before open(), which would wait for ever on a FIFO
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{path}: not a regular file")
        if status.st_size > limit:
            raise ImageError(f"{path}: {status.st_size} bytes, an image may have {limit}")
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from None


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file; DataError, which begins with its path, if it cannot be read."""
    try:
        return read_file(path).decode("utf-8-sig")
    except ImageError as error:
        raise DataError(str(error)) from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None


def to_crop(image: np.ndarray, where: str = "image") -> np.ndarray:
    """An aligned face, uint8 (S, S, 3) -> (112, 112, 3), bicubic; one of 112 px is returned untouched.

    ImageError for a side under 16 px, and for an image that is not square: it has to be aligned first.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(f"{where}: {image.dtype} {image.shape} is not an RGB image, uint8 (H, W, 3)")
    height, width = image.shape[:2]
    if height == width == CROP_SIZE:
        return image
    if min(height, width) < MIN_SIDE:
        raise ImageError(f"{where}: {width} x {height} pixels is too small for a face, the least is {MIN_SIDE}")
    if height != width:
        raise ImageError(f"{where}: {width} x {height} pixels is not a square crop; align the face first")
    return np.array(Image.fromarray(image).resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC))


def _decode(data: bytes) -> np.ndarray:
    image = _open(data)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels, at most {MAX_PIXELS} are accepted")
    image.load()
    return to_array(image)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) RGB of a Pillow image: turned by its EXIF, 16 bits scaled, alpha on grey."""
    return np.array(_to_rgb(_upright(image)))


def _open(data: bytes) -> Image.Image:
    # The plugin is chosen here and not by Image.open, which warns about the size before it returns and would open
    # some JPEG files with the multi-picture reader.
    for magic, plugin in _MAGIC:
        if data.startswith(magic):
            return plugin(BytesIO(data))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        _check_webp_canvas(data)
        return WebPImageFile(BytesIO(data))
    raise ImageError(f"not a JPEG, PNG, WebP or BMP image (it begins with {data[:8]!r})" if data else "empty file")


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
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} pixels, at most {MAX_PIXELS} are accepted")


def _upright(image: Image.Image) -> Image.Image:
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF is optional: the pixels are good even if it is damaged
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion clips at 255
        grey = np.asarray(image)
        shown = (grey.astype(np.uint32) >> 8).astype(np.uint8)
        shown[grey == image.info.get("transparency", -1)] = 128
        return Image.fromarray(shown).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGB", image.size, (128, 128, 128))
        ground.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
        return ground
    return image.convert("RGB")
