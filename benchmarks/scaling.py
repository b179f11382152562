"""The arithmetic of memory and time beyond one GPU: python benchmarks/scaling.py prints the tables of docs/scaling.md.

Bytes are computed: of the model as `build_model` builds it, of the identity matrix, and of what autograd saves for one
image, measured on two (vitface.training.memory). Seconds need measured rates of one device: pass --images-per-second
and --head-tflops. Letters: W GPUs, b images of a GPU in a pass, C identities, E embedding, T trained parameters beside
the identity matrix.
"""

import argparse
from dataclasses import dataclass

from vitface.config import resolve
from vitface.model.counts import parameter_counts
from vitface.training.memory import plan_memory
from vitface.training.ranks.identities import CHUNK
from vitface.training.setup import build_margin, build_model

GB, MB, E = 10**9, 10**6, 512
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Dataset:
    images: int
    identities: int


# as InsightFace distributes or configures them (arcface_torch/configs)
DATASETS = {
    "CASIA-WebFace": Dataset(490_623, 10_572),
    "WebFace4M": Dataset(4_235_242, 205_990),
    "WebFace42M": Dataset(42_474_557, 2_059_906),
}
GPUS = (1, 8, 16, 32, 64)
IMAGE_BYTES = 112 * 112 * 3  # packed


@dataclass(frozen=True)
class Rates:
    """Of one GPU: images/s through the adapted backbone both ways, FLOP/s of the head, bytes/s it can send."""

    images: float
    head_flops: float
    bandwidth: float


@dataclass(frozen=True)
class Model:
    """A face model's bytes: `frozen` once, `trained` parameters T, `per_image` what a pass keeps of an image."""

    name: str
    frozen: int
    trained: int
    per_image: int


def measure(backbone: str) -> Model:
    """The default recipe (LoRA r 16, head patches, bf16) around random weights; the bytes do not depend on them."""
    config = resolve({"backbone": backbone, "weights": "random", "dtype": "bf16", "device": "cpu"})
    model, margin = build_model(config), build_margin(config, 2)
    trained = parameter_counts(model)["all"][1]
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    return Model(backbone, frozen, trained, plan_memory(model, margin, 1, None).per_image)


