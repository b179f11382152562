"""The map of an oracle's leads as a picture: a dot for each arm with its interval, against a line at nothing."""

from typing import Any

import numpy as np

from vitface.evaluation.plots import svg, svg_text, ticks

LINE, LEFT, RIGHT, WIDTH, TOP = 18, 190, 500, 620, 34  # pixels: between rows, the edges of the plot, the picture
SURE, UNSURE = "#0066cc", "#888888"


def figure(rows: list[dict[str, Any]], column: str) -> str:
    """An SVG of the leads of `vitface.study.map.map_rows` over one set of pairs, in points; blue where the interval
    excludes 0."""
    leads = [(row["setting"], row["arm"], row["lead"][column]) for row in rows if row["lead"]]
    bounds = [100 * bound for *_, lead in leads for bound in lead["interval"]]
    low, high = min(bounds, default=0.0), max(bounds, default=0.0)
    low, high = min(low, 0.0) - 0.5, max(high, 0.0) + 0.5
    bottom = TOP + LINE * len(leads)
    marks = [svg_text(LEFT, 18, f"the oracle's lead in points, {column}, and 95 % intervals", "start")]
    for value in ticks(low, high):
        x = _place(value, low, high)
        colour = "#333333" if value == 0 else "#dddddd"
        marks.append(f'<line x1="{x}" x2="{x}" y1="{TOP - 6}" y2="{bottom}" stroke="{colour}"/>')
        marks.append(svg_text(x, bottom + 14, f"{value:+g}" if value else "0", "middle"))
    for number, (setting, arm, lead) in enumerate(leads):
        y, (first, last) = TOP + LINE * number + 4, (100 * bound for bound in lead["interval"])
        colour, x = SURE if first > 0 or last < 0 else UNSURE, _place(100 * lead["difference"], low, high)
        ends = f'x1="{_place(first, low, high)}" x2="{_place(last, low, high)}"'
        marks.append(svg_text(LEFT - 8, y + 4, f"{setting}: over {arm}", "end"))
        marks.append(f'<line {ends} y1="{y}" y2="{y}" stroke="{colour}" stroke-width="1.5"/>')
        marks.append(f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>')
        marks.append(svg_text(RIGHT + 8, y + 4, f"{100 * lead['difference']:+.2f}", "start"))
    return svg(WIDTH, bottom + 22, marks)


def _place(value: float, low: float, high: float) -> float:
    return round(float(np.interp(value, (low, high), (LEFT, RIGHT))), 1)
