"""The charts of report.html.j2 as numbers in SVG pixels, and its pictures as data URIs."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vitface.data.images import encode_image

LEFT, RIGHT, TOP, BOTTOM = 52, 470, 24, 220  # the edges of the plot
BOX = {"width": 480, "height": 260, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
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
    title: str, x_label: str, y_label: str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], log_x: bool = False
) -> Chart:
    """Curves (x, y) by name, with axes that fit all of them; `log_x` needs positive x."""
    curves = {name: (np.log10(x) if log_x else np.asarray(x), np.asarray(y)) for name, (x, y) in curves.items()}
    xs, ys = (np.concatenate(values) for values in zip(*curves.values(), strict=True))
    x_range, y_range = (xs.min(), xs.max()), (ys.min(), ys.max())
    lines = {}
    for name, (x, y) in curves.items():
        points = zip(_scale(x, *x_range, LEFT, RIGHT), _scale(y, *y_range, BOTTOM, TOP), strict=True)
        lines[name] = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    x_ticks = [(_scale(v, *x_range, LEFT, RIGHT), f"{10**v if log_x else v:.6g}") for v in ticks(*x_range, whole=log_x)]
    y_ticks = [(_scale(v, *y_range, BOTTOM, TOP), f"{v:.6g}") for v in ticks(*y_range)]
    return _chart(title, x_label, y_label, x_ticks=x_ticks, y_ticks=y_ticks, lines=lines)


def bar_chart(title: str, x_label: str, y_label: str, groups: Mapping[str, Mapping[str, float]], top: float) -> Chart:
    """A bar per name in each group, from 0 to `top`; a bar's colour is its place in the group."""
    wide = (RIGHT - LEFT) / len(groups)
    x_ticks, bars = [], []
    for g, (group, values) in enumerate(groups.items()):
        centre, bar = LEFT + (g + 0.5) * wide, min(0.8 * wide / len(values), 60)
        x_ticks.append((centre, group))
        for b, (name, value) in enumerate(values.items()):
            x, y = centre + (b - len(values) / 2) * bar, _scale(value, 0, top, BOTTOM, TOP)
            bars.append({"x": x, "y": y, "width": bar, "colour": b % 6, "value": value, "name": f"{group} {name}"})
    return _chart(title, x_label, y_label, x_ticks=x_ticks, bars=bars)


def _chart(title: str, x_label: str, y_label: str, **marks: Any) -> Chart:
    return {"title": title, "x_label": x_label, "y_label": y_label, "y_ticks": [], "lines": {}, "bars": [], **marks}


def picture(pixels: np.ndarray, caption: str) -> tuple[str, str]:
    """(data URI of the PNG, caption) of uint8 (H, W, 3)."""
    return f"data:image/png;base64,{base64.b64encode(encode_image(pixels, 'PNG')).decode()}", caption


def heat(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the picture (H, W, 3), darkened where `weights` (g, g), of any scale, are small."""
    size = pixels.shape[1], pixels.shape[0]
    share = weights / max(float(weights.max()), 1e-12)
    mask = Image.fromarray((255 * share).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    return (pixels * (0.2 + 0.8 * np.asarray(mask)[..., None] / 255)).astype(np.uint8)
