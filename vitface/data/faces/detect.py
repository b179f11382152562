"""Faces and their five landmarks in a photo, by OpenCV's YuNet (Wu et al. 2023)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitface.errors import WeightsError
from vitface.extras import require
from vitface.files import cache_home

MAX_SIDE = 1280  # larger photos are reduced to it; YuNet was trained on faces up to 300 pixels
MIN_SCORE, NMS_IOU, MAX_FACES = 0.6, 0.3, 100
MIN_FACE = 32  # pixels; a smaller face has much less detail than a crop can show


@dataclass(frozen=True)
class Face:
    """`box` x, y, width, height and `landmarks` (5, 2) in pixels, as `vitface.data.faces.alignment` orders them."""

    box: np.ndarray
    landmarks: np.ndarray
    score: float


class FaceDetector:
    """ConfigError without OpenCV, WeightsError without the model file; both name the command that gets it.

    Can be pickled: each process loads the model when it first detects.
    """

    def __init__(self, model: Path | None = None):
        otherwise = "\n(vitface align also takes landmarks from a file: --landmarks CSV)"
        require("finding faces in photos", "cv2", otherwise=otherwise)
        self.model = model or cache_home() / "face_detection_yunet.onnx"
        if not self.model.is_file():
            raise WeightsError(f"no face detector at {self.model}; fetch it with\n  vitface fetch yunet")
        self._net: Any = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_net": None}

    def detect(self, image: np.ndarray) -> list[Face]:
        """The faces in a photo, uint8 (H, W, 3) RGB, the highest score first."""
        import cv2

        if self._net is None:
            cv2.setNumThreads(1)  # photos are spread over processes
            cv2.utils.logging.setLogLevel(2)  # errors only; OpenCV 5 prints a warning about its own settings
            self._net = cv2.FaceDetectorYN.create(str(self.model), "", (320, 320), MIN_SCORE, NMS_IOU, MAX_FACES)
        height, width = image.shape[:2]
        scale = min(1.0, MAX_SIDE / max(height, width))
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        bgr = np.ascontiguousarray(image[..., ::-1])
        self._net.setInputSize(size)
        _, found = self._net.detect(bgr if scale == 1 else cv2.resize(bgr, size, interpolation=cv2.INTER_AREA))
        rows = [] if found is None else found.astype(np.float64)
        return [Face(row[:4] / scale, row[4:14].reshape(5, 2) / scale, float(row[14])) for row in rows]


def central_face(faces: list[Face], height: int, width: int) -> Face:
    """The face that is large and near the middle: area minus twice its squared distance from there (InsightFace)."""

    def weight(face: Face) -> float:
        offset = face.box[:2] + face.box[2:] / 2 - np.array([width, height]) / 2
        return float(face.box[2] * face.box[3] - 2 * (offset**2).sum())

    return max(faces, key=weight)
