"""The features that are painted on the head of a procedural face: eyes, mouth, nose, marks and wrinkles.

`f` holds a person's factors, `m` the photo's moments, `tone` the colours (see render.py).
"""

from types import SimpleNamespace

import numpy as np

from vitface.data.synthetic.canvas import Canvas, soft


def eyes(canvas: Canvas, f: SimpleNamespace, tone: SimpleNamespace, m: SimpleNamespace, age: float) -> None:
    ex, ey = 0.285 + 0.07 * f.eye_spacing, 0.06 + 0.06 * f.eye_height
    a, b = 0.135 + 0.04 * f.eye_width, (0.075 + 0.03 * f.eye_opening) * (1 - 0.25 * age - 0.15 * m.blink)
    for side in (-1, 1):
        box = canvas.box((side * ex, ey, 0.62), 0.34, 0.42)
        x, y, z = canvas.points(box)
        if not x.size:
            continue
        out, up = (x - side * ex) * side, y - ey
        ahead = canvas.head[box] * soft(z - 0.25, 0.1)
        canvas.depth[box] -= 0.07 * ahead * np.exp(-((out * 5) ** 2) - ((up - 0.02) * 7) ** 2)
        up = up - (0.20 * f.eye_tilt - 0.10 * age) * out
        lid = b * (1 - (out * (1 / a)) ** 2)
        opening = soft(lid - np.abs(up)) * ahead
        canvas.paint(box, opening, (0.90, 0.88, 0.86))
        gaze = np.sqrt((out - side * 0.04 * m.gaze) ** 2 + (up - 0.01) ** 2)
        radius = 0.066 + 0.016 * f.iris_size
        canvas.paint(box, opening * soft(radius - gaze), tone.iris)
        canvas.paint(box, opening * soft(0.45 * radius - gaze), (0.05, 0.05, 0.05))
        lash = soft(0.022 - np.abs(up - np.maximum(lid, -0.02))) * soft(a * 1.12 - np.abs(out)) * ahead
        canvas.paint(box, 0.8 * lash, [0.35 * c for c in tone.skin])
        bag = (
            soft(0.02 - np.abs(up + 0.05 + 1.6 * b * (1 - (out * (1 / a)) ** 2)), 0.04) * soft(a - np.abs(out)) * ahead
        )
        canvas.paint(box, 0.5 * age * bag, [0.6 * c for c in tone.skin])
        _brow(canvas, box, out, y - ey, ahead, f, tone)


def _brow(canvas: Canvas, box, out, up, ahead, f: SimpleNamespace, tone: SimpleNamespace) -> None:
    length = 0.19 + 0.04 * f.brow_length
    along = out * (1 / length)
    line = 0.20 + 0.055 * f.brow_height + 0.08 * f.brow_slope * along - (0.05 + 0.04 * f.brow_arch) * along * along
    thick = (0.036 + 0.024 * f.brow_thickness) * (1 - 0.35 * along)
    cover = soft(thick - np.abs(up - line), 0.03) * soft(1 - np.abs(along), 0.15) * ahead
    canvas.paint(box, 0.85 * cover, tone.brow)


def mouth(canvas: Canvas, f: SimpleNamespace, tone: SimpleNamespace, m: SimpleNamespace, age: float) -> None:
    my, half = -0.56 + 0.07 * f.mouth_height, 0.215 + 0.07 * f.mouth_width + 0.025 * m.smile
    box = canvas.box((0, my, 0.66), 0.46, 0.34)
    x, y, z = canvas.points(box)
    along = x * (1 / half)
    bow = 1 - along * along
    ahead = canvas.head[box] * soft(z - 0.3, 0.1)
    up = y - my - (0.06 * f.mouth_curve + 0.05 * m.smile - 0.05 * age) * (along * along - 0.4)
    upper, lower = 0.045 + 0.028 * f.upper_lip - 0.02 * age, 0.06 + 0.036 * f.lower_lip - 0.02 * age
    dip = upper * (bow - 0.35 * np.exp(-((x * 18) ** 2)))
    lips = soft(np.where(up > 0, dip - up, lower * bow + up)) * ahead * soft(bow, 0.3)
    canvas.depth[box] += 0.05 * lips
    canvas.paint(box, lips, tone.lips)
    canvas.paint(box, 0.75 * soft(0.014 - np.abs(up)) * soft(bow, 0.2) * ahead, [0.35 * c for c in tone.lips])


