"""A file, a Pillow image or an array that shows a face, aligned or not -> the crop that is a model's input."""

from pathlib import Path

import numpy as np
from PIL import Image

from vitface.data.faces.alignment import align_face
from vitface.data.faces.detect import FaceDetector, central_face, no_usable_face
from vitface.data.images import CROP_SIZE, read_image, to_array, to_crop
from vitface.errors import ImageError

Photo = str | Path | Image.Image | np.ndarray


class CropReader:
    """`reader(image)` is its crop, uint8 (112, 112, 3); a reader can be pickled.

    `align` False: images are aligned crops; a square of another size is resized. True, or a FaceDetector: an image of
    exactly 112 x 112 pixels is a crop; in any other the face (the large one near the middle) is found and aligned.

    ImageError names an image that is damaged, shows no face or only a tiny one, or should be a square crop and is not.
    Where a face has to be found: ConfigError without OpenCV, WeightsError without the detector's file.
    """

    def __init__(self, align: bool | FaceDetector = False):
        self.align = bool(align)
        self.detector = align if isinstance(align, FaceDetector) else None

    def __call__(self, image: Photo) -> np.ndarray:
        where = str(image) if isinstance(image, str | Path) else "image"
        if isinstance(image, Image.Image):
            pixels = to_array(image)
        else:
            pixels = image if isinstance(image, np.ndarray) else read_image(image)
        if not self.align or pixels.shape[:2] == (CROP_SIZE, CROP_SIZE):
            return to_crop(pixels, where)
        if self.detector is None:
            self.detector = FaceDetector()
        faces = self.detector.detect(pixels)
        if why := no_usable_face(faces, pixels):
            raise ImageError(f"{where}: {why}")
        return align_face(pixels, central_face(faces, *pixels.shape[:2]).landmarks)
