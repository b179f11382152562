"""A file, its bytes, a Pillow image or an array that shows a face, aligned or not -> the crop that a model takes."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitface.data.faces.alignment import align_face
from vitface.data.faces.detect import FaceDetector, central_face, no_usable_face, remarks
from vitface.data.images import CROP_SIZE, check_rgb, decode_image, read_image, to_array, to_crop
from vitface.errors import ConfigError, ImageError, WeightsError, expect, in_one_line

Photo = str | os.PathLike | bytes | Image.Image | np.ndarray | Tensor


class CropReader:
    """`reader(image)` is its crop, uint8 (112, 112, 3); `reader.read(image)` is (crop, number of faces that were found,
    0 where the image is a crop already, `remarks` on them). A reader can be pickled.

    `align` False: images are aligned crops; a square of another size is resized. True, or a FaceDetector: an image of
    exactly 112 x 112 pixels is a crop; in any other the face (the large one near the middle) is found and aligned.
    None: True, but for arrays False, as a program that has an array knows what is in it.

    ImageError names an image (by `where`, default: its path) that is damaged, shows no face or only a tiny one, or
    should be a square crop and is not; TypeError for anything but an image. Where a face has to be found: ConfigError
    without OpenCV, WeightsError without the detector's file.
    """

    def __init__(self, align: bool | FaceDetector | None = False):
        known = align is None or isinstance(align, bool | np.bool_ | FaceDetector)
        expect(known, "align", align, "None, True, False or a FaceDetector")
        self.arrays, self.others = bool(align), align is None or bool(align)
        self.detector = align if isinstance(align, FaceDetector) else None

    def __call__(self, image: Photo, where: str | None = None) -> np.ndarray:
        return self.read(image, where)[0]

    def read(self, image: Photo, where: str | None = None) -> tuple[np.ndarray, int, list[str]]:
        where = in_one_line(where or (str(image) if isinstance(image, str | os.PathLike) else "image"))
        pixels = _pixels(image, where)
        align = self.arrays if isinstance(image, np.ndarray | Tensor) else self.others
        if not align or pixels.shape[:2] == (CROP_SIZE, CROP_SIZE):
            return to_crop(pixels, where), 0, []
        check_rgb(pixels, where)
        if self.detector is None:
            self.detector = _detector(pixels, where)
        faces = self.detector.find(pixels)
        if why := no_usable_face(faces, pixels):
            raise ImageError(f"{where}: {why}")
        landmarks = central_face(faces, *pixels.shape[:2]).landmarks
        return align_face(pixels, landmarks), len(faces), remarks(pixels, landmarks, faces)


def _pixels(image: Photo, where: str) -> np.ndarray:
    """uint8 (H, W, 3) of a photo; arrays are as they are."""
    if isinstance(image, np.ndarray):
        return image
    if isinstance(image, Tensor):
        return (image.float() if image.dtype == torch.bfloat16 else image).detach().cpu().numpy()
    if isinstance(image, Image.Image):
        try:
            return to_array(image)
        except Exception as error:  # Pillow's own, of many kinds: it was closed, its file is cut, ...
            raise ImageError(f"{where}: the PIL image cannot be read ({str(error)[:120]})") from None
    if isinstance(image, bytes | bytearray):
        return decode_image(bytes(image), where)
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    kind = type(image).__name__
    raise TypeError(f"an image is a path, bytes, a PIL image or an array, uint8 (H, W, 3) RGB, not {kind}")


def _detector(pixels: np.ndarray, where: str) -> FaceDetector:
    """The detector; where there is none, the error says which image needs it."""
    try:
        return FaceDetector()
    except (ConfigError, WeightsError) as error:
        size = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise type(error)(
            f"{where} has {size} pixels and is no 112 x 112 crop: its face has to be found. {error}\n"
            "If it is an aligned crop of another size: --no-align, in Python align=False"
        ) from None
