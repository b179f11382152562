"""Crops of drawn people whose eyes and mouth are where the template has them."""

from functools import cache

import numpy as np
from PIL import Image

from vitface.data.images import encode_image

PEOPLE, IMAGES = 50, 8


def smooth(rng, cells, strength):
    noise = rng.normal(0, strength, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(noise).resize((112, 112), Image.Resampling.BICUBIC))


@cache
def drawn_faces(seed=0, people=PEOPLE, images=IMAGES):
    """(people x images, 112, 112, 3): skin, each person's own texture, eyes and mouth at the template's places."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:112, 0:112]
    face = np.full((112, 112), 170.0)
    for x, y, width, depth in ((38.3, 51.7, 6, 90), (73.5, 51.5, 6, 90), (56, 92, 10, 60)):
        face -= depth * np.exp(-(((columns - x) / width) ** 2) / 2 - ((rows - y) / 4) ** 2 / 2)
    crops = []
    for _ in range(people):
        own = face + smooth(rng, 9, 14)
        for _ in range(images):
            grey = own + smooth(rng, 9, 12) + rng.normal(0, 12)
            crops.append(np.clip(np.stack([grey + 20, grey, grey - 25], -1), 0, 255).astype(np.uint8))
    faces = np.stack(crops)
    faces.flags.writeable = False  # tests share them
    return faces


def jpeg(crop):
    return encode_image(crop, "JPEG", quality=95)
