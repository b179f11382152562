"""Does training ever wait for its data? Images per second and core of the loader, and the share of a step it waits.

    python benchmarks/data.py [--train-data DIR]

The usual way is PIL decode, bicubic resize to 224, ToTensor, Normalize in a DataLoader, in one process. It is compared
with decoding crops on the fly, in one process too, and with reading packed ones, each in shuffled batches of 128. They
take turns in several rounds; the figures are medians. The last line is JSON: both ratios, and the share of the time
for which training steps of ViT-S waited for packed data.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitface.config import resolve
from vitface.data.augment import plan, uniforms
from vitface.data.formats.packed import PackedSamples
from vitface.data.formats.packing import pack
from vitface.data.formats.samples import FolderSamples, load_samples
from vitface.data.formats.stored import Samples
from vitface.data.loader import epoch_order, read_batches
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.presets import IMAGENET_MEAN, IMAGENET_STD
from vitface.training.batches import Batch, training_input
from vitface.training.loss_scale import LossScale
from vitface.training.setup import build_margin, build_model, resolve_choices
from vitface.training.step import make_optimizer, total_loss, update

FACES, BATCH, ROUNDS = 1024, 128, 5
USUAL_IMAGES, DECODED_IMAGES, PACKED_IMAGES = 256, 1024, 12_288  # per round
STEPS, STEP_BATCH = 6, 16


class UsualWay(Dataset):
    """What a user writes: a file -> float (3, 224, 224), normalised."""

    def __init__(self, files: list[Path]):
        self.encoded = [file.read_bytes() for file in files]
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(BytesIO(self.encoded[index])).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return (pixels - self.mean) / self.std


def jpeg_folder(train_data: str | None, root: Path) -> FolderSamples:
    """FACES crops of the training set (drawn ones without it) as JPEG files of quality 95."""
    samples = load_samples(train_data) if train_data else SyntheticSamples(FACES // 16, 16)
    for i in np.linspace(0, len(samples) - 1, min(FACES, len(samples))).astype(int).tolist():
        folder = root / f"{samples.labels[i]:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(samples.read(i)).save(folder / f"{i:08d}.jpg", quality=95)
    return FolderSamples(root)


def shuffled(count: int, available: int, seed: int) -> list[np.ndarray]:
    """Batches of `count` images in all, of which `available` differ."""
    epochs = [epoch_order(available, seed, epoch) for epoch in range(-(-count // available))]
    return np.split(np.concatenate(epochs)[:count], range(BATCH, count, BATCH))


def rate(batches: Iterable[Tensor]) -> float:
    """Images per second."""
    started = time.perf_counter()
    return sum(len(images) for images in batches) / (time.perf_counter() - started)


def readers(folder: FolderSamples, packed: PackedSamples) -> dict[str, Callable[[int], float]]:
    """Name -> a function of the round's number that times a way of reading."""
    usual = UsualWay([Path(folder.where(i)) for i in range(min(USUAL_IMAGES, len(folder)))])

    def ours(samples: Samples, count: int, seed: int) -> float:
        positions = shuffled(count, len(samples), seed)
        return rate(images for _, images in read_batches(samples, np.arange(len(samples)), positions))

    return {
        "usual way": lambda seed: rate(DataLoader(usual, batch_size=BATCH, shuffle=True)),
        "decode on the fly": lambda seed: ours(folder, DECODED_IMAGES, seed),
        "packed": lambda seed: ours(packed, PACKED_IMAGES, seed),
    }


def wait_share(packed: PackedSamples) -> float:
    """The share of STEPS training steps of DINOv2's ViT-S, 224 px, random weights, spent waiting for a batch."""
    config = resolve_choices(resolve({"weights": "random", "batch_size": STEP_BATCH, "device": "cpu"}))
    model, margin = build_model(config), build_margin(config, len(packed.names))
    optimizer, scale = make_optimizer(model, margin, config), LossScale(False, torch.device("cpu"))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = shuffled((STEPS + 1) * STEP_BATCH, len(packed), 0)
    batches = read_batches(packed, np.arange(len(packed)), np.split(np.concatenate(order), STEPS + 1))
    waited = started = 0.0
    for step in range(STEPS + 1):
        if step == 1:  # the first one warms up
            waited, started = 0.0, time.perf_counter()
        asked = time.perf_counter()
        where, images = next(batches)
        waited += time.perf_counter() - asked
        inputs, labels = (
            training_input(model, images, plan(uniforms(0, 0, where)), config.augment),
            packed.labels[where],
        )
        loss = total_loss(model, margin, Batch(inputs, torch.from_numpy(labels), None, labels), config)["loss"]
        update(optimizer, loss, trained, config.clip_grad, scale)
        optimizer.zero_grad(set_to_none=True)
    return waited / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-data", metavar="DIR", help="take the images from there; default: drawn faces")
    arguments = parser.parse_args()
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder = jpeg_folder(arguments.train_data, Path(temporary) / "faces")
        packed = pack(folder, Path(temporary) / "packed")
        torch.set_num_threads(1)
        rates: dict[str, list[float]] = {}
        for seed in range(ROUNDS):
            for name, read in readers(folder, packed).items():
                rates.setdefault(name, []).append(read(seed))
        median = {name: statistics.median(values) for name, values in rates.items()}
        for name, value in median.items():
            print(f"{name:<18} {value:>10,.0f} img/s {value / median['usual way']:>7.1f}x")
        torch.set_num_threads(cores)
        waits = wait_share(packed)
        print(f"a training step of ViT-S waits for packed data {waits:.2%} of its time")
    figures = {
        "packed_ratio": median["packed"] / median["usual way"],
        "decode_ratio": median["decode on the fly"] / median["usual way"],
        "wait_share": waits,
    }
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}))


if __name__ == "__main__":
    main()
