"""A tour of the commands over a training set of any size: time and memory of each stage, and what grows too fast.

    python benchmarks/scale.py --images 6000 50000 490623 --work /scratch/tour
    python benchmarks/scale.py --images 490623 --set data/casia-webface --work /scratch/tour

For each number of images a set of drawn people is written (or that of --set is taken), and each stage is a command of
its own: data check, data show, data pack (killed half way, then resumed), a training that packs first (cold), one that
finds the packed images (warm), its resume, one with --no-pack, embed of a folder of all images, search, cluster and
export. Trainings see 512 images, so that their time is that of beginning and ending. Memory is that of the largest
process without mapped files, looked at 50 times a second. Between two sizes, a stage grows faster than the data if its
time does by more than n log n and a fifth, or its memory by more than the data. The last line is JSON: {images: {stage:
{seconds, gigabytes}}}.
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from timing import machine

from vitface.data.formats.record_set import RecordSamples
from vitface.data.formats.recordio import MAGIC, read_record
from vitface.data.images import CROP_SIZE, encode_image
from vitface.data.synthetic.worlds import SyntheticSamples

PER_PERSON = 46  # as CASIA-WebFace
DRAWN_PEOPLE, DRAWN_IMAGES = 200, 4
SLOW = 5.0  # seconds, below which growth is not judged
Figures = dict[str, float]


def make_set(folder: Path, images: int) -> None:
    """Writes train.rec and train.idx of `images` images of images / PER_PERSON people, no two of them equal.

    A person is one of DRAWN_PEOPLE in a colour of its own, an image one of DRAWN_IMAGES of that one in a little light.
    """
    drawn = SyntheticSamples(DRAWN_PEOPLE, DRAWN_IMAGES)
    crops = np.stack([drawn.read(i) for i in range(len(drawn))]).astype(np.float32)
    folder.mkdir(parents=True)
    offset = 0
    with open(folder / "train.rec", "wb") as rec, open(folder / "train.idx", "w") as idx:
        for number in range(images):
            person = number // PER_PERSON
            rng = np.random.default_rng([person // DRAWN_PEOPLE, 1])
            crop = crops[person % DRAWN_PEOPLE * DRAWN_IMAGES + number % DRAWN_IMAGES] * rng.uniform(0.7, 1.2, 3)
            crop += np.random.default_rng(number).uniform(-20, 20, 3)
            image = encode_image(crop.clip(0, 255).astype(np.uint8), "JPEG", quality=92)
            payload = struct.pack("<IfQQ", 0, person, number, 0) + image
            rec.write(struct.pack("<II", MAGIC, len(payload)) + payload + bytes(-len(payload) % 4))
            idx.write(f"{number}\t{offset}\n")
            offset += 8 + (len(payload) + 3) // 4 * 4


def unpack(source: Path, folder: Path) -> None:
    """Writes the images of a RecordIO set as files, a folder per person."""
    samples = RecordSamples(source)
    data = samples._data()
    for name in samples.names:
        (folder / name).mkdir(parents=True)
    for number, (label, offset) in enumerate(zip(samples.labels, samples._offsets, strict=True)):
        image = read_record(data, int(offset), samples.where(number)).image
        (folder / samples.names[label] / f"{number:07d}.jpg").write_bytes(image)


def measure(arguments: list[str], work: Path, kill_at: int = 0) -> tuple[Figures, int]:
    """Runs `vitface ARGUMENTS` in `work`; its figures, and its exit code, negative where it was killed.

    With `kill_at` it is killed as soon as a file of pixels in `work` has that many bytes.
    """
    environment = {**os.environ, "VITFACE_HOME": str(work / "home")}
    start = time.perf_counter()
    with open(work / "output.txt", "a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vitface", *arguments],
            cwd=work,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        most = 0
        while process.poll() is None:
            time.sleep(0.02)
            most = max(most, resident(process.pid))
            if kill_at and packed_bytes(work) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
    return {"seconds": time.perf_counter() - start, "gigabytes": most / 1e9}, process.returncode


def resident(pid: int | str) -> int:
    """The most bytes that a process, or one of those that it started, has for itself; 0 if it is gone.

    Pages of mapped files are left out: the packed pixels of a set are the system's cache, which it takes back.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    own = sum(int(kilobytes) for kilobytes in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", status))
    return max([1024 * own, *map(resident, children)])


