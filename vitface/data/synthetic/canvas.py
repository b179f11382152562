"""The camera and the drawing surface of the procedural faces: rays that meet ellipsoids in closed form.

Head frame: x to image right, y up, z towards the viewer, the head about one unit in radius. Camera frame: U, V and W in
the same directions; a ray is the line of all W at one (U, V). Boxes are (rows, columns) slices of the image.
"""

from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

SIDE, STRIDE = 112, 4
HALF_VIEW = 1.14  # half the image side in head units
PIXEL = 2 * HALF_VIEW / SIDE
AXIS = (((np.arange(SIDE) + 0.5) / SIDE * 2 - 1) * HALF_VIEW).astype(np.float32)


class Canvas:
    """The camera, the colour planes and the depth of what is seen so far; `paint` covers them by a soft mask."""

    def __init__(self, yaw: float, m: SimpleNamespace):
        yaw, nod, roll = np.radians([yaw, 5 * m.pitch, 6 * m.roll])
        cy, sy, cx, sx, cz, sz = np.cos(yaw), np.sin(yaw), np.cos(nod), np.sin(nod), np.cos(roll), np.sin(roll)
        about_y = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
        about_x = np.array([[1, 0, 0], [0, cx, sx], [0, -sx, cx]])
        about_z = np.array([[cz, sz, 0], [-sz, cz, 0], [0, 0, 1]])
        self.turn = about_y @ about_x @ about_z  # camera frame -> head frame; its transpose goes back
        self.rows = self.turn.tolist()
        self.scale = 1 + 0.06 * m.scale
        self.shift = (0.06 * m.shift_u, -0.10 + 0.06 * m.shift_v)
        self.u = ((AXIS - self.shift[0]) / self.scale).astype(np.float32)[None, :]
        self.v = ((-AXIS - self.shift[1]) / self.scale).astype(np.float32)[:, None]
        self.rgb = np.empty((3, SIDE, SIDE), np.float32)
        self.depth = np.full((SIDE, SIDE), -1.2, np.float32)
        self.head = np.zeros((SIDE, SIDE), np.float32)  # how much of each pixel it covers

    def box(self, centre, half_u: float, half_v: float) -> tuple[slice, slice]:
        """The pixels within half_u, half_v of a point of the head frame, as (rows, columns)."""
        x, y, z = centre
        (xu, xv, _), (yu, yv, _), (zu, zv, _) = self.rows
        u = (x * xu + y * yu + z * zu) * self.scale + self.shift[0]
        v = (x * xv + y * yv + z * zv) * self.scale + self.shift[1]
        edges = (-v - half_v, -v + half_v, u - half_u, u + half_u)
        top, bottom, left, right = (round(min(max(edge / PIXEL + SIDE / 2, 0), SIDE)) for edge in edges)
        return slice(top, bottom), slice(left, right)

    def truth(self) -> NDArray[np.float32]:
        """Unlit colour, head-frame position and presence of the head at each STRIDE-th pixel, (28, 28, 7)."""
        grid = slice(STRIDE // 2, None, STRIDE), slice(STRIDE // 2, None, STRIDE)
        seen = self.head[grid]
        planes = [self.rgb[0][grid], self.rgb[1][grid], self.rgb[2][grid], *self.points(grid), 1]
        return np.stack([plane * seen for plane in planes], axis=2)

    def paint(self, box, cover, colour) -> None:
        for plane, value in zip(self.rgb, colour, strict=True):
            part = plane[box]
            part += cover * (value - part)

    def put(self, box, cover, colour, depth) -> None:
        """Paints a solid: its depth replaces what was there where it covers more than half a pixel."""
        self.paint(box, cover, colour)
        np.copyto(self.depth[box], depth, where=cover > 0.5)

    def points(self, box, depth=None):
        """Head-frame coordinates of the surface seen in `box`, three float32 arrays."""
        u, v = self.u[:, box[1]], self.v[box[0]]
        depth = self.depth[box] if depth is None else depth
        return [row[0] * u + row[1] * v + row[2] * depth for row in self.rows]


def meet(canvas: Canvas, shape: dict[str, tuple]) -> dict[str, tuple]:
    """The rays' meeting with each ellipsoid: its box, front depth, back depth and coverage inside that box.

    With o + W d the ray in the ellipsoid's own unit-sphere frame, depth solves |d|² W² + 2 (o·d) W + |o|² - 1 = 0.
    Outside the outline the front depth falls steeply but continuously, as smooth unions need it.
    """
    centre, axes, tilt = (np.array(column, float) for column in zip(*shape.values(), strict=True))
    own = np.tile(np.eye(3), (len(tilt), 1, 1))
    own[:, 1, 1] = own[:, 2, 2] = np.cos(tilt)
    own[:, 1, 2], own[:, 2, 1] = np.sin(tilt), -np.sin(tilt)
    reach = np.sqrt((((own @ canvas.turn) * axes[:, :, None]) ** 2).sum(axis=1)).tolist()  # half extents along U, V, W
    own = own / axes[:, :, None]
    ray = np.concatenate([own @ canvas.turn, -own @ centre[:, :, None]], axis=2)  # (E, 3, 4): columns for U, V, W, one
    gram = ray.transpose(0, 2, 1) @ ray
    gram[:, 3, 3] -= 1
    a = gram[:, 2, 2, None]
    middle = (-gram[:, 2] / a).tolist()
    thick = ((gram[:, 2, :, None] * gram[:, 2, None, :]) / a[:, :, None] ** 2 - gram / a[:, :, None]).tolist()
    met = {}
    for part, at, (ru, rv, rw), t, (mu, mv, _, m) in zip(shape, centre.tolist(), reach, thick, middle, strict=True):
        box = canvas.box(at, ru * canvas.scale + 2 * PIXEL, rv * canvas.scale + 2 * PIXEL)
        u, v = canvas.u[:, box[1]], canvas.v[box[0]]
        square = ((t[0][0] * u + 2 * t[0][3]) * u + t[3][3]) + (t[1][1] * v + 2 * t[1][3]) * v + u * (2 * t[0][1] * v)
        half = np.sqrt(np.abs(square))  # half the chord, its square a quadratic of U and V
        mid = mu * u + (mv * v + m)
        edge = 0.5 * min(ru, rv) / (rw * rw * PIXEL)
        met[part] = box, mid + np.where(square < 0, -2 * half, half), mid - half, unit(square * edge + 0.5)
    return met


def unit(x):
    """x clipped to [0, 1]."""
    return np.minimum(np.maximum(x, 0), 1)


def smooth_max(a, b, width: float):
    """max(a, b) with the crease rounded over `width`."""
    gap = np.abs(a - b)
    top = np.maximum(a, b)
    return top + np.maximum(width - gap, 0) ** 2 * (0.25 / width)


def soft(signed, width: float = 0.024):
    """Coverage of a pixel whose signed distance inside an edge is given in head units."""
    return unit(signed * (1 / width) + 0.5)