def nose(canvas: Canvas, shape: dict, f: SimpleNamespace, tone: SimpleNamespace) -> None:
    (_, ty, tz), (width, height, _), _ = shape["tip"]
    box = canvas.box((0, ty, tz), 0.3, 0.25)
    x, y, z = canvas.points(box)
    ahead = canvas.head[box] * soft(z - 0.5, 0.1)
    hole = 1 - np.sqrt(((np.abs(x) - 0.5 * width) * (1 / 0.042)) ** 2 + ((y - ty + 0.75 * height) * (1 / 0.028)) ** 2)
    canvas.paint(box, 0.7 * soft(hole, 0.8) * ahead, [0.35 * c for c in tone.skin])


def marks(canvas: Canvas, shape: dict, f: SimpleNamespace, tone: SimpleNamespace) -> None:
    """Freckles on the cheeks, a beard's shadow, and two moles at fixed places of the surface."""
    box = canvas.box((0, -0.35, 0.4), 0.9, 0.75)
    x, y, z = canvas.points(box)
    if f.freckles > 0:
        spots = np.sin(41 * x + 9 * f.mole_1_side) * np.sin(37 * y + 5 * z + 9 * f.mole_2_side)
        cheeks = canvas.head[box] * np.maximum(1 - ((y + 0.16) * 4) ** 2, 0) * soft(z - 0.2, 0.2)
        canvas.paint(box, 0.55 * f.freckles * cheeks * soft(spots - 0.45, 0.4), [0.62 * c for c in tone.skin])
    if f.beard > 0:
        around = np.maximum(np.abs(x) * 1.3 - 0.45, 0) - 0.36 + 0.06 * f.mouth_height
        shadow = 0.6 * f.beard * canvas.head[box] * soft(around - y, 0.12) * soft(z + 0.05, 0.2)
        canvas.paint(box, shadow * soft(y + 1.05, 0.1), tone.beard)
    first = (f.mole_1_side, f.mole_1_height, f.mole_1_size)
    for side, up, size in (first, (f.mole_2_side, f.mole_2_height, f.mole_2_size)):
        if size > -0.4:
            turn = 1.3 * side
            at = _surface(shape, (float(np.sin(turn)), -0.25 + 0.40 * up, float(np.cos(turn))))
            box = canvas.box(at, 0.12, 0.12)
            x, y, z = canvas.points(box)
            gap = np.sqrt((x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2)
            canvas.paint(box, 0.85 * soft(0.034 + 0.02 * size - gap, 0.03), [0.35 * c for c in tone.skin])


def _surface(shape: dict, at) -> list[float]:
    """The point at which the level ray from the head's axis towards `at` leaves the head."""
    far = 0.0
    for part in ("cranium", "jaw", "cheeks", "chin"):
        (cx, cy, cz), (ax, ay, az), _ = shape[part]
        level = 1 - ((at[1] - cy) / ay) ** 2
        p, q = (at[0] / ax) ** 2 + (at[2] / az) ** 2, at[0] * cx / ax**2 + at[2] * cz / az**2
        root = q * q - p * ((cx / ax) ** 2 + (cz / az) ** 2 - level)
        if root > 0:
            far = max(far, (q + root**0.5) / p)
    return [at[0] * far, at[1], at[2] * far]


def wrinkles(canvas: Canvas, f: SimpleNamespace, tone: SimpleNamespace, age: float) -> None:
    """Forehead lines, folds from nose to mouth, crow's feet: grooves of the depth, so that light acts on them."""
    box = canvas.box((0, 0.0, 0.5), 0.9, 0.85)
    x, y, z = canvas.points(box)
    ahead = canvas.head[box] * soft(z - 0.15, 0.2)
    wide = np.abs(x)
    lines = np.maximum(np.sin(58 * y + 2.5 * np.cos(4 * x)) - 0.3, 0) * soft(y - 0.38, 0.1) * soft(0.5 - wide, 0.2)
    fold_x = 0.16 + 0.32 * np.clip(-0.2 - y, 0, 0.5)
    folds = np.maximum(1 - np.abs(wide - fold_x) * 28, 0) * soft(-0.22 - y, 0.1) * soft(y + 0.62, 0.1)
    dx, dy = wide - 0.30, y - 0.05
    fan = np.maximum(np.sin(13 * np.arctan2(dy, dx + 1e-6)) - 0.2, 0)
    feet = fan * soft(dx - 0.16, 0.06) * soft(0.33 - dx, 0.08) * soft(0.17 - np.abs(dy), 0.08)
    groove = (lines + folds + feet) * ahead
    canvas.depth[box] -= 0.02 * age * groove
    canvas.paint(box, 0.35 * age * groove, [0.55 * c for c in tone.skin])
