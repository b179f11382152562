"""Draws the picture of README.md: four photos of one drawn person, where CLS looks, and the domain weights.

    python train.py --exp demo --save-dir runs/demo
    python docs/img/make.py runs/demo docs/img/attention.png

No training has seen this person.
"""

import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitface.data.synthetic.render import render_scenes
from vitface.data.synthetic.worlds import SYNTHETIC, TEST_PEOPLE
from vitface.recogniser import Recogniser, load

PERSON = TEST_PEOPLE.start + 4
PHOTOS = {  # title -> yaw in degrees, age and light (see `render_scenes`), and the seed of everything else
    "frontal": (0, 0.1, 0.1, 11),
    "turned by 65°": (65, 0.1, 0.1, 412),
    "old": (10, 0.95, 0.1, 413),
    "lamp from the side": (-10, 0.1, -0.9, 415),
}
SIDE, GAP, LEFT, TOP, ROW, BAR = 184, 12, 92, 30, 26, 144  # pixels; BAR is a weight of one
TEXT, TRACK, COLOURS = "#333333", "#eeeeee", ("#3b76c4", "#d9822b", "#3d9a5f")


def overlay(crop: np.ndarray, attention: np.ndarray) -> Image.Image:
    """The crop (112, 112, 3) in grey, warm where `attention` (g, g), of any scale, is large."""
    share = Image.fromarray((255 * attention / attention.max()).astype(np.uint8))
    share = share.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grey = Image.fromarray(crop).convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    grey = grey.point(lambda value: 30 + 0.55 * value)
    warm = Image.merge("RGB", [share.point(lambda x: min(255, 1.6 * x)), share.point(lambda x: 0.75 * x), grey])
    return Image.composite(warm, grey.convert("RGB"), share.point(lambda x: 0.8 * x))


def picture(model: Recogniser) -> Image.Image:
    """A column for each photo; rows for the photo, the attention in the last block, and a bar for each domain."""
    *factors, seeds = zip(*PHOTOS.values(), strict=True)
    crops = render_scenes(np.full(len(PHOTOS), PERSON), *map(np.array, factors), np.array(seeds))[0]
    attention, weights = model.attention(crops).mean(axis=1), model.domain_weights(crops)
    names, bars = SYNTHETIC["synthetic"], TOP + 2 * (SIDE + GAP)
    sheet = Image.new("RGB", (LEFT + len(PHOTOS) * (SIDE + GAP), bars + ROW * len(names)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    pen.text((GAP, TOP + SIDE // 2), "photo", TEXT, font, "lm")
    pen.text((GAP, TOP + SIDE + GAP + SIDE // 2), "where\nCLS looks", TEXT, font, "lm")
    for k, name in enumerate(names):
        pen.text((GAP, bars + ROW * k + ROW // 2), name, COLOURS[k], font, "lm")
    for column, title in enumerate(PHOTOS):
        x = LEFT + column * (SIDE + GAP)
        pen.text((x + SIDE // 2, TOP // 2), title, TEXT, font, "mm")
        sheet.paste(Image.fromarray(crops[column]).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, TOP))
        sheet.paste(overlay(crops[column], attention[column]), (x, TOP + SIDE + GAP))
        for k, weight in enumerate(weights[column].tolist()):
            y = bars + ROW * k + ROW // 2
            pen.rounded_rectangle((x, y - 7, x + BAR, y + 7), 3, TRACK)
            pen.rounded_rectangle((x, y - 7, x + round(BAR * weight), y + 7), 3, COLOURS[k])
            pen.text((x + SIDE, y), f"{weight:.2f}", TEXT, font, "rm")
    return sheet.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)


if __name__ == "__main__":
    run, out = sys.argv[1:]
    picture(load(run)).save(out, optimize=True)
    print(f"wrote {out}")
