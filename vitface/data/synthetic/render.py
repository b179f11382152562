"""Draws a procedural face from its numbers: the person, yaw, age, light, and a seed for everything else.

A head is a union of ellipsoids, which each pixel's ray meets in closed form. Features are painted at fixed places of
that surface, so yaw turns them in three dimensions and a profile hides the far half. A person is a vector of
independent uniform factors, a hash of the identity number. What changes from photo to photo (pose jitter, expression,
exposure, colour cast, shirt, background, noise) is a hash of the photo's seed. The ranges of skin and hair colours are
narrow and the casts strong, so that nobody is recognised by colour alone. An image does not depend on its batch.
"""

from types import SimpleNamespace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitface.data.counter import uniform
from vitface.data.synthetic.canvas import AXIS, PIXEL, SIDE, STRIDE, Canvas, meet, smooth_max, soft, unit
from vitface.data.synthetic.features import eyes, marks, mouth, nose, wrinkles

_FACTORS = """
head_width head_height head_depth jaw_width jaw_length chin_size chin_forward cheek_fullness
eye_spacing eye_height eye_width eye_opening eye_tilt iris_hue iris_size
brow_thickness brow_height brow_slope brow_arch brow_length brow_darkness
nose_length nose_width nose_forward nose_bridge nose_tip
mouth_width mouth_height mouth_curve upper_lip lower_lip lip_redness
ear_size ear_height ear_out skin_light skin_hue hair_light hair_hue
hairline hair_parting hair_temple hair_length hair_volume hair_curl beard freckles
mole_1_side mole_1_height mole_1_size mole_2_side mole_2_height mole_2_size
"""
_MOMENTS = """
roll pitch scale shift_u shift_v smile blink gaze lamp_height exposure contrast
cast_r cast_g cast_b back_r back_g back_b back_slope back_wave back_turn
shirt_r shirt_g shirt_b noise_level noise_start
"""
FACTORS, MOMENTS = tuple(_FACTORS.split()), tuple(_MOMENTS.split())


def identity_factors(people: ArrayLike) -> NDArray[np.float32]:
    """The people's factors in the order of `FACTORS`: (B,) -> (B, F) in [-1, 1), independent and uniform."""
    return (2 * uniform(len(FACTORS), 1, np.atleast_1d(people)) - 1).astype(np.float32)


def photo_moments(seeds: ArrayLike) -> NDArray[np.float32]:
    """The numbers that differ from photo to photo, in the order of `MOMENTS`: (B,) -> (B, M) in [-1, 1), uniform."""
    return (2 * uniform(len(MOMENTS), 3, np.atleast_1d(seeds)) - 1).astype(np.float32)


# zero mean, unit variance, nearly normal
_NOISE = ((uniform(1 << 18, 2).reshape(4, -1).sum(axis=0) - 2) * 3**0.5).astype(np.float32)
# how much the edge between a part and the head so far is rounded
CREASES = {"cranium": 0.1, "jaw": 0.25, "cheeks": 0.3, "chin": 0.4, "ridge": 0.12, "tip": 0.06}
CREASES |= {"ear_left": 0.03, "ear_right": 0.03}


def _head_shape(f: SimpleNamespace, age: float) -> dict[str, tuple]:
    """(centre, axes, tilt) of every ellipsoid of a head."""
    half = 0.70 + 0.09 * f.head_width
    jaw = 0.52 + 0.12 * f.jaw_width + 0.05 * age
    chin_y = -0.82 - 0.12 * f.jaw_length
    root, tip = 0.10, -0.26 - 0.13 * f.nose_length
    length, out = root - tip, 0.84 + 0.10 * f.nose_forward
    ear = 0.17 + 0.06 * f.ear_size + 0.03 * age
    long, volume = max(f.hair_length, -0.4), 0.09 * f.hair_volume
    skull = 0.80 + 0.09 * f.head_height
    return {
        "cranium": ((0, 0.24, -0.12), (half, skull, 0.84 + 0.08 * f.head_depth), 0),
        "jaw": ((0, -0.30, 0.10), (jaw, -chin_y - 0.24, 0.58), 0),
        "cheeks": ((0, -0.24, 0.18), (0.56 + 0.06 * f.cheek_fullness, 0.30, 0.45 + 0.04 * f.cheek_fullness), 0),
        "chin": ((0, chin_y + 0.11, 0.34 + 0.07 * f.chin_forward), (0.28 + 0.09 * f.chin_size, 0.26, 0.23), 0),
        "ridge": (
            (0, (root + tip) / 2, 0.60 + 0.05 * f.nose_bridge + 0.06 * f.nose_forward),
            (0.075 + 0.015 * f.nose_width, length * 0.66, 0.16 + 0.03 * f.nose_bridge),
            np.arctan2(out - 0.72, length),
        ),
        "tip": (
            (0, tip + 0.02 + 0.03 * f.nose_tip, out - 0.13),
            (0.125 + 0.06 * f.nose_width, 0.10, 0.17),
            -0.3 * f.nose_tip,
        ),
        "ear_left": ((-half + 0.02, -0.05 + 0.07 * f.ear_height, -0.12), (0.09 + 0.06 * f.ear_out, ear, 0.12), 0.2),
        "ear_right": ((half - 0.02, -0.05 + 0.07 * f.ear_height, -0.12), (0.09 + 0.06 * f.ear_out, ear, 0.12), 0.2),
        "neck": ((0, -1.20, -0.20), (0.36 + 0.04 * f.jaw_width, 1.0, 0.36), 0),
        "shirt": ((0, -1.78, -0.25), (1.35, 0.52, 0.5), 0),
        "hair": (
            (0, 0.26 - 0.28 * long, -0.17),
            (half + 0.10 + volume, skull + 0.12 + volume + 0.26 * long, 0.93 + 0.08 * f.head_depth + volume),
            0,
        ),
    }


