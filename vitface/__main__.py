"""`vitface COMMAND ...`, or `python -m vitface COMMAND ...`."""

import importlib
import sys

# command -> (module with `main(argv) -> exit code`, what it does); imported when asked for
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("vitface.commands.train", "adapt a frozen ViT to face recognition"),
    "evaluate": ("vitface.commands.evaluate", "score a model on the face-verification benchmarks"),
    "fetch": ("vitface.commands.models.fetch", "download a backbone or the face detector"),
    "convert": ("vitface.commands.models.convert", "a published checkpoint to a backbone file"),
    "align": ("vitface.commands.photos.align", "photos to aligned 112 x 112 crops"),
    "data": ("vitface.commands.data", "pack training data, check it, look at it"),
    "verify": ("vitface.commands.photos.verify", "do two photos show the same person?"),
    "embed": ("vitface.commands.photos.embed", "a folder of images to a gallery of embeddings"),
    "search": ("vitface.commands.photos.search", "who in a gallery is most like these photos?"),
    "cluster": ("vitface.commands.photos.cluster", "group the images of a gallery by person"),
    "explain": ("vitface.commands.photos.explain", "draw where a model looks, and its domain weights"),
    "info": ("vitface.commands.models.info", "what is in a checkpoint, a backbone file, a gallery"),
    "export": ("vitface.commands.models.export", "a trained model for PEFT, ONNX Runtime, torch.export"),
    "import-peft": ("vitface.commands.models.import_peft", "a face model from adapters that PEFT trained"),
    "publish": ("vitface.commands.models.publish", "a model for the Hugging Face Hub, without what must not leave"),
    "experiments": ("vitface.commands.experiments", "the recorded experiments beside your runs of them"),
    "study": ("vitface.commands.study", "train and compare DA-LoRA and its controls over seeds"),
}


def usage() -> str:
    width = max(map(len, COMMANDS), default=0)
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: vitface COMMAND [--help]", "", *lines])


def main(argv: list[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"unknown command {name!r}\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[name][0]).main(rest)


if __name__ == "__main__":
    sys.exit(main())
