"""A picture of one face with the model's attention and the domain weights of its router."""

import numpy as np
from PIL import Image, ImageDraw

from vitface.evaluation.plots import heat
from vitface.recogniser import Recogniser

SIDE, GAP, ROW = 336, 12, 22  # pixels


def explanation(model: Recogniser, crop: np.ndarray, block: int = -1) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """(picture, attention (g, g), domain weights (K,)) of one crop, uint8 (112, 112, 3).

    The attention is that of CLS in one block, the mean over heads; it sums to one minus what CLS gives to itself.
    """
    attention = model.attention(crop[None], block)[0].mean(axis=0)
    weights = model.domain_weights(crop[None])[0]
    face = np.asarray(Image.fromarray(crop).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    bars = weights if len(weights) > 1 else weights[:0]
    sheet = Image.new("RGB", (2 * SIDE + 3 * GAP, SIDE + 2 * GAP + ROW * (1 + len(bars))), "white")
    sheet.paste(Image.fromarray(face), (GAP, GAP))
    sheet.paste(Image.fromarray(heat(face, attention)), (SIDE + 2 * GAP, GAP))
    draw, top = ImageDraw.Draw(sheet), SIDE + GAP + 4
    draw.text((GAP, top), "what the model sees", fill="black")
    draw.text((SIDE + 2 * GAP, top), "bright: where CLS looks", fill="black")
    for k, weight in enumerate(bars):
        y = top + ROW * (k + 1)
        draw.text((GAP, y), f"domain {k}: {weight:.3f}", fill="black")
        draw.rectangle((GAP + 110, y, GAP + 110 + round(float(weight) * (2 * SIDE - 110)), y + 12), fill="#0b63ce")
    return sheet, attention, weights
