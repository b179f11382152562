"""Make a face model from adapters that PEFT trained."""

import argparse
import dataclasses
import sys
from pathlib import Path

from vitface.config import VIT_ALIASES, VIT_PRESETS, FaceConfig, backbone_name
from vitface.errors import ConfigError, ExchangeError, exit_code
from vitface.exchange.bundle import face_files, write_folder
from vitface.exchange.from_peft import read_domains
from vitface.model.face import FaceModel
from vitface.store.backbones import find_backbone, load_backbone, weights_sha256
from vitface.store.faces import backbone_of, find_checkpoint, load_face, trained_tensors

EXAMPLES = """examples:
  python -m vitface import-peft adapter --backbone dinov2 --out models/a       the embedding is the adapted CLS token
  python -m vitface import-peft tuned --into runs/a --out models/a-tuned       new adapters; head and router of runs/a

ADAPTER is a folder with adapter_config.json and adapter_model.safetensors, in the names of timm or transformers, or one
with domain-0, domain-1, ... of them, as `export --format peft-timm` writes for DA-LoRA.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m vitface import-peft", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="PEFT folder, or a folder of domain-0, domain-1, ...")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the face model; vitface.load and --checkpoint take it",
    )
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--into", type=Path, metavar="CHECKPOINT", help="face model whose adapters are replaced")
    base.add_argument("--backbone", choices=[*VIT_ALIASES, *VIT_PRESETS], help="frozen backbone, without a head")
    add("--weights", metavar="FILE", help="converted backbone file; default: look in the usual places")
    add("--image-size", type=int, help="input side in pixels, with --backbone only (default: 224)")
    return parser


def import_peft(arguments: argparse.Namespace) -> None:
    if arguments.into and arguments.image_size:
        raise ConfigError("a checkpoint knows its image size; --image-size goes with --backbone")
    if arguments.into:
        model, weights = adapters_into(arguments.adapter, arguments.into, arguments.weights)
    else:
        model, weights = adapted_backbone(
            arguments.adapter, arguments.backbone, arguments.weights, arguments.image_size or 224
        )
    write_folder(arguments.out, {"": face_files(model, weights)})
    config = model.config
    print(
        f"wrote {arguments.out}: rank {config.lora_rank} on {config.lora_targets}, alpha {config.lora_alpha:g} "
        f"({config.lora_scaling}), {config.num_domains} domain{'s' * (config.num_domains > 1)}\n"
        f"next: python evaluate.py --checkpoint {arguments.out} --bench all"
    )


def adapted_backbone(
    adapter: Path, backbone: str, weights: str | None, image_size: int
) -> tuple[FaceModel, str | Path]:
    """A preset with the adapter of a PEFT folder, its embedding the CLS token; and the backbone file it takes."""
    name = backbone_name(backbone)
    vit = load_backbone(name, weights, image_size)
    adapters, domains = read_domains(adapter, name, vit.config)
    if domains > 1:
        raise ExchangeError(f"{adapter} has {domains} domains, and no router comes with them: name one with --into")
    file = weights if weights else find_backbone(name)
    frozen = FaceConfig(name, weights_sha256(name, weights), vit.config, image_size, embedding_dim=vit.config.embed_dim)
    model = FaceModel(vit, dataclasses.replace(frozen, **adapters.settings))
    vit.load_state_dict({**vit.state_dict(), **adapters.tensors})
    return model.eval(), file


def adapters_into(adapter: Path, checkpoint: Path, weights: str | None) -> tuple[FaceModel, str | Path]:
    """A face model with the adapters of a PEFT folder in the place of its own; and the backbone file it takes.

    It has no thresholds: those of the model before are not its own.
    """
    old = load_face(checkpoint, weights)
    adapters, domains = read_domains(adapter, old.config.backbone, old.config.vit)
    if domains != old.config.num_domains:
        raise ExchangeError(f"{adapter} has {domains} domains, {checkpoint} {old.config.num_domains}")
    config = dataclasses.replace(old.config, **adapters.settings)
    file = backbone_of(find_checkpoint(checkpoint), config, weights)
    model = FaceModel(load_backbone(config.backbone, file, config.image_size), config)
    kept = {key: tensor for key, tensor in trained_tensors(old).items() if not key.endswith(("lora_a", "lora_b"))}
    new = {f"vit.{key}": tensor for key, tensor in adapters.tensors.items()}
    model.load_state_dict({**model.state_dict(), **kept, **new})
    return model.eval(), file


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    return exit_code(lambda: import_peft(arguments))


if __name__ == "__main__":
    sys.exit(main())
