"""Write a trained model for other programs: PEFT, ONNX Runtime, torch.export, or as a backbone without adapters."""

import argparse
import sys
from pathlib import Path

from vitface.errors import ConfigError, ExchangeError, exit_code
from vitface.exchange.bundle import write_folder
from vitface.exchange.graph import check_onnx, describe, onnx_bytes, torch_bytes, trace
from vitface.exchange.merged import merged_files
from vitface.exchange.peft import TIMM, Layout, base_model, peft_files, transformers_layout
from vitface.files import replace_file
from vitface.model.face import FaceModel
from vitface.model.lora import adapter_state_dict
from vitface.model.store import find_checkpoint, load_face

EXAMPLES = """examples:
  python -m vitface export runs/a --format onnx --out face.onnx          the whole model, router inside, checked
  python -m vitface export runs/a --format torch --out face.pt2          the same for torch.export.load
  python -m vitface export runs/a --format peft-timm --out adapter       PEFT's files; a folder per domain for DA-LoRA
  python -m vitface export runs/a --format peft-transformers --out adapter
  python -m vitface export runs/a --format merged --out merged           LoRA folded into a backbone file, and the head
"""
FORMATS = ("onnx", "torch", "peft-timm", "peft-transformers", "merged")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m vitface export", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="run (its best), checkpoint, or owner/name on the Hub")
    add("--format", choices=FORMATS, required=True, help="what to write; see docs/exchange.md")
    add("--out", type=Path, required=True, help="file or folder that does not exist yet")
    add("--transformers-version", type=int, choices=[4, 5], default=5, help="whose module names; default: 5")
    add(
        "--no-flip",
        action="store_true",
        help="onnx, torch: without the mirror image, half the work; the thresholds are with it",
    )
    add("--weights", metavar="FILE", help="converted backbone file; default: look in the usual places")
    return parser


def export(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out {out} exists; name one that does not")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist")
    step = find_checkpoint(arguments.checkpoint)
    if arguments.format in ("onnx", "torch"):
        _export_graph(load_face(step, arguments.weights, dtype="fp32"), arguments)
    elif arguments.format == "merged":
        files = merged_files(step, arguments.weights)
        write_folder(out, {"": files})
        backbone = next(name for name in files if name not in ("model.safetensors",) and name.endswith(".safetensors"))
        print(f"wrote {out}: a face model for --checkpoint, its backbone {backbone} for --weights")
    else:
        _export_peft(load_face(step, arguments.weights), arguments)


def _export_graph(model: FaceModel, arguments: argparse.Namespace) -> None:
    flip = not arguments.no_flip
    program = trace(model, flip)
    if arguments.format == "torch":
        data, checked = torch_bytes(program), ""
    else:
        data = onnx_bytes(program, model)
        checked = f"; cosine with PyTorch at least {check_onnx(data, model, flip):.7f} in ONNX Runtime"
    replace_file(arguments.out, data)
    print(f"wrote {arguments.out} ({len(data) / 1e6:.1f} MB){checked}\ntakes {describe(model)['images']}")


def _export_peft(model: FaceModel, arguments: argparse.Namespace) -> None:
    config = model.config
    if not config.lora_rank:
        raise ExchangeError(f"{arguments.checkpoint} has no adapters")
    layout = TIMM
    if arguments.format == "peft-transformers":
        layout = transformers_layout(config.backbone, arguments.transformers_version)
    adapters = adapter_state_dict(model.vit)
    names = [f"domain-{k}" for k in range(config.num_domains)] if config.num_domains > 1 else [""]
    folders = {name: peft_files(adapters, config, layout, domain) for domain, name in enumerate(names)}
    write_folder(arguments.out, folders)
    print(
        f"wrote {arguments.out}: {len(folders)} PEFT folder{'s' * (len(folders) > 1)} for {_base(config.backbone, layout)}"
    )
    print(
        "the embedding head" + (" and the router are" if model.router is not None else " is") + " not in PEFT's format"
    )
    if config.train_patch_embed:
        print("neither is the patch convolution, which this run trained: the base model alone has another one")


def _base(backbone: str, layout: Layout) -> str:
    name = base_model(backbone, layout)
    if layout is TIMM:
        return f'timm.create_model("{name}")' if name else f"a {backbone} in timm's names"
    return f"{name or backbone} in transformers {layout.version}"


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    return exit_code(lambda: export(arguments))


if __name__ == "__main__":
    sys.exit(main())
