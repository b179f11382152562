"""Small charts as inline SVG, drawn from numbers: lines, bars, pictures. Colours are CSS variables of the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from PIL import Image

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 480, 260, 52, 40, 24


def _frame(title: str, x_label: str, y_label: str, body: str) -> str:
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f'<rect class="plot" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - 10}" height="{HEIGHT - BOTTOM - TOP}"/>{body}'
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text x="14" y="14" text-anchor="start">{escape(y_label)}</text></svg>'
        f"<figcaption>{escape(title)}</figcaption></figure>"
    )


def _scale(values: np.ndarray | float, low: float, high: float, start: float, stop: float) -> np.ndarray:
    return start + (np.clip(values, low, high) - low) / ((high - low) or 1) * (stop - start)


def ticks(low: float, high: float, whole: bool = False) -> np.ndarray:
    """Round numbers from `low` to `high`: about five, 1, 2 or 5 times a power of ten apart, at least one if `whole`."""
    rough = max(high - low, 1e-12) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(multiple * power for multiple in (1, 2, 5, 10) if multiple * power >= rough * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    return np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    log_x: bool = False,
    step: bool = False,
) -> str:
    """Curves (x, y) by name, on axes that hold all of them; `log_x` for positive x; `step` keeps y until the next x."""
    xs, ys = (np.concatenate([np.asarray(curve[i], float) for curve in curves.values()]) for i in (0, 1))
    low, high, bottom, top = (float(f(v)) for v in (np.log10(xs) if log_x else xs, ys) for f in (np.min, np.max))
    body = []
    for value in ticks(low, high, whole=log_x):
        x, label = _scale(value, low, high, LEFT, WIDTH - 10), 10**value if log_x else value
        body.append(f'<text x="{x:.0f}" y="{HEIGHT - 22}" text-anchor="middle">{label:.6g}</text>')
    for value in ticks(bottom, top):
        y = _scale(value, bottom, top, HEIGHT - BOTTOM, TOP)
        body.append(f'<text x="{LEFT - 4}" y="{y + 4:.0f}" text-anchor="end">{value:.6g}</text>')
        body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.0f}" y2="{y:.0f}"/>')
    for number, (name, (x, y)) in enumerate(curves.items()):
        px = _scale(np.log10(x) if log_x else np.asarray(x, float), low, high, LEFT, WIDTH - 10)
        py = _scale(np.asarray(y, float), bottom, top, HEIGHT - BOTTOM, TOP)
        if step:
            px, py = np.repeat(px, 2)[1:], np.repeat(py, 2)[:-1]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(px, py, strict=True))
        body.append(f'<polyline class="c{number % 6}" points="{points}"/>')
        body.append(f'<text class="t{number % 6}" x="{LEFT + 8}" y="{TOP + 16 + 15 * number}">{escape(name)}</text>')
    return _frame(title, x_label, y_label, "".join(body))


def bar_chart(title: str, x_label: str, y_label: str, groups: Mapping[str, Mapping[str, float]], top: float) -> str:
    """A bar per name in each group, from 0 to `top`; a bar's colour is its place in the group."""
    wide = (WIDTH - LEFT - 10) / len(groups)
    body = []
    for g, (group, bars) in enumerate(groups.items()):
        for b, (name, value) in enumerate(bars.items()):
            bar = min(0.8 * wide / len(bars), 60)
            x = LEFT + (g + 0.5) * wide + (b - len(bars) / 2) * bar
            y = float(_scale(np.array(value), 0, top, HEIGHT - BOTTOM, TOP))
            body.append(
                f'<rect class="b{b % 6}" x="{x:.1f}" y="{y:.1f}" width="{0.92 * bar:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}"><title>{escape(f"{group} {name}: {value:.4g}")}</title></rect>'
            )
            body.append(
                f'<text x="{x + bar / 2:.1f}" y="{max(y - 3, TOP + 10):.1f}" text-anchor="middle">{value:.3g}</text>'
            )
        centre = LEFT + (g + 0.5) * wide
        body.append(f'<text x="{centre:.0f}" y="{HEIGHT - 22}" text-anchor="middle">{escape(group)}</text>')
    return _frame(title, x_label, y_label, "".join(body))


def picture(pixels: np.ndarray, caption: str) -> str:
    """uint8 (H, W, 3) as an embedded PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    text, source = escape(caption), f"data:image/png;base64,{data}"
    return f'<figure class="face"><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def heat(pixels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3), darkened but where `weights` (g, g), of any scale, are large."""
    size = pixels.shape[1], pixels.shape[0]
    share = weights / max(float(weights.max()), 1e-12)
    mask = Image.fromarray((255 * share).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    return (pixels * (0.2 + 0.8 * np.asarray(mask)[..., None] / 255)).astype(np.uint8)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table that scrolls sideways by itself on a narrow screen."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