def identity_bytes(identities: int, gpus: int, rate: float) -> int:
    """A GPU's share of the prototypes, gradients and moments; sampled, the gradients and copies are of those drawn."""
    share = -(-identities // gpus) * E * FLOAT
    return 4 * share if rate == 1 else round(3 * share + 4 * rate * share)


def logit_bytes(identities: int, gpus: int, images: int) -> int:
    """Of one matrix of logits, a chunk's; `images` are those of all GPUs."""
    return images * min(-(-identities // gpus), CHUNK) * FLOAT


def gpu_bytes(model: Model, identities: int, gpus: int, images_per_gpu: int, rate: float) -> int:
    """What a GPU holds in a step: backbone, trained parameters with gradients and moments, identities, activations."""
    batch = images_per_gpu * gpus
    head = 3 * logit_bytes(identities, gpus, batch) + 4 * batch * E * FLOAT  # logits, embeddings
    activations = images_per_gpu * model.per_image
    return model.frozen + 4 * FLOAT * model.trained + identity_bytes(identities, gpus, rate) + head + activations


def traffic_bytes(model: Model, gpus: int, images_per_gpu: int) -> tuple[int, int]:
    """What a GPU sends in a step: (gradients of T by a ring all-reduce, embeddings and their gradients)."""
    if gpus == 1:
        return 0, 0
    ring = 2 * (gpus - 1) / gpus
    embeddings = images_per_gpu * gpus * E * FLOAT
    return round(ring * FLOAT * model.trained), round((gpus - 1) / gpus * embeddings + ring * embeddings)


def head_flops(identities: int, images_per_gpu: int, rate: float) -> float:
    """Of a GPU in a step, for any W: four products (forward, again backward, two gradients) of B x E with E x C / W."""
    return 4 * 2 * images_per_gpu * E * identities * rate


def step_seconds(model: Model, identities: int, gpus: int, images_per_gpu: int, rate: float, rates: Rates) -> float:
    """Backbone, head and traffic one after the other: none of the traffic is hidden."""
    head = head_flops(identities, images_per_gpu, rate) / rates.head_flops
    traffic = sum(traffic_bytes(model, gpus, images_per_gpu)) / rates.bandwidth
    return images_per_gpu / rates.images + head + traffic


def memory_table(models: list[Model], images_per_gpu: int) -> str:
    lines = [
        f"| backbone | data | {' | '.join(f'{n} GPUs' for n in GPUS)} |",
        f"|---|---|{'---|' * len(GPUS)}",
    ]
    for model in models:
        for name, data in DATASETS.items():
            for rate in (1.0, 0.1) if data.identities > 10**6 else (1.0,):
                cells = [f"{gpu_bytes(model, data.identities, n, images_per_gpu, rate) / GB:.1f}" for n in GPUS]
                label = name if rate == 1 else f"{name}, rate {rate}"
                lines.append(f"| {model.name} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def traffic_table(models: list[Model], images_per_gpu: int) -> str:
    lines = [f"| backbone | {' | '.join(f'{n} GPUs' for n in GPUS[1:])} |", f"|---|{'---|' * len(GPUS[1:])}"]
    for model in models:
        cells = [" + ".join(f"{x / MB:.0f}" for x in traffic_bytes(model, n, images_per_gpu)) for n in GPUS[1:]]
        lines.append(f"| {model.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def time_table(model: Model, images_per_gpu: int, rates: Rates) -> str:
    """Hours of an epoch."""
    lines = [f"| data | {' | '.join(f'{n} GPUs' for n in GPUS)} |", f"|---|{'---|' * len(GPUS)}"]
    for name, data in DATASETS.items():
        sampled = 0.1 if data.identities > 10**6 else 1.0
        steps = [data.images / (n * images_per_gpu) for n in GPUS]
        seconds = [step_seconds(model, data.identities, n, images_per_gpu, sampled, rates) for n in GPUS]
        hours = [count * each / 3600 for count, each in zip(steps, seconds, strict=True)]
        lines.append(f"| {name} | {' | '.join(f'{each:.2f}' for each in hours)} |")
    return "\n".join(lines)


def disk_table() -> str:
    lines = [
        "| data | images | identities | packed images, GB | a checkpoint's identities, GB |",
        "|---|---|---|---|---|",
    ]
    for name, data in DATASETS.items():
        packed, checkpoint = data.images * IMAGE_BYTES / GB, 3 * data.identities * E * FLOAT / GB
        lines.append(f"| {name} | {data.images:,} | {data.identities:,} | {packed:,.0f} | {checkpoint:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images-per-gpu", type=int, default=128)
    parser.add_argument("--images-per-second", type=float, help="of training on one GPU, measured")
    parser.add_argument("--head-tflops", type=float, help="of fp32 matrix products on one GPU, measured")
    parser.add_argument(
        "--bandwidth", type=float, default=25, help="GB/s that a GPU sends at (default: 25, a 200 Gb/s link)"
    )
    arguments = parser.parse_args()
    models = [measure(backbone) for backbone in ("dinov2_vits14", "clip_vitb16")]
    print(disk_table(), memory_table(models, arguments.images_per_gpu), sep="\n\n")
    print("", traffic_table(models, arguments.images_per_gpu), sep="\n")
    if arguments.images_per_second and arguments.head_tflops:
        rates = Rates(arguments.images_per_second, arguments.head_tflops * 1e12, arguments.bandwidth * GB)
        print("", time_table(models[0], arguments.images_per_gpu, rates), sep="\n")


if __name__ == "__main__":
    main()
