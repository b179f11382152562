"""The angle by which a face is turned, from its five landmarks. Letters: n faces."""

import numpy as np

from vitface.data.faces.alignment import TEMPLATE
from vitface.data.faces.detect import FaceDetector, central_face
from vitface.data.images import CROP_SIZE

# the template with depth, in its pixels of about 1.8 mm: the nose's tip lies 27 mm before the eyes, as in the generic
# head that is usual for estimating a pose from a few points
HEAD = np.column_stack([TEMPLATE, [0.0, 0.0, 15.0, 1.0, 1.0]])
MARGIN = CROP_SIZE // 2  # pixels around a crop; without them the detector misses a face that fills it


def yaw_degrees(landmarks: np.ndarray) -> np.ndarray:
    """Landmarks (n, 5, 2), ordered as in `faces.alignment` -> (n,), positive for noses that point to the image's right.

    Fits a scaled orthographic view of `HEAD` by least squares; accurate to a few degrees.
    """
    head = HEAD - HEAD.mean(axis=0)
    across = np.einsum("kp,np->nk", np.linalg.pinv(head), landmarks[..., 0] - landmarks[..., 0].mean(axis=1)[:, None])
    return np.degrees(np.arctan2(across[:, 2], across[:, 0]))


def crop_landmarks(crop: np.ndarray, detector: FaceDetector) -> np.ndarray | None:
    """The five landmarks in an aligned crop, (5, 2); None where no face is found."""
    side = CROP_SIZE + 2 * MARGIN
    faces = detector.detect(np.pad(crop, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))))
    return central_face(faces, side, side).landmarks - MARGIN if faces else None
