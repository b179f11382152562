"""Write a trained model, or a gallery, for others: PEFT, ONNX, torch.export, a web page; FAISS, Parquet, pgvector."""

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vitface.commands.parser import CommandParser, add_shared, new_path
from vitface.errors import ConfigError, ExchangeError
from vitface.extras import require
from vitface.files import write_output

if TYPE_CHECKING:
    from vitface.model.face import FaceModel
    from vitface.recogniser import Recogniser
    from vitface.store.faces import Checkpoint

EXAMPLES = """examples:
  vitface export runs/a --format onnx --out face.onnx          the whole model, router inside, checked
  vitface export runs/a --format onnx --layout nchw --out face.onnx    as InsightFace's model files
  vitface export runs/a --format torch --out face.pt2          the same for torch.export.load
  vitface export runs/a --format peft-timm --out adapter       PEFT's files; a folder per domain for DA-LoRA
  vitface export runs/a --format peft-transformers --out adapter
  vitface export runs/a --format merged --out merged           LoRA folded into a backbone file, and the head
  vitface export runs/a --format web --out site                a page that runs the model in a browser, see vitface demo
  vitface export people --format faiss --out index             a gallery: index.faiss and names.json
  vitface export people --format parquet --out people.parquet
  vitface export people --format pgvector --out tables         load.sql for psql, and the rows

docs/scaling.md says which engine serves what.
"""
GALLERY_FORMATS = ("faiss", "parquet", "pgvector")
FORMATS = ("onnx", "torch", "peft-timm", "peft-transformers", "merged", "web")


def add_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="run (its best), checkpoint, hf://owner/name; or a gallery")
    add("--format", choices=(*FORMATS, *GALLERY_FORMATS), required=True, help="what to write; see docs/exchange.md")
    add("--out", type=new_path, required=True, help="file or folder that does not exist yet")
    add("--transformers-version", type=int, choices=[4, 5], default=5, help="whose module names; default: 5")
    add("--no-flip", action="store_true", help="onnx, torch: embed without the mirror image; halves the work")
    layout = "onnx, torch: nhwc (default) takes uint8 (B, 112, 112, 3); nchw float32 (B, 3, 112, 112) from -1 to 1, RGB"
    add("--layout", choices=["nhwc", "nchw"], default="nhwc", help=layout)
    precision = "web: as what the weights are stored; fp16 (default) halves the download, int8 halves it again"
    add("--precision", choices=["fp32", "fp16", "int8"], help=precision)
    add_shared(parser, "--weights")


def run(arguments: argparse.Namespace) -> None:
    from vitface.exchange.bundle import merged_files, write_folder
    from vitface.recogniser import Recogniser
    from vitface.store.faces import open_checkpoint

    if arguments.format in GALLERY_FORMATS:
        return _export_gallery(arguments.checkpoint, arguments.format, arguments.out)
    if arguments.layout != "nhwc" and arguments.format not in ("onnx", "torch"):
        raise ConfigError("--layout goes with --format onnx or torch")
    if arguments.precision and arguments.format != "web":
        raise ConfigError("--precision goes with --format web")
    if arguments.no_flip and arguments.format == "web":
        raise ConfigError("the page compares with calibrated thresholds, which hold with the mirror image only")
    if arguments.format in ("onnx", "web"):
        require(f"--format {arguments.format}", "onnx", "onnxscript", "onnxruntime")
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.weights)
    if arguments.format in ("onnx", "torch"):
        _export_graph(Recogniser.from_checkpoint(checkpoint, dtype="fp32"), arguments)
    elif arguments.format == "web":
        _export_page(checkpoint, arguments)
    elif arguments.format == "merged":
        write_folder(arguments.out, {"": merged_files(checkpoint)})
        backbone = f"{checkpoint.config.backbone}.safetensors"
        print(f"wrote {arguments.out}: a face model for --checkpoint, its backbone {backbone} for --weights")
    else:
        _export_peft(checkpoint.load(), arguments)


def _export_gallery(path: Path, to: str, out: Path) -> None:
    from vitface.gallery.exports import export
    from vitface.gallery.gallery import Gallery

    gallery = Gallery.load(path)
    export(gallery, to, out)
    print(
        f"wrote {out}: {len(gallery):,} rows of {gallery.embedding_dim} numbers, names and thresholds; keep it private"
    )
    if to == "pgvector":
        print(f"next: cd {shlex.quote(str(out))} && psql -d DATABASE -f load.sql")


def _export_graph(model: "Recogniser", arguments: argparse.Namespace) -> None:
    from vitface.exchange.onnx_graph import check_onnx, describe, onnx_bytes, torch_bytes, trace

    flip, layout = not arguments.no_flip, arguments.layout
    program = trace(model.model, flip, layout)
    if arguments.format == "torch":
        data, checked = torch_bytes(program), ""
    else:
        data = onnx_bytes(program, model, layout)
        checked = f"; cosine with PyTorch at least {check_onnx(data, model, flip, layout):.7f} in ONNX Runtime"
    write_output(arguments.out, data)
    print(f"wrote {arguments.out} ({len(data) / 1e6:.1f} MB){checked}\ntakes {describe(model, layout)['images']}")


def _export_page(checkpoint: "Checkpoint", arguments: argparse.Namespace) -> None:
    from vitface.exchange.bundle import write_folder
    from vitface.exchange.site import in_folders, site_files

    files = site_files(checkpoint, arguments.precision or "fp16")
    write_folder(arguments.out, in_folders(files))
    size = sum(map(len, files.values())) / 1e6
    print(f"wrote {arguments.out} ({size:.1f} MB): {len(files)} files for any static host; all that it runs is in them")
    print(f"next: python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(arguments.out))} 8000")
    print("and open http://localhost:8000 in a browser")


def _export_peft(model: "FaceModel", arguments: argparse.Namespace) -> None:
    from vitface.exchange.bundle import write_folder
    from vitface.exchange.peft import TIMM, base_model, peft_files, transformers_layout
    from vitface.model.lora import adapter_state_dict

    config = model.config
    if not config.lora_rank or config.train_patch_embed:
        why = "trained the patch convolution, which PEFT's format has not" if config.lora_rank else "has no adapters"
        raise ExchangeError(f"{arguments.checkpoint} {why}; --format onnx takes any model")
    layout = TIMM
    if arguments.format == "peft-transformers":
        layout = transformers_layout(config.backbone, arguments.transformers_version)
    adapters = adapter_state_dict(model.vit)
    names = [f"domain-{k}" for k in range(config.num_domains)] if config.num_domains > 1 else [""]
    folders = {name: peft_files(adapters, config, layout, domain) for domain, name in enumerate(names)}
    write_folder(arguments.out, folders)
    library = "timm" if layout is TIMM else f"transformers {layout.version}"
    base = base_model(config.backbone, layout) or f"a {config.backbone} in its names"
    left = "the embedding head" if model.router is None else "the router and the embedding head"
    print(f"wrote {', '.join(str(arguments.out / name) for name in names)}")
    print(f"for {library}: {base}; without {left}, for which PEFT has no place")
    if layout is TIMM and config.vit.act == "quick_gelu":
        print("timm's model has to be one with clip_quickgelu in its name; the others run another activation")
