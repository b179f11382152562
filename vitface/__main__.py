"""`vitface COMMAND ...`, or `python -m vitface COMMAND ...`.

Each command is a module: its docstring and EXAMPLES are its help, `add_flags(parser)` adds its arguments, and
`run(arguments)` does the work and returns the exit code, None for 0.
"""

import importlib
import sys
from types import ModuleType
from typing import NamedTuple

from vitface.commands.parser import CommandParser
from vitface.errors import did_you_mean, exit_code
from vitface.version import __version__


class Group(NamedTuple):
    """Commands whose modules lie in `package`: for each one an example of its arguments, and a line of help."""

    title: str
    package: str
    commands: dict[str, tuple[str, str]]


GROUPS = (
    Group(
        "training and evaluation",
        "vitface.commands",
        {
            "train": ("--exp demo", "adapt a frozen ViT to face recognition"),
            "evaluate": ("--bench lfw", "score a model on the face-verification benchmarks"),
            "study": ("tiny", "train and compare DA-LoRA and its controls over seeds"),
            "experiments": ("", "the recorded experiments beside your runs of them"),
            "data": ("check data", "check training data and benchmarks; also pack, build, show, draw"),
        },
    ),
    Group(
        "photos",
        "vitface.commands.photos",
        {
            "align": ("photos aligned", "photos to aligned 112 x 112 crops"),
            "verify": ("A.jpg B.jpg", "do two photos show the same person?"),
            "embed": ("photos people", "a folder of images to a gallery of embeddings"),
            "search": ("people NEW.jpg", "who in a gallery is most like this photo?"),
            "cluster": ("people", "group the images of a gallery by person"),
            "explain": ("A.jpg -o out.png", "draw where a model looks, and its domain weights"),
        },
    ),
    Group(
        "models",
        "vitface.commands.models",
        {
            "fetch": ("dinov2", "download a backbone, or the face detector"),
            "convert": ("clip --src FILE", "a published checkpoint to a backbone file"),
            "info": ("runs/a", "what is in a checkpoint, a backbone file, a gallery"),
            "export": ("runs/a --format onnx --out a.onnx", "a model for ONNX Runtime, torch.export, PEFT"),
            "import-peft": ("adapter --into runs/a --out b", "a face model from adapters that PEFT trained"),
            "publish": ("runs/a --repo me/faces", "a model for the Hugging Face Hub, with nothing private in it"),
        },
    ),
)
COMMANDS = {name: f"{group.package}.{name.replace('-', '_')}" for group in GROUPS for name in group.commands}


def load_command(name: str) -> tuple[ModuleType, CommandParser]:
    """Imports a command; returns its module and its parser."""
    module = importlib.import_module(COMMANDS[name])
    parser = CommandParser(f"vitface {name}", description=module.__doc__, epilog=module.EXAMPLES)
    module.add_flags(parser)
    return module, parser


def usage() -> str:
    lines = ["usage: vitface COMMAND ...   (vitface COMMAND --help has its flags and examples; --version)"]
    for group in GROUPS:
        lines += ["", f"{group.title}:"]
        lines += [f"  vitface {f'{name} {example}':<42}  {text}" for name, (example, text) in group.commands.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code (see `exit_code`); 2 if there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"vitface {__version__}")
    elif name not in COMMANDS:
        print(f"error: unknown command {name}{did_you_mean(name, COMMANDS)}\nsee vitface --help", file=sys.stderr)
        return 2
    else:
        module, parser = load_command(name)
        arguments = parser.parse_args(rest)
        return exit_code(lambda: module.run(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