def _backdrop(canvas: Canvas, m: SimpleNamespace) -> None:
    u, v = AXIS[None, :], -AXIS[:, None]
    turn = 3.1 * m.back_turn
    ramp = 0.15 * m.back_slope * (float(np.cos(turn)) * u + float(np.sin(turn)) * v)
    ramp += 0.10 * m.back_wave * np.sin((3 + 2 * m.back_turn) * u + 2) * np.sin((3 - 2 * m.back_turn) * v)
    for plane, level in zip(canvas.rgb, (m.back_r, m.back_g, m.back_b), strict=True):
        plane[:] = ramp + (0.5 + 0.16 * level)


def _palette(f: SimpleNamespace, age: float) -> SimpleNamespace:
    """The colours of one person at one age; the ranges are narrow on purpose."""
    skin = (0.78 + 0.08 * f.skin_light) * np.array([1.0, 0.78 + 0.02 * f.skin_hue, 0.66 + 0.04 * f.skin_hue])
    skin = skin + 0.06 * age * (skin.mean() - skin)
    hair = (0.27 + 0.12 * f.hair_light) * np.array([1.0, 0.78 + 0.06 * f.hair_hue, 0.62 + 0.12 * f.hair_hue])
    grey = float(np.clip(1.6 * age - 0.5, 0, 1))
    white = np.array([0.74, 0.74, 0.75])
    iris = np.array([0.36 - 0.16 * f.iris_hue, 0.32 + 0.06 * f.iris_hue, 0.30 + 0.20 * f.iris_hue])
    lips = skin * np.array([0.92, 0.68 - 0.08 * f.lip_redness, 0.72 - 0.06 * f.lip_redness])
    brow = hair * (0.75 - 0.2 * f.brow_darkness)
    tones = {"skin": skin, "hair": hair + grey * (white - hair), "iris": iris, "lips": lips}
    tones |= {"brow": brow + 0.6 * grey * (white - brow), "beard": 0.6 * hair + 0.25 * grey * white}
    return SimpleNamespace(**{name: colour.tolist() for name, colour in tones.items()})


def _head(canvas: Canvas, shape: dict, f: SimpleNamespace, tone: SimpleNamespace, m: SimpleNamespace):
    """Paints neck, shirt, the far side of the hair, then the head as one smooth solid; returns what `meet` does."""
    met, everywhere = meet(canvas, shape), (slice(0, SIDE), slice(0, SIDE))
    for part, colour in (("neck", tone.skin), ("shirt", [0.45 + 0.4 * c for c in (m.shirt_r, m.shirt_g, m.shirt_b)])):
        box, front, _, cover = met[part]
        canvas.put(box, cover * (front > canvas.depth[box]), colour, front)
    box, _, back, cover = met["hair"]
    _, y, _ = canvas.points(box, back)
    canvas.paint(box, cover * soft(y - _nape(f)), [0.6 * c for c in tone.hair])
    depth, total = np.full((SIDE, SIDE), -9, np.float32), canvas.head
    for part, crease in CREASES.items():
        box, front, _, cover = met[part]
        depth[box] = smooth_max(depth[box], front, crease)
        np.maximum(total[box], cover, out=total[box])
    canvas.put(everywhere, total, tone.skin, depth)
    return met


def _nape(f: SimpleNamespace) -> float:
    """The height to which the hair reaches down at the sides and the back."""
    return -0.22 - 0.55 * f.hair_length