def packed_bytes(work: Path) -> int:
    """The bytes of the pixels that `data pack` has written so far."""
    return max((file.stat().st_size for file in work.glob("*packed*/images.uint8*")), default=0)


def stages(source: Path, photos: Path, images: int) -> Iterator[tuple[str, list[str], int]]:
    """(Name, arguments, at how many bytes it is killed or 0) of each stage, in their order."""
    train = ["train", "--train-data", str(source), "--backbone", "vit_nano", "--image-size", "112"]
    train += ["--max-samples", "512", "--batch-size", "64", "--epochs", "1"]
    half = images * CROP_SIZE * CROP_SIZE * 3 // 2
    yield "data check", ["data", "check", str(source)], 0
    yield "data show", ["data", "show", str(source)], 0
    yield "data pack, killed half way", ["data", "pack", str(source), "packed"], half
    yield "data pack, resumed", ["data", "pack", str(source), "packed"], 0
    yield "train, cold", [*train, "--save-dir", "cold"], 0
    yield "train, warm", [*train, "--save-dir", "warm"], 0
    yield "resume", [*train[:-1], "2", "--save-dir", "warm", "--resume", "auto", "--allow-changed"], 0
    yield "train --no-pack", [*train, "--save-dir", "decoded", "--no-pack"], 0
    yield "embed", ["embed", str(photos), "people", "--checkpoint", "warm", "--no-align"], 0
    first = str(next(photos.glob("*/*.jpg")))
    yield "search", ["search", "people", first, "--checkpoint", "warm", "--no-align", "--threshold", "0"], 0
    yield "cluster", ["cluster", "people", "--threshold", "0.9", "--out", "people.csv"], 0
    yield "export", ["export", "warm", "--format", "merged", "--out", "merged"], 0


def tour(images: int, work: Path, source: Path | None) -> dict[str, Figures]:
    """The figures of each stage at a number of images; RuntimeError with the end of the output where one fails."""
    work.mkdir(parents=True)
    if source is None:
        make_set(source := work / "set", images)
    photos = work / "photos"
    unpack(source, photos)
    found = {}
    for name, arguments, kill_at in stages(source.resolve(), photos, images):
        found[name], code = measure(arguments, work, kill_at)
        if code not in (0, 1) and not kill_at:
            raise RuntimeError(f"{name} ended with {code}:\n{(work / 'output.txt').read_text()[-2000:]}")
        print(
            f"{images:>9,}  {name:<28} {found[name]['seconds']:>9.1f} s {found[name]['gigabytes']:>7.2f} GB", flush=True
        )
    return found


def grows(results: dict[int, dict[str, Figures]]) -> Iterator[str]:
    """A line for each stage whose time or memory grows faster than the data, between two sizes."""
    sizes = sorted(results)
    for small, large in itertools.pairwise(sizes):
        allowed = large * math.log(large) / (small * math.log(small))
        for name, after in results[large].items():
            before = results[small][name]
            times = after["seconds"] / before["seconds"]
            if after["seconds"] > SLOW and times > 1.2 * allowed:
                yield f"{name}: {times:.1f} times the seconds, for {large / small:.1f} times the images ({large:,})"
            memory = after["gigabytes"] / max(before["gigabytes"], 0.01)
            if memory > large / small:
                yield f"{name}: {memory:.1f} times the memory, for {large / small:.1f} times the images ({large:,})"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[6000, 50_000, 490_623])
    parser.add_argument("--set", type=Path, metavar="SET", help="an InsightFace folder of that many images; one size")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="a new folder, 100 kB for each image")
    arguments = parser.parse_args(argv)
    if arguments.set and len(arguments.images) > 1:
        parser.error("--set is one set: name its one size with --images")
    print(machine())
    results = {
        images: tour(images, arguments.work.resolve() / str(images), arguments.set) for images in arguments.images
    }
    print("\n".join(grows(results)) or "nothing grows faster than the data")
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
