"""`vitface COMMAND ...`, or `python -m vitface COMMAND ...`.

Each command is a module: its docstring and EXAMPLES are its help, `add_flags(parser)` adds its arguments, and
`run(arguments)` does the work and returns the exit code, None for 0.
"""

import sys

if __name__ == "__main__":  # python -m looks in the current folder first, where a data set may hold a tqdm.py
    del sys.path[0]

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

from vitface.commands.parser import CommandParser
from vitface.errors import did_you_mean, exit_code
from vitface.version import __version__

GROUPS = {
    "training and evaluation": (
        "vitface.commands",
        ("train", "evaluate", "calibrate", "golden", "study", "experiments", "data"),
    ),
    "photos": ("vitface.commands.photos", ("align", "verify", "embed", "search", "cluster", "explain", "demo")),
    "models": (
        "vitface.commands.models",
        ("backbones", "fetch", "convert", "info", "export", "import-peft", "publish"),
    ),
}
COMMANDS = {name: f"{package}.{name.replace('-', '_')}" for package, names in GROUPS.values() for name in names}


def load_command(name: str) -> tuple[ModuleType, CommandParser]:
    """Imports a command; returns its module and its parser."""
    module = importlib.import_module(COMMANDS[name])
    parser = CommandParser(f"vitface {name}", description=module.__doc__, epilog=module.EXAMPLES)
    module.add_flags(parser)
    return module, parser


def usage() -> str:
    """The list of commands: of each one its first example, and the beginning of its description.

    Their sources are read, not imported: some need numpy as soon as they are.
    """
    lines = ["usage: vitface COMMAND ...   (vitface COMMAND --help has its flags and examples; --version)"]
    for title, (_, names) in GROUPS.items():
        lines += ["", f"{title}:"]
        for name in names:
            module = importlib.util.find_spec(COMMANDS[name])
            assert module and module.origin
            source = Path(module.origin).read_text(encoding="utf-8")
            example = re.search(rf"^  (vitface {name}\b.*?)(   |$)", source, re.MULTILINE)
            about = re.match(r'"""([^.:?]+\??)', source)
            assert example and about
            lines.append(f"  {example[1]:<53}  {about[1]}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code (see `exit_code`); 2 if there is no such command."""
    return exit_code(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int | None:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"vitface {__version__}")
    elif name not in COMMANDS:
        print(f"error: unknown command {name}{did_you_mean(name, COMMANDS)}\nsee vitface --help", file=sys.stderr)
        return 2
    else:
        module, parser = load_command(name)
        return module.run(parser.parse_args(rest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
