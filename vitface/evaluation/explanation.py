"""A picture of one face with the model's attention and the domain weights of its router."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitface.evaluation.plots import heat, heat_scale
from vitface.recogniser import Recogniser

SIDE, GAP, ROW, BAR = 336, 12, 24, 12  # pixels
NAMES, WIDTH = 110, 2 * SIDE + 3 * GAP - 60  # where the bars of the domains begin and end
INK, SOFT, GRID, COLOUR = "#1c2530", "#667085", "#d5dae0", "#0b63ce"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def explanation(
    model: Recogniser, crop: np.ndarray, names: Sequence[str], block: int = -1
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """(picture, attention (g, g), domain weights (K,)) of one crop, uint8 (112, 112, 3); `names` (K,) are the domains'.

    The attention is that of CLS in one block, the mean over heads; it sums to one minus what CLS gives to itself.
    """
    attention = model.attention(crop[None], block)[0].mean(axis=0)
    weights = model.domain_weights(crop[None])[0]
    face = np.asarray(Image.fromarray(crop).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    bars = dict(zip(names, weights.tolist(), strict=True)) if len(weights) > 1 else {}
    height = SIDE + 3 * GAP + 2 * ROW + ((len(bars) + 2) * ROW if bars else 0)
    sheet = Image.new("RGB", (2 * SIDE + 3 * GAP, height), "white")
    sheet.paste(Image.fromarray(face), (GAP, GAP))
    sheet.paste(Image.fromarray(heat(face, attention)), (SIDE + 2 * GAP, GAP))
    sheet.paste(Image.fromarray(heat_scale(SIDE, BAR)), (SIDE + 2 * GAP, SIDE + GAP + ROW))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    pen.text((GAP, SIDE + GAP + ROW // 2), "the aligned face", INK, font, "lm")
    _scale(pen, font, attention)
    if bars:
        _domains(pen, font, bars, SIDE + 3 * GAP + 2 * ROW)
    return sheet, attention, weights


def _scale(pen: ImageDraw.ImageDraw, font: Font, attention: np.ndarray) -> None:
    """What the colours mean, in % of the attention, with the share of a patch if all were looked at alike."""
    left, top, largest = SIDE + 2 * GAP, SIDE + GAP, float(attention.max())
    pen.text((left, top + ROW // 2), "where CLS looks: a patch's share of its attention", INK, font, "lm")
    even, y = 1 / attention.size, top + ROW + BAR
    pen.text((left, y + 10), "0 %", SOFT, font, "lm")
    pen.text((left + SIDE, y + 10), f"{100 * largest:.1f} %", SOFT, font, "rm")
    if 0.1 * largest < even < 0.6 * largest:
        x = left + round(SIDE * even / largest)
        pen.line((x, y, x, y + 4), SOFT)
        pen.text((x + 4, y + 10), f"all alike: {100 * even:.1f} %", SOFT, font, "lm")


def _domains(pen: ImageDraw.ImageDraw, font: Font, bars: dict[str, float], top: int) -> None:
    """A bar for each domain's weight, over an axis from 0 to 1."""
    pen.text((GAP, top + ROW // 2), "the weights of the domains in this photo", INK, font, "lm")
    first, last = top + ROW, top + ROW * (1 + len(bars))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x = NAMES + round(tick * (WIDTH - NAMES))
        pen.line((x, first, x, last), GRID)
        pen.text((x, last + 10), f"{tick:g}", SOFT, font, "mm")
    for k, (name, weight) in enumerate(bars.items()):
        y = first + ROW * k + ROW // 2
        pen.text((NAMES - 8, y), name, INK, font, "rm")
        pen.rectangle((NAMES, y - 6, NAMES + round(weight * (WIDTH - NAMES)), y + 6), COLOUR)
        pen.text((WIDTH + 52, y), f"{weight:.3f}", INK, font, "rm")
