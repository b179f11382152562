"""Images as a sensor of a known kind would give them: low resolution, blur, JPEG, near infrared.

What happens to an image is a pure function of (seed, epoch, image index), as in `vitface.data.augment`. The host draws
a kind and an amount for each image; the device changes the images of one kind together. Letters: B images, of which b
are of one kind; H the side in pixels, a multiple of 16.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vitface.config import Bounds
from vitface.data.counter import uniform
from vitface.data.preprocess import to_float
from vitface.device import to_device
from vitface.errors import ConfigError, did_you_mean


class Kind(NamedTuple):
    """What the amount of a kind is, its bounds, the usual range in training, and the steps of a curve in evaluation."""

    unit: str
    bounds: Bounds
    usual: tuple[float, float]
    steps: tuple[float, ...]


KINDS = {
    "lowres": Kind("side in pixels", Bounds(least=4, most=112), (12, 28), (8, 12, 16, 20, 24, 32, 48, 64, 112)),
    "blur": Kind("standard deviation in pixels", Bounds(least=0.25, most=16), (1.5, 4), (0.5, 1, 2, 3, 4, 6)),
    "jpeg": Kind("quality", Bounds(least=1, most=100), (3, 15), (1, 2, 5, 10, 20, 50, 90)),
    "nir": Kind("noise in levels of 255", Bounds(least=0, most=128), (8, 24), (0, 8, 16, 32, 64)),
}
WHOLE = ("lowres", "jpeg")  # their amounts are whole numbers
ALL = "all"
INFRARED, GAMMA = (0.8, 0.2, 0.0), 0.6  # the share of red, green and blue in what the sensor "nir" sees


class Sensor(NamedTuple):
    """A kind, and the range from which the amount of each image is drawn."""

    kind: str
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.low:g}" + (f"-{self.high:g}" if self.high > self.low else "")


Sensors = tuple[Sensor, ...]


def parse_sensors(text: str) -> Sensors:
    """The sensors that "lowres:16", "lowres:12-28,nir" or "all" names; a kind alone stands for its usual range."""
    sensors = tuple(map(_parse, KINDS if text == ALL else text.split(",")))
    if len({sensor.kind for sensor in sensors}) < len(sensors):
        raise ConfigError(f"--degrade {text} names a kind twice; one range each, such as lowres:12-28")
    return sensors


def _parse(text: str) -> Sensor:
    name, colon, amount = text.partition(":")
    if name not in KINDS:
        known = f"{', '.join(KINDS)}, {ALL}"
        advice = "; for photos as they are, leave --degrade out" if name == "none" else did_you_mean(name, KINDS)
        raise ConfigError(f"--degrade: unknown kind {name[:40]!r}; known: {known}{advice}")
    kind, ends = KINDS[name], amount.split("-")
    try:
        low, high = (float(ends[0]), float(ends[-1])) if colon else kind.usual
    except ValueError:
        low = high = math.nan
    whole = name not in WHOLE or (low, high) == (low // 1, high // 1)
    if not (len(ends) < 3 and low in kind.bounds and high in kind.bounds and low <= high and whole):
        example = f"{name}:{kind.usual[0]:g} or {name}:{kind.usual[0]:g}-{kind.usual[1]:g}"
        number = "a whole number" if name in WHOLE else "a number"
        raise ConfigError(f"--degrade {text[:40]}: the {kind.unit} is {number}, {kind.bounds}, such as {example}")
    return Sensor(name, low, high)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What happens to B images: `kinds` int64 (B,), 0 for an image as it is, else the number of its sensor, from 1;
    `amounts` (B,); `keys` int64 (B,) for their noise."""

    sensors: Sensors
    kinds: np.ndarray
    amounts: np.ndarray
    keys: np.ndarray

    def __getitem__(self, rows) -> "Drawn":
        return Drawn(self.sensors, self.kinds[rows], self.amounts[rows], self.keys[rows])

    def text(self, row: int) -> str:
        """Names a sensor and its amount, "" for an image as it is."""
        kind = int(self.kinds[row])
        return f"{self.sensors[kind - 1].kind}:{self.amounts[row]:.3g}" if kind else ""


def draw(sensors: Sensors, seed: int, epoch: int, indices: np.ndarray, spared: bool = True) -> Drawn:
    """Draws a sensor for each image index (B,), all equally likely, "as it is" being one of them if `spared`."""
    which, where, noise = uniform(3, seed, epoch, indices, 1).T  # the 1: the augmentation has other numbers
    kinds = (which * (len(sensors) + spared)).astype(np.int64) + (not spared)
    low, high = (np.array([0.0, *(getattr(sensor, end) for sensor in sensors)])[kinds] for end in ("low", "high"))
    whole = np.array([False, *(sensor.kind in WHOLE for sensor in sensors)])[kinds]
    amounts = np.where(whole, np.floor(low + where * (high - low + 1)), low + where * (high - low))
    return Drawn(sensors, kinds, amounts, (noise * 2**53).astype(np.int64))


def degrade(images: Tensor, drawn: Drawn) -> Tensor:
    """float (B, 3, H, H) in [0, 1] -> the same shape; on a GPU without waiting for it."""
    images = images.clone()
    for number, sensor in enumerate(drawn.sensors, 1):
        rows = np.flatnonzero(drawn.kinds == number)
        if len(rows):
            where = to_device(torch.from_numpy(rows), images.device)
            images[where] = CHANGES[sensor.kind](images[where], drawn[rows]).clamp(0, 1)
    return images


def degrade_crops(crops: np.ndarray, sensors: Sensors, indices: np.ndarray) -> np.ndarray:
    """Crops, uint8 (B, H, H, 3), all as `sensors` give them; their indices decide the rest."""
    changed = degrade(to_float(torch.from_numpy(crops)), draw(sensors, 0, 0, indices, spared=False))
    return rearrange(changed.mul_(255).round_().byte(), "b c h w -> b h w c").contiguous().numpy()


