"""A contact sheet of training images, as they are stored and after augmentation."""

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw

from vitface.data.augment import augment, plan, uniforms
from vitface.data.formats.stored import Samples
from vitface.data.preprocess import resize, to_float
from vitface.errors import ConfigError

GAP, CAPTION = 4, 14  # pixels
MAX_PIXELS = 50_000_000  # of a sheet


def contact_sheet(samples: Samples, count: int, policy: str, epochs: int, side: int, seed: int) -> Image.Image:
    """A row for each of `count` images, drawn by `seed`: the image as it is stored, then as each epoch augments it.

    Every image is resized to `side` pixels as the model does it (bicubic). ConfigError for too few or too many.
    """
    if min(count, epochs, side) < 1:
        raise ConfigError("a sheet needs at least one image, one epoch and a side of one pixel")
    pixels = min(count, len(samples)) * (epochs + 1) * side**2
    if pixels > MAX_PIXELS:
        raise ConfigError(f"a sheet of {pixels:,} pixels; lower --count, --epochs or --image-size")
    indices = np.sort(np.random.default_rng([seed, 4]).permutation(len(samples))[:count])
    crops = to_float(torch.from_numpy(np.stack([samples.read(int(i)) for i in indices])))
    columns = [crops, *(augment(crops, plan(uniforms(seed, epoch, indices)), policy) for epoch in range(epochs))]
    shown = torch.stack([resize(column, side, "bicubic") for column in columns]).clamp(0, 1)
    cells = rearrange(shown.mul(255).round().byte(), "columns rows c h w -> rows columns h w c").numpy()
    sheet = Image.new("RGB", (len(columns) * (side + GAP) - GAP, len(indices) * (side + GAP + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, index in enumerate(indices.tolist()):
        top = row * (side + GAP + CAPTION)
        draw.text((0, top), f"{samples.names[samples.labels[index]]}, image {index}", fill="black")
        for column, cell in enumerate(cells[row]):
            sheet.paste(Image.fromarray(cell), (column * (side + GAP), top + CAPTION))
    return sheet