def _hair(canvas: Canvas, hair, f: SimpleNamespace, tone: SimpleNamespace, age: float) -> None:
    box, front, _, cover = hair
    x, y, z = canvas.points(box, front)
    ahead = (z + 0.17) * (1 / np.sqrt(x * x + (z + 0.17) ** 2 + 1e-3))  # cosine of the azimuth: 1 in front, -1 behind
    edge = 0.42 + 0.22 * f.hair_temple + 0.12 * age
    forehead = unit((ahead - edge) * (1 / 0.22))
    top = 0.62 + 0.17 * f.hairline + 0.20 * age * age
    line = _nape(f) + forehead * (top - _nape(f) + 0.30 * f.hair_parting * x)
    wave = np.sin((26 + 8 * f.hair_curl) * x + 9 * z) * np.sin((7 + 9 * (1 + f.hair_curl)) * y + 5 * x + 11 * z)
    strand = cover * soft(y - line + 0.02 * wave, 0.05) * (front > canvas.depth[box] - 0.02)
    shade = 1 + 0.15 * wave
    np.maximum(canvas.head[box], strand, out=canvas.head[box])
    canvas.put(box, strand, [shade * c for c in tone.hair], front)


def _expose(canvas: Canvas, light: float, m: SimpleNamespace) -> NDArray[np.uint8]:
    """Lambert shading of the depth's slopes, exposure, colour cast and sensor noise, to uint8 (112, 112, 3)."""
    w = canvas.depth
    slope_u, slope_v = np.zeros_like(w), np.zeros_like(w)
    step = canvas.scale / (2 * PIXEL)
    np.clip((w[:, 2:] - w[:, :-2]) * step, -3, 3, out=slope_u[:, 1:-1])
    np.clip((w[:-2] - w[2:]) * step, -3, 3, out=slope_v[1:-1])
    side, strength = float(np.sin(1.35 * light)), abs(light)
    high = 0.35 + 0.25 * m.lamp_height
    norm = (side * side + high * high + (1 - side * side)) ** 0.5
    lamp = (side / norm, high / norm, (1 - side * side) ** 0.5 / norm)
    lit = (lamp[2] - slope_u * lamp[0] - slope_v * lamp[1]) / np.sqrt(1 + slope_u * slope_u + slope_v * slope_v)
    ambient = 0.50 - 0.38 * strength
    shade = ambient + (1 - ambient) * np.maximum(lit * 0.85 + 0.15, 0)
    gain = (1.10 + 0.25 * m.exposure) * (1 - 0.25 * strength)
    noise = _NOISE[int((m.noise_start + 1) / 2 * (len(_NOISE) - 3 * SIDE * SIDE)) :][: 3 * SIDE * SIDE]
    noise = noise.reshape(3, SIDE, SIDE) * (0.022 + 0.014 * m.noise_level)
    out = np.empty((SIDE, SIDE, 3), np.uint8)
    for channel, cast in enumerate((m.cast_r, m.cast_g, m.cast_b)):
        value = canvas.rgb[channel] * shade * (gain * (1 + 0.14 * cast)) + noise[channel]
        level = (value - 0.5) * (1 + 0.15 * m.contrast) + 0.5
        out[:, :, channel] = np.clip(level * 255 + 0.5, 0, 255)
    return out


def _draw(person: int, yaw: float, age: float, seed: int) -> tuple[Canvas, SimpleNamespace]:
    """One head before light and camera, and the moments of its photo."""
    f = SimpleNamespace(**dict(zip(FACTORS, identity_factors(person)[0].tolist(), strict=True)))
    m = SimpleNamespace(**dict(zip(MOMENTS, photo_moments(seed)[0].tolist(), strict=True)))
    shape, tone, canvas = _head_shape(f, age), _palette(f, age), Canvas(yaw, m)
    _backdrop(canvas, m)
    met = _head(canvas, shape, f, tone, m)
    marks(canvas, shape, f, tone)
    wrinkles(canvas, f, tone, age)
    eyes(canvas, f, tone, m, age)
    mouth(canvas, f, tone, m, age)
    nose(canvas, shape, f, tone)
    _hair(canvas, met["hair"], f, tone, age)
    return canvas, m


def render_scenes(
    people: ArrayLike, yaw: ArrayLike, age: ArrayLike, light: ArrayLike, seed: ArrayLike
) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Photos uint8 (B, 112, 112, 3), RGB, and the truth of every fourth pixel, float16 (B, 28, 28, 7): the unlit colour
    (3), the head-frame position of the surface (3) and one, all of them zero where there is no head.

    Each argument is (B,) or a scalar for all. `people` identity numbers; `yaw` degrees in [-90, 90], positive towards
    image right; `age` in [0, 1]; `light` in [-1, 1], the side of the lamp (negative left) and how
    strong and dim its light is; `seed` whole numbers that decide everything else.
    """
    columns = np.broadcast_arrays(*(np.atleast_1d(column) for column in (people, yaw, age, light, seed)))
    count = len(columns[0])
    images, truth = np.empty((count, SIDE, SIDE, 3), np.uint8), np.empty((count, *[SIDE // STRIDE] * 2, 7), np.float16)
    for i, (person, turn, years, side, number) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        canvas, m = _draw(person, turn, years, number)
        truth[i] = canvas.truth()
        images[i] = _expose(canvas, side, m)
    return images, truth
