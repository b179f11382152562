"""Does `vitface embed` keep the model busy? Its rate beside that of embedding images that are in memory.

    python benchmarks/embed_folder.py [--images 2000] [--rounds 3] [--source FOLDER]

The folder holds JPEG crops: those of --source, drawn faces without it. Both ways embed the same images by one model
with random weights (ViT-S/14 with LoRA at 224 px unless changed; flip-sum), and take turns. The folder's time has
everything from the listing of the files to the written gallery, only loading the model is left out. First it is
asserted that both give the same embeddings. The last line is JSON, with the ratio of the median rates.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from timing import interleave, machine

from vitface.config import FaceConfig
from vitface.data.faces.folder import write_crop
from vitface.data.faces.photos import CropReader
from vitface.data.folders import find_images
from vitface.data.images import read_image, to_crop
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.device import resolve_device, resolve_dtype
from vitface.gallery.from_folder import embed_folder
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import Settings
from vitface.model.face import FaceModel
from vitface.presets import backbone_name
from vitface.recogniser import Recogniser
from vitface.store.backbone import load_backbone

DRAWN = 256  # faces that are drawn; more images are copies of them


def write_folder(source: Path | None, count: int, folder: Path) -> None:
    """`count` JPEG crops of quality 95."""
    if source is None:
        samples = SyntheticSamples(DRAWN // 8, 8)
        crops = [samples.read(i) for i in range(min(DRAWN, count))]
    else:
        crops = [to_crop(read_image(source / name), name) for name in find_images(source).images[:count]]
    for i in range(count):
        write_crop(folder / f"{i:06d}.jpg", crops[i % len(crops)])


def random_model(backbone: str, image_size: int, device: str) -> Recogniser:
    where = resolve_device(device)
    vit = load_backbone(backbone, "random", image_size)
    config = FaceConfig(
        backbone_name(backbone),
        "random",
        vit.config,
        image_size,
        lora_rank=16,
        head="bn",
        dtype=resolve_dtype("auto", where, vit.config.embed_dim),
    )
    return Recogniser(FaceModel(vit, config).eval()).to(where).prepare()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", default="dinov2")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--source", type=Path, metavar="FOLDER", help="square crops; default: drawn faces")
    parser.add_argument("--num-workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    model = random_model(arguments.backbone, arguments.image_size, arguments.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder, number = Path(temporary) / "faces", iter(range(1000))
        write_folder(arguments.source, arguments.images, folder)
        images = np.stack([read_image(folder / name) for name in find_images(folder).images])

        def from_folder() -> Path:
            out = Path(temporary) / f"gallery-{next(number)}"
            embed_folder(model, folder, out, Settings(), CropReader(), arguments.num_workers)
            return out

        pure = model.embed(images)
        assert (np.sum(Gallery.load(from_folder()).embeddings * pure, axis=1) > 0.999).all()
        steps = {"folder": from_folder, "pure": lambda: model.embed(images)}
        rates = interleave(steps, arguments.images, arguments.rounds, warmup=0)
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{machine()}, {model.config.dtype}; {arguments.images:,} images, img/s (min to max)")
    for name, values in rates.items():
        print(f"{name:<7} {median[name]:>8.2f} ({min(values):.2f} to {max(values):.2f})")
    print(json.dumps({"images": arguments.images, "ratio_to_pure": round(median["folder"] / median["pure"], 4)}))


if __name__ == "__main__":
    main()
