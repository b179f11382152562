"""Write a model for the Hugging Face Hub: its adapters, router, head, settings, thresholds and a card, nothing else."""

import argparse
from pathlib import Path

from vitface.commands.parser import CommandParser, add_shared
from vitface.errors import ConfigError, ExchangeError
from vitface.extras import require
from vitface.files import sha256_bytes
from vitface.store.hub import REPOSITORY

EXAMPLES = """examples:
  vitface publish runs/a --repo me/faces --data "..."                                a dry run
  vitface publish runs/a --repo me/faces --data "CASIA-WebFace, 490,623 images" --upload

The folder OUT is uploaded. You may edit its card before: an existing folder is not written again, but it is checked
each time, and refused if it holds anything but adapters, router, head, settings, thresholds and the card.
"""


def add_flags(parser: CommandParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="run (its best) or checkpoint")
    add("--repo", required=True, metavar="OWNER/NAME", help="where it goes on the Hub; created as a private repository")
    add("--data", metavar="TEXT", help="what it was trained on, for the card, in words that may be public")
    add("--licence", default=None, metavar="ID", help="as the Hub calls it; default: non-commercial-research")
    add("--out", type=Path, metavar="OUT", help="folder that is written, checked and uploaded; default: published/NAME")
    add("--public", action="store_true", help="upload also into a repository that everybody can see already")
    add("--upload", action="store_true", help="upload what passed the check; without it, nothing leaves the machine")
    add_shared(parser, "--weights")


def run(arguments: argparse.Namespace) -> None:
    from vitface.exchange.publishing import check_bundle, people_of, upload, write_bundle
    from vitface.store.faces import open_checkpoint

    repository = arguments.repo
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--repo {repository} is not OWNER/NAME")
    if arguments.upload:
        require("--upload", "huggingface_hub")
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.weights)
    out = arguments.out or Path("published") / repository.split("/")[1]
    if not out.exists():
        write_bundle(checkpoint, out, repository, arguments.data, arguments.licence)
    people = people_of(checkpoint)
    if people is None:
        where = checkpoint.settings.get("train_data", "what this model was trained on")
        print(
            f"NOT CHECKED: whether the card names somebody, as {where} is not here; read {out / 'README.md'} yourself"
        )
    files = check_bundle(out, arguments.weights, people or ())
    if sha256_bytes(files["model.safetensors"]) != checkpoint.sha256:
        raise ExchangeError(f"{out} holds another model than {arguments.checkpoint}; remove it, or name another --out")
    print(f"{out}, of which nothing is a backbone, an identity, an image or an embedding:")
    for name, data in files.items():
        print(f"  {len(data):>12,}  {name}")
    if arguments.upload:
        print(upload(repository, files, arguments.public))
    else:
        print(f"dry run: nothing was uploaded. Read {out / 'README.md'}, then call this again with --upload")
