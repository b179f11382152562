import numpy as np
from conftest import optional
from hypothesis import given
from hypothesis import strategies as st

from vitface.data.faces.detect import FaceDetector
from vitface.data.faces.pose import HEAD, crop_landmarks, yaw_degrees
from vitface.data.formats.pairs import read_bin
from vitface.data.images import decode_image


def seen(yaw, pitch=0.0, scale=1.0, shift=(0.0, 0.0)):
    """The generic head turned by yaw, then pitch, in degrees, and projected: (5, 2)."""
    y, p = np.radians([yaw, pitch])
    turn = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    nod = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    return scale * ((HEAD - HEAD.mean(0)) @ (nod @ turn).T)[:, :2] + shift


@given(st.floats(-80, 80), st.floats(-30, 30), st.floats(0.3, 3), st.floats(-50, 50))
def test_the_yaw_of_a_projected_head_is_recovered(yaw, pitch, scale, shift):
    landmarks = np.stack([seen(yaw, pitch, scale, (shift, 9.0)), seen(0)])
    np.testing.assert_allclose(yaw_degrees(landmarks), [yaw, 0], atol=1e-6)


def test_a_nose_to_the_images_right_is_positive():
    landmarks = seen(0)[None].copy()
    landmarks[0, 2, 0] += 3
    assert 5 < yaw_degrees(landmarks)[0] < 30


def test_mirrored_real_faces_turn_the_other_way(real_data):
    optional("cv2")
    images = read_bin(real_data / "lfw.bin").images[:60]
    detector = FaceDetector(real_data / "face_detection_yunet.onnx")
    crops = [decode_image(image, "lfw") for image in images]
    found = [(crop_landmarks(crop, detector), crop_landmarks(crop[:, ::-1], detector)) for crop in crops]
    both = [pair for pair in found if pair[0] is not None and pair[1] is not None]
    assert len(both) >= 55
    yaw, mirrored = (yaw_degrees(np.array(side)) for side in zip(*both, strict=True))
    assert np.median(np.abs(yaw + mirrored)) < 4 and np.corrcoef(yaw, -mirrored)[0, 1] > 0.9
    assert np.abs(yaw).max() > 15  # some are turned


def test_no_face_is_none():
    class Blind:
        def detect(self, image):
            assert image.shape == (224, 224, 3)
            return []

    assert crop_landmarks(np.zeros((112, 112, 3), np.uint8), Blind()) is None
