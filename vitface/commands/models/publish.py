"""Write a model, or a page that runs it, for the Hugging Face Hub, with a card, and upload nothing but that."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vitface.commands.parser import CommandParser, add_shared
from vitface.errors import ConfigError, ExchangeError
from vitface.extras import require
from vitface.files import sha256_bytes
from vitface.store.hub import REPOSITORY

if TYPE_CHECKING:
    from vitface.store.faces import Checkpoint

EXAMPLES = """examples:
  vitface publish runs/a --repo me/faces --data "..."                                a dry run
  vitface publish runs/a --repo me/faces --data "CASIA-WebFace, 490,623 images" --upload
  vitface publish runs/a --space me/same-person --data "..."    the page of `vitface demo`, as a static Space

The folder OUT is uploaded. You may edit its card before: an existing folder is not written again, but it is checked
each time, and refused if it holds anything but adapters, router, head, settings, thresholds and the card; of a Space,
anything but the page, its model and the card. The backbone goes along where its licence is Apache-2.0 or MIT; where it
is another, the page asks each visitor for the backbone's file.
"""


def add_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="run (its best) or checkpoint")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--repo", metavar="OWNER/NAME", help="the model's place on the Hub; created as private")
    where.add_argument("--space", metavar="OWNER/NAME", help="the page's place, a static Space; created as private")
    add("--data", metavar="TEXT", help="what it was trained on, for the card, in words that may be public")
    add("--licence", default=None, metavar="ID", help="as the Hub calls it; default: non-commercial-research")
    add("--out", type=Path, metavar="OUT", help="folder that is written, checked and uploaded; default: published/NAME")
    add("--public", action="store_true", help="upload also into a repository that everybody can see already")
    add("--upload", action="store_true", help="upload what passed the check; without it, nothing leaves the machine")
    add_shared(parser, "--weights")


def run(arguments: argparse.Namespace) -> None:
    from vitface.exchange.publishing import people_of, upload
    from vitface.store.faces import open_checkpoint

    repository = arguments.repo or arguments.space
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"{'--repo' if arguments.repo else '--space'} {repository} is not OWNER/NAME")
    if arguments.space:
        require("--space", "onnx", "onnxscript", "onnxruntime")
    if arguments.upload:
        require("--upload", "huggingface_hub")
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.weights)
    out = arguments.out or Path("published") / repository.split("/")[1]
    people = people_of(checkpoint)
    if people is None:
        where = checkpoint.settings.get("train_data", "what this model was trained on")
        print(
            f"NOT CHECKED: whether the card names somebody, as {where} is not here; read {out / 'README.md'} yourself"
        )
    files = (_page if arguments.space else _bundle)(checkpoint, out, repository, people or (), arguments)
    nothing = (
        "an identity, a photo or an embedding"
        if arguments.space
        else "a backbone, an identity, an image or an embedding"
    )
    print(f"{out}, of which nothing is {nothing}:")
    for name, data in files.items():
        print(f"  {len(data):>12,}  {name}")
    if arguments.upload:
        print(upload(repository, files, arguments.public, bool(arguments.space)))
    else:
        print(f"dry run: nothing was uploaded. Read {out / 'README.md'}, then call this again with --upload")


def _bundle(
    checkpoint: "Checkpoint", out: Path, repository: str, people: Sequence[str], arguments: argparse.Namespace
) -> dict[str, bytes]:
    from vitface.exchange.publishing import RESEARCH_ONLY, check_bundle, model_card, write_bundle

    if not out.exists():
        write_bundle(checkpoint, out, repository, arguments.data, arguments.licence)
    own = model_card(checkpoint, "/", "", arguments.licence or RESEARCH_ONLY) if people else ""
    files = check_bundle(out, arguments.weights, people, own)
    if sha256_bytes(files["model.safetensors"]) != checkpoint.sha256:
        raise ExchangeError(f"{out} holds another model than {arguments.checkpoint}; remove it, or name another --out")
    return files


def _page(
    checkpoint: "Checkpoint", out: Path, repository: str, people: Sequence[str], arguments: argparse.Namespace
) -> dict[str, bytes]:
    from vitface.exchange.publishing import RESEARCH_ONLY, check_space, space_card, space_files, write_space

    page = space_files(checkpoint)
    if backbone := json.loads(page["page.json"]).get("backbone"):
        print(f"the page is without its backbone, and asks each visitor for it: {backbone['text']}")
    if not out.exists():
        write_space(checkpoint, out, page, repository, arguments.data, arguments.licence)
    own = space_card(checkpoint, page, "/", "", arguments.licence or RESEARCH_ONLY)
    return check_space(out, page, people, own)