def _low_resolution(images: Tensor, drawn: Drawn) -> Tensor:
    maps = torch.stack([_to_side_and_back(images.shape[-1], int(side), images.device) for side in drawn.amounts])
    return maps[:, None] @ images @ maps.mT[:, None]


@functools.cache
def _to_side_and_back(side: int, low: int, device: torch.device) -> Tensor:
    """The map of a column of pixels to `low` pixels and back, (H, H): bicubic with antialias, as Pillow resizes."""
    resized = functools.partial(F.interpolate, mode="bicubic", antialias=True)
    return resized(resized(torch.eye(side)[None, None], size=(low, side)), size=(side, side))[0, 0].to(device)


def _blur(images: Tensor, drawn: Drawn) -> Tensor:
    """A Gaussian; at the border its weights inside the image add up to one."""
    distance = torch.arange(images.shape[-1]) - torch.arange(images.shape[-1])[:, None]
    sigma = torch.from_numpy(drawn.amounts.astype(np.float32))[:, None, None]
    maps = to_device((-0.5 * (distance / sigma).square()).softmax(dim=2), images.device)
    return maps[:, None] @ images @ maps.mT[:, None]


def _near_infrared(images: Tensor, drawn: Drawn) -> Tensor:
    """One channel, brightened by a gamma, with Gaussian noise; it is shown in all three."""
    shares = to_device(torch.tensor(INFRARED), images.device)
    seen = (images * shares[:, None, None]).sum(dim=1, keepdim=True).clamp(0, 1) ** GAMMA
    side = images.shape[-1]
    radius, angle = np.split(uniform(side * side, drawn.keys), 2, axis=1)  # Box and Muller 1958
    radius = np.sqrt(-2 * np.log1p(-radius)) * drawn.amounts[:, None] / 255
    noise = np.concatenate([radius * np.cos(2 * np.pi * angle), radius * np.sin(2 * np.pi * angle)], axis=1)
    noise = torch.from_numpy(noise.astype(np.float32)).view(-1, 1, side, side)
    return (seen + to_device(noise, images.device)).expand_as(images)


def _jpeg(images: Tensor, drawn: Drawn) -> Tensor:
    """Baseline JPEG with chroma at half the resolution, but for the lossless part, which changes no pixel."""
    to_ycc, to_rgb = _to_ycc_and_back(images.device)
    constant = to_device(torch.tensor([0.0, 128, 128]).view(3, 1, 1), images.device)
    ycc = (torch.einsum("yr,brhw->byhw", to_ycc, (255 * images).round()) + constant).round() - 128
    scale = np.where(drawn.amounts < 50, 5000 // drawn.amounts, 200 - 2 * drawn.amounts)[:, None]
    steps = [np.clip((table * scale + 50) // 100, 1, 255).astype(np.float32) for table in (LUMA_STEPS, CHROMA_STEPS)]
    luma, chroma = (
        _coded(channels, to_device(torch.from_numpy(step), images.device)[:, None])
        for channels, step in zip((ycc[:, :1], F.avg_pool2d(ycc[:, 1:], 2)), steps, strict=True)
    )
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear")  # the triangle filter of libjpeg
    ycc = torch.cat([luma, chroma], dim=1) + (128 - constant)
    return torch.einsum("ry,byhw->brhw", to_rgb, ycc) / 255


def _coded(channels: Tensor, steps: Tensor) -> Tensor:
    """Channels (b, c, H, H) around zero, with each coefficient of their blocks rounded to its step (b, 1, 64)."""
    transform, rows = _block_transform(channels.device), channels.shape[-1] // 8
    blocks = rearrange(channels, "b c (y v) (x u) -> b (c y x) (v u)", v=8, u=8)
    blocks = ((blocks @ transform.mT / steps).round() * steps) @ transform
    channels = rearrange(blocks, "b (c y x) (v u) -> b c (y v) (x u)", y=rows, x=rows, u=8)
    return channels.round().clamp(-128, 127)


@functools.cache
def _block_transform(device: torch.device) -> Tensor:
    """The two-dimensional DCT of 8 x 8 pixels, row by row, orthonormal, (64, 64)."""
    k, n = np.arange(8)[:, None], np.arange(8)
    dct = np.cos((2 * n + 1) * k * np.pi / 16) * np.where(k == 0, np.sqrt(1 / 8), 0.5)
    return torch.from_numpy(np.kron(dct, dct).astype(np.float32)).to(device)


@functools.cache
def _to_ycc_and_back(device: torch.device) -> tuple[Tensor, Tensor]:
    """RGB -> luma and the two chroma channels of JFIF, (3, 3), and its inverse."""
    red, blue = 0.299, 0.114
    luma = torch.tensor([red, 1 - red - blue, blue])
    chroma = [(torch.eye(3)[2] - luma) / (2 * (1 - blue)), (torch.eye(3)[0] - luma) / (2 * (1 - red))]
    to_ycc = torch.stack([luma, *chroma])
    return to_ycc.to(device), torch.linalg.inv(to_ycc).to(device)  # of a matrix on a GPU, inv would wait for it


# the steps of ITU-T T.81, annex K, row by row, for quality 50
LUMA_STEPS = np.fromstring(
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99",
    sep=" ",
)
CHROMA_STEPS = np.full((8, 8), 99.0)
CHROMA_STEPS[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
CHROMA_STEPS = CHROMA_STEPS.ravel()
CHANGES = {"lowres": _low_resolution, "blur": _blur, "jpeg": _jpeg, "nir": _near_infrared}
