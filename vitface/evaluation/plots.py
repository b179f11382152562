"""The charts of report.html.j2 as numbers in SVG pixels, its pictures as data URIs, and the frame of an SVG file."""

import base64
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

from vitface.data.images import encode_image

LEFT, RIGHT, TOP, BOTTOM = 52, 470, 24, 220  # the edges of the plot
BOX = {"width": 480, "height": 260, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
HEAT = np.array([(68, 16, 110), (188, 55, 84), (249, 142, 9), (252, 240, 120)])  # RGB, for weights from 0 up
Chart = dict[str, Any]


def _scale(values: np.ndarray | float, low: float, high: float, start: float, stop: float) -> np.ndarray:
    return start + (np.clip(values, low, high) - low) / ((high - low) or 1) * (stop - start)


def ticks(low: float, high: float, whole: bool = False) -> np.ndarray:
    """Round numbers from `low` to `high`: about five, 1, 2 or 5 times a power of ten apart, at least one if `whole`."""
    rough = max(high - low, 1e-12) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    return np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step + 0.0  # no -0


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    log_x: bool = False,
    bands: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None,
) -> Chart:
    """Curves (x, y) by name, with axes that fit all of them; `log_x` needs positive x. Where y is one value throughout,
    such as a TAR of 1, it is the top of the axis, and 0 the bottom.

    `bands` are intervals (x, low, high) around the curves of the same names.
    """
    areas = {name: (np.r_[x, x[::-1]], np.r_[low, high[::-1]]) for name, (x, low, high) in (bands or {}).items()}
    shapes = [(np.log10(x) if log_x else np.asarray(x), np.asarray(y)) for x, y in (*curves.values(), *areas.values())]
    xs, ys = (np.concatenate(values) for values in zip(*shapes, strict=True))
    x_range, y_range = (xs.min(), xs.max()), (ys.min(), ys.max())
    if y_range[0] == y_range[1]:
        y_range = (0.9 * ys[0], ys[0]) if ys[0] > 0 else (ys[0], ys[0] + 1)
    points = []
    for x, y in shapes:
        places = zip(_scale(x, *x_range, LEFT, RIGHT), _scale(y, *y_range, BOTTOM, TOP), strict=True)
        points.append(" ".join(f"{px:.1f},{py:.1f}" for px, py in places))
    whole = log_x or bool((xs == xs.round()).all())
    lines = dict(zip(curves, points[: len(curves)], strict=True))
    around = [*zip(map([*curves].index, areas), points[len(curves) :], strict=True)]
    x_ticks = [(_scale(v, *x_range, LEFT, RIGHT), f"{10**v if log_x else v:.6g}") for v in ticks(*x_range, whole)]
    y_ticks = [(_scale(v, *y_range, BOTTOM, TOP), f"{v:.6g}") for v in ticks(*y_range)]
    return _chart(
        title,
        x_label,
        y_label,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        lines=lines,
        bands=around,
    )


def bar_chart(title: str, x_label: str, y_label: str, groups: Mapping[str, Mapping[str, float]], top: float) -> Chart:
    """A bar per name in each group, from 0 to `top`; a bar's colour is its place in the group, which a legend explains
    where all groups have the same names."""
    wide = (RIGHT - LEFT) / len(groups)
    x_ticks, bars = [], []
    for g, (group, values) in enumerate(groups.items()):
        centre, bar = LEFT + (g + 0.5) * wide, min(0.8 * wide / len(values), 60)
        x_ticks.append((centre, group))
        for b, (name, value) in enumerate(values.items()):
            x, y = centre + (b - len(values) / 2) * bar, _scale(value, 0, top, BOTTOM, TOP + 14)
            bars.append({"x": x, "y": y, "width": bar, "colour": b % 6, "value": value, "name": f"{group} {name}"})
    names = {tuple(values) for values in groups.values()}
    legend = names.pop() if len(names) == 1 < len(groups) else ()
    return _chart(title, x_label, y_label, x_ticks=x_ticks, bars=bars, legend=legend)


def _chart(title: str, x_label: str, y_label: str, **marks: Any) -> Chart:
    nothing = {"y_ticks": [], "lines": {}, "bands": [], "bars": [], "legend": ()}
    return {"title": title, "x_label": x_label, "y_label": y_label, **nothing, **marks}


def svg(width: float, height: float, marks: list[str]) -> str:
    """A file of its own: the marks on a white ground."""
    size = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11"'
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{ground}{"".join(marks)}</svg>\n'


def svg_text(x: float, y: float, words: str, anchor: str, colour: str = "#333333") -> str:
    """Words whose start, middle or end, `anchor`, is at x, on a line at y."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def pictures(caption: str, *images: np.ndarray) -> tuple[list[str], str]:
    """(data URIs of the PNGs, caption) of images, each uint8 (H, W, 3), that belong together."""
    encoded = (base64.b64encode(encode_image(pixels, "PNG")).decode() for pixels in images)
    return [f"data:image/png;base64,{text}" for text in encoded], caption


def heat(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the picture (H, W, 3) in grey, coloured where `weights` (g, g), of any scale, are large: from violet over
    red and orange to yellow, which is the largest."""
    size = pixels.shape[1], pixels.shape[0]
    share = Image.fromarray((255 * weights / max(float(weights.max()), 1e-12)).astype(np.uint8))
    share = np.asarray(share.resize(size, Image.Resampling.BICUBIC)) / 255
    grey = 40 + 0.6 * np.asarray(Image.fromarray(pixels).convert("L"))[..., None]
    colour = np.stack([np.interp(share, np.linspace(0, 1, len(HEAT)), channel) for channel in HEAT.T], axis=2)
    return (grey + 0.9 * np.minimum(1, 2 * share)[..., None] * (colour - grey)).astype(np.uint8)


def heat_scale(width: int, height: int) -> np.ndarray:
    """The colours of `heat` on a grey ground (height, width, 3), from nothing on the left to the largest weight."""
    return heat(np.full((height, width, 3), 128, np.uint8), np.linspace(0, 1, 64)[None])
