"""Five landmarks -> the 112 x 112 crop that InsightFace's training sets and benchmarks are made of.

Landmarks are (x, y) in pixels, the centre of the upper left pixel at (0, 0): left eye, right eye, nose, left and right
corner of the mouth, where left is the image's left.
"""

import numpy as np
from PIL import Image

from vitface.data.images import CROP_SIZE
from vitface.errors import ImageError

# insightface/utils/face_align.py: arcface_dst
_X, _Y = (38.2946, 73.5318, 56.0252, 41.5493, 70.7299), (51.6963, 51.5014, 71.7366, 92.3655, 92.2041)
TEMPLATE = np.column_stack([_X, _Y])
FARTHEST = 20.0  # px of the crop, root mean square: a full profile is off by 18, a mirrored frontal face by 23


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The (2, 3) matrix of rotation, scale and shift that takes points (n, 2) nearest to `target` (Umeyama 1991)."""
    centre, aim = source.mean(0), target.mean(0)
    points, goals = source - centre, target - aim
    u, singular, vt = np.linalg.svd(goals.T @ points / len(source))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    variance = (points**2).sum() / len(source)
    if variance < 1e-6:
        raise ImageError("the five landmarks are one point")
    linear = (u * signs) @ vt * ((singular * signs).sum() / variance)
    return np.column_stack([linear, aim - linear @ centre])


def align_face(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) and landmarks (5, 2) -> the crop, uint8 (112, 112, 3); ImageError for impossible landmarks."""
    if landmarks.shape != (5, 2) or not np.isfinite(landmarks).all():
        raise ImageError(f"landmarks must be five pairs of finite numbers, not {landmarks.tolist()}")
    height, width = image.shape[:2]
    (x, y), spread = landmarks.mean(0), landmarks.std(0).max()
    if not (0 <= x <= width and 0 <= y <= height) or spread < 1:
        where = f"around ({x:.0f}, {y:.0f})" if spread >= 1 else "less than a pixel apart"
        raise ImageError(f"the landmarks are {where}, in a photo of {width} x {height}: give pixels of this very photo")
    matrix = similarity(landmarks.astype(np.float64), TEMPLATE)
    off = np.sqrt(((landmarks @ matrix[:, :2].T + matrix[:, 2] - TEMPLATE) ** 2).sum(1).mean())
    if off > FARTHEST:
        raise ImageError(
            f"the landmarks are {off:.0f} px off a face's, as when left and right, or x and y, are exchanged: left is "
            f"the image's left, y counts from the top"
        )
    return warp_face(image, matrix)


def warp_face(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) and a matrix of `similarity` -> the crop, uint8 (112, 112, 3), black beyond the image."""
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    inverse[:, 2] += 0.5 - inverse[:, :2].sum(1) / 2  # Pillow's pixel centres are at .5
    size = (CROP_SIZE, CROP_SIZE)
    data = tuple(inverse.ravel().tolist())
    return np.array(Image.fromarray(image).transform(size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR))


def outside(image: np.ndarray, landmarks: np.ndarray) -> float:
    """The part of the crop, from 0 to 1, that is outside the photo (H, W, 3) and so black, for any landmarks (5, 2)."""
    if not np.isfinite(landmarks).all():
        return 1.0
    matrix = similarity(landmarks.astype(np.float64), TEMPLATE)
    inverse = np.linalg.pinv(np.vstack([matrix, [0, 0, 1]]))[:2]  # of a matrix that has none, too
    pixels = np.indices((CROP_SIZE, CROP_SIZE)).reshape(2, -1)[::-1]
    places = inverse[:, :2] @ pixels + inverse[:, 2:]
    return 1 - float(((places > -1) & (places < np.array(image.shape[1::-1])[:, None])).all(0).mean())
