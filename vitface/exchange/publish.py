"""Write a model for the Hugging Face Hub: its adapters, router, head, settings, thresholds and a card, nothing else."""

import argparse
import importlib.util
import re
import sys
from pathlib import Path

from vitface.config import read_config
from vitface.data.formats.samples import load_samples
from vitface.data.synthetic.worlds import SYNTHETIC
from vitface.errors import ConfigError, DataError, ExchangeError, exit_code
from vitface.evaluation.report import results_json
from vitface.evaluation.scores import SCORES, load_scores
from vitface.exchange.bundle import face_files, sha256, thresholds_of, write_folder
from vitface.exchange.card import RESEARCH_ONLY, model_card
from vitface.exchange.leaks import check_bundle
from vitface.store.faces import backbone_of, find_checkpoint, load_face, model_sha256, run_folder
from vitface.store.hub import NO_HUB, REPOSITORY

EXAMPLES = """examples:
  python -m vitface publish runs/a --repo me/dinov2-faces --data "CASIA-WebFace, 490,623 images"     a dry run
  python -m vitface publish runs/a --repo me/dinov2-faces --data "..." --upload                      and upload it

OUT is what is uploaded, and its card may be edited in between: a folder that is there is not written again. It is
checked each time, and refused if it holds anything but adapters, router, head, settings, thresholds and the card.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m vitface publish", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="run (its best) or checkpoint")
    add("--repo", required=True, metavar="OWNER/NAME", help="where it goes on the Hub; created as a private repository")
    add("--data", metavar="TEXT", help="what it was trained on, for the card, in words that may be public")
    add("--licence", default=None, metavar="ID", help=f"as the Hub calls it; default: {RESEARCH_ONLY}")
    add("--out", type=Path, metavar="OUT", help="folder that is written, checked and uploaded; default: published/NAME")
    add("--upload", action="store_true", help="upload what passed the check; without it, nothing leaves the machine")
    add("--weights", metavar="FILE", help="converted backbone file; default: look in the usual places")
    return parser


def publish(arguments: argparse.Namespace) -> None:
    if not REPOSITORY.fullmatch(arguments.repo):
        raise ConfigError(f"--repo {arguments.repo} is not OWNER/NAME")
    if arguments.upload and importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(NO_HUB)
    step = find_checkpoint(arguments.checkpoint)
    out = arguments.out or Path("published") / arguments.repo.split("/")[1]
    if not out.exists():
        write_bundle(step, out, arguments)
    files = check_bundle(out, arguments.weights, people_of(step))
    if sha256(files["model.safetensors"]) != model_sha256(step):
        raise ExchangeError(f"{out} holds another model than {arguments.checkpoint}; remove it, or name another --out")
    print(f"{out}, of which nothing is a backbone, an identity, an image or an embedding:")
    for name, data in files.items():
        print(f"  {len(data):>12,}  {name}")
    if arguments.upload:
        print(f"uploaded to {upload(arguments.repo, files)}, a private repository until you open it")
    else:
        print(f"dry run: nothing was uploaded. Read {out / 'README.md'}, then call this again with --upload")


def write_bundle(step: Path, out: Path, arguments: argparse.Namespace) -> None:
    """Writes the folder of a checkpoint with a fresh card."""
    model = load_face(step, arguments.weights)
    if not model.config.lora_rank:
        raise ExchangeError(f"{step} has no adapters: there is nothing to publish but what others have published")
    synthetic = read_config(run_folder(step)).get("train_data") in SYNTHETIC
    data = arguments.data or ("procedural faces, drawn by vitface: no person's" if synthetic else None)
    if data is None:
        raise ConfigError("say with --data what it was trained on; the card is public, and a path may name somebody")
    licence = arguments.licence or ("apache-2.0" if synthetic else RESEARCH_ONLY)
    if not re.fullmatch(r"[a-z0-9.-]+", licence):
        raise ConfigError(f"--licence {licence} is not an identifier of the Hub, such as mit or cc-by-nc-4.0")
    thresholds = thresholds_of(step)
    card = model_card(arguments.repo, model.config, data, licence, results_of(step), thresholds)
    backbone = backbone_of(step, model.config, arguments.weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, {"": {**face_files(model, backbone, thresholds), "README.md": card.encode()}})


def results_of(step: Path) -> dict[str, dict]:
    """What the run's scores say of this very checkpoint; empty if it was not evaluated."""
    path = run_folder(step) / SCORES
    if not path.is_file():
        return {}
    results, model = load_scores(path)
    return results_json(results) if model == model_sha256(step) else {}


def people_of(step: Path) -> list[str]:
    """Names of training people, as far as the training data is still there: no card may hold one of them."""
    try:
        return list(load_samples(read_config(run_folder(step))["train_data"]).names)
    except (DataError, OSError, KeyError, TypeError):
        return []


def upload(repository: str, files: dict[str, bytes]) -> str:
    """Uploads the bytes that were checked, in one commit; the address. ExchangeError if the Hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        api.create_commit(repository, operations, commit_message="Model of vitface")
    except Exception as error:  # its own, its HTTP library's, the system's
        reason = str(error).strip().split("\n")[0]
        message = f"the Hub did not take {repository} ({reason}); are you logged in?\n  hf auth login"
        raise ExchangeError(message) from None
    return str(url)


def main(argv: list[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    return exit_code(lambda: publish(arguments))


if __name__ == "__main__":
    sys.exit(main())
