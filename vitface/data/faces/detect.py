"""Faces and their five landmarks in a photo, by OpenCV's YuNet (Wu et al. 2023)."""

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitface.data.faces.alignment import outside
from vitface.errors import WeightsError
from vitface.extras import YUNET_SHA256, require
from vitface.files import cache_home, sha256_file

MAX_SIDE, MIN_SIDE = 1280, 256  # the sides at which photos are searched; YuNet was trained on faces up to 300 pixels
MIN_SCORE, NMS_IOU, MAX_FACES = 0.6, 0.3, 100
MIN_FACE = 32  # pixels; a smaller face has much less detail than a crop can show
# upright faces have a score of at least UPRIGHT, unless they are blurred, tiny or half hidden; where none is found, the
# photo is turned if that gives SURE and LEAD more than the photo as it is (measured: docs/lab_log.md)
UPRIGHT, SURE, LEAD = 0.88, 0.85, 0.03
MAX_OUTSIDE = 0.25  # of a crop, that lies outside the photo and is black, without a remark
REMARKS = {
    "several": "several faces; the large one near the middle was taken",
    "turned": "it lies on a side or upside down; the face was turned upright",
    "cut": "the photo ends close to the face; a part of its crop is black",
}


@dataclass(frozen=True)
class Face:
    """`box` x, y, width, height and `landmarks` (5, 2) in pixels, as `vitface.data.faces.alignment` orders them; by how
    many quarters of a circle the photo was turned left to find it."""

    box: np.ndarray
    landmarks: np.ndarray
    score: float
    turns: int = 0


class FaceDetector:
    """ConfigError without OpenCV, WeightsError without the model file; both name the command that gets it.

    `model` is the file of any YuNet, by default the fetched one; WeightsError if it is damaged, or another model.
    May be shared by threads and pickled: each thread of each process loads the model when it first detects.
    """

    def __init__(self, model: Path | None = None):
        otherwise = "\n(vitface align also takes landmarks from a file: --landmarks CSV)"
        require("finding faces in photos", "cv2", otherwise=otherwise)
        self.model = model or cache_home() / "face_detection_yunet.onnx"
        if not self.model.is_file():
            raise WeightsError(f"no face detector at {self.model}; fetch it with\n  vitface fetch yunet")
        if model is None and sha256_file(self.model) != YUNET_SHA256:
            other = "another YuNet goes with --detector FILE"
            raise WeightsError(f"{self.model} is damaged, fetch it again ({other})\n  vitface fetch yunet")
        self._loaded = threading.local()  # OpenCV's detector keeps its input's size: a thread needs one of its own
        self.detect(np.zeros((MIN_SIDE, MIN_SIDE, 3), np.uint8))  # a file that is none is found here

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = {**state, "_loaded": threading.local()}

    def find(self, image: np.ndarray) -> list[Face]:
        """The faces in a photo, uint8 (H, W, 3) RGB, which may lie on a side or upside down, see `detect`."""
        faces = self.detect(image)
        if _best(faces) >= UPRIGHT:
            return faces
        found = {turns: self.detect(np.rot90(image, turns)) for turns in (1, 2, 3)}
        turns = max(found, key=lambda turns: _best(found[turns]))
        if _best(found[turns]) < max(SURE, _best(faces) + LEAD):
            return faces
        return [_turned_back(face, turns, *image.shape[:2]) for face in found[turns]]

    def detect(self, image: np.ndarray) -> list[Face]:
        """The faces in a photo, uint8 (H, W, 3) RGB, the highest score first.

        The photo is searched at its size, but at most MAX_SIDE, then at halves of that down to MIN_SIDE, where the
        faces are found that were too large before.
        """
        bgr, longest, found, faces = np.ascontiguousarray(image[..., ::-1]), max(image.shape[:2]), [], []
        side = min(longest, MAX_SIDE)
        while not found or side >= MIN_SIDE:
            found.append(self._detect_at(bgr, side / longest))
            side //= 2
        for face in sorted(itertools.chain(*found), key=lambda face: -face.score):
            if not any(_overlap(face.box, other.box) for other in faces):
                faces.append(face)
        return faces

    def _detect_at(self, bgr: np.ndarray, scale: float) -> list[Face]:
        import cv2

        height, width = bgr.shape[:2]
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        small = bgr if scale == 1 else cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
        try:
            net = getattr(self._loaded, "net", None)
            if net is None:
                cv2.setNumThreads(1)  # photos are spread over processes
                cv2.utils.logging.setLogLevel(0)  # what is wrong is in the error
                net = cv2.FaceDetectorYN.create(str(self.model), "", (320, 320), MIN_SCORE, NMS_IOU, MAX_FACES)
                self._loaded.net = net
            net.setInputSize(size)
            _, found = net.detect(small)
        except cv2.error:
            fault = f"{self.model} is damaged, or not the ONNX file of a YuNet"
            raise WeightsError(f"{fault}; without --detector, the fetched one is used\n  vitface fetch yunet") from None
        rows = [] if found is None else found.astype(np.float64)
        return [Face(row[:4] / scale, row[4:14].reshape(5, 2) / scale, float(row[14])) for row in rows]


