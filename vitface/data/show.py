"""A contact sheet of training images, as they are stored and after augmentation."""

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from vitface.data.augment import augment, plan, uniforms
from vitface.data.degrade import Sensors, degrade, draw
from vitface.data.formats.stored import Samples
from vitface.data.preprocess import resize, to_float
from vitface.errors import ConfigError

GAP, CAPTION = 4, 14  # pixels
MAX_PIXELS = 50_000_000  # of a sheet


def contact_sheet(
    samples: Samples, count: int, policy: str, epochs: int, side: int, seed: int, sensors: Sensors = ()
) -> Image.Image:
    """A row for each of `count` images, drawn by `seed`: the image as it is stored, then as each epoch degrades it by
    one of the `sensors`, whose name is written on it, and augments it.

    Every image is resized to `side` pixels as the model does it (bicubic). ConfigError for too few or too many.
    """
    if min(count, epochs, side) < 1:
        raise ConfigError("a sheet needs at least one image, one epoch and a side of one pixel")
    pixels = min(count, len(samples)) * (epochs + 1) * side**2
    if pixels > MAX_PIXELS:
        raise ConfigError(f"a sheet of {pixels:,} pixels; lower --count, --epochs or --image-size")
    indices = np.sort(np.random.default_rng([seed, 4]).permutation(len(samples))[:count])
    crops = to_float(torch.from_numpy(np.stack([samples.read(int(i)) for i in indices])))
    drawn = [draw(sensors, seed, epoch, indices) for epoch in range(epochs)]
    planned = [plan(uniforms(seed, epoch, indices)) for epoch in range(epochs)]
    columns = [augment(degrade(crops, drawn[epoch]), planned[epoch], policy) for epoch in range(epochs)]
    shown = torch.stack([resize(column, side, "bicubic") for column in (crops, *columns)]).clamp(0, 1)
    cells = rearrange(shown.mul(255).round().byte(), "columns rows c h w -> rows columns h w c").numpy()
    sheet = Image.new("RGB", ((epochs + 1) * (side + GAP) - GAP, len(indices) * (side + GAP + CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, index in enumerate(indices.tolist()):
        top = row * (side + GAP + CAPTION)
        pen.text((0, top), f"{samples.names[samples.labels[index]]}, image {index}", fill="black")
        for column, cell in enumerate(cells[row]):
            left = column * (side + GAP)
            sheet.paste(Image.fromarray(cell), (left, top + CAPTION))
            name = drawn[column - 1].text(row) if column else ""
            pen.text((left + 2, top + side), name, fill="white", stroke_width=1, stroke_fill="black")
    return sheet