def no_usable_face(faces: list[Face], image: np.ndarray, min_face: float = MIN_FACE) -> str:
    """Why no crop can be made of a photo, uint8 (H, W, 3), with these faces; "" if the central one can be used."""
    height, width = image.shape[:2]
    if not faces:
        small = min(height, width) < 3 * MIN_FACE
        advice = "take a larger photo" if small else "take one that shows it whole, upright and from the front"
        return f"no face found in {width} x {height} pixels; {advice}"
    side = _side(central_face(faces, height, width))
    return "" if side >= min_face else f"the face is {side:.0f} pixels wide, less than {MIN_FACE}; take a larger photo"


def central_face(faces: list[Face], height: int, width: int) -> Face:
    """The face that is large and near the middle: area minus twice its squared distance from there (InsightFace).

    Only faces that are half as wide as the largest count, and are wide enough for a crop, if any is.
    """
    largest = max(map(_side, faces))
    least = max(largest / 2, min(MIN_FACE, largest))

    def weight(face: Face) -> float:
        offset = face.box[:2] + face.box[2:] / 2 - np.array([width, height]) / 2
        return float(face.box[2] * face.box[3] - 2 * (offset**2).sum())

    return max((face for face in faces if _side(face) >= least), key=weight)


def remarks(image: np.ndarray, landmarks: np.ndarray, faces: Sequence[Face] = ()) -> list[str]:
    """What a user should know of a crop of a photo, uint8 (H, W, 3), and of the faces found there: keys of REMARKS."""
    turned, cut = any(face.turns for face in faces), outside(image, landmarks) > MAX_OUTSIDE
    known = {"several": len(faces) > 1, "turned": turned, "cut": cut}
    return [remark for remark, true in known.items() if true]


def _best(faces: list[Face]) -> float:
    return max((face.score for face in faces), default=0)


def _turned_back(face: Face, turns: int, height: int, width: int) -> Face:
    """A face in a photo that was turned left by so many quarters of a circle, in the photo (height, width) itself."""
    corner, sides = face.box[:2], face.box[2:]
    points = np.vstack([face.landmarks, corner, corner + sides])
    for turn in reversed(range(turns)):
        points = np.column_stack([(width, height)[turn % 2] - 1 - points[:, 1], points[:, 0]])
    *landmarks, corner, opposite = points
    box = np.concatenate([np.minimum(corner, opposite), np.abs(corner - opposite)])
    return dataclasses.replace(face, box=box, landmarks=np.array(landmarks), turns=turns)


def _side(face: Face) -> float:
    return float(min(face.box[2:]))


def _overlap(box: np.ndarray, other: np.ndarray) -> bool:
    """Whether two boxes x, y, width, height are of one face: their common part is NMS_IOU of all that they cover."""
    sides = np.minimum(box[:2] + box[2:], other[:2] + other[2:]) - np.maximum(box[:2], other[:2])
    common = float(sides.clip(0).prod())
    return common > NMS_IOU * float(box[2:].prod() + other[2:].prod() - common)
