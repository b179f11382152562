"""Publishing a model on the Hugging Face Hub: its bundle, or its page, is written with a card, checked and uploaded.

The check keeps backbones, identity matrices, embeddings, images, names, paths and secrets out of a published model. A
bundle has five files. Four of them must be, byte for byte, what this version writes for the model that they describe,
so that there is no room for anything else. The fifth is the card, which people edit: it is searched. A page, for a
Space, has the files of `vitface.exchange.site` and a card, to which the same applies.
"""

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from vitface.credentials import find_secret
from vitface.data.formats.samples import load_samples
from vitface.data.synthetic.worlds import SYNTHETIC
from vitface.documents import render
from vitface.errors import ConfigError, DataError, ExchangeError, VitfaceError
from vitface.evaluation.report import results_json
from vitface.evaluation.scores import SCORES, load_scores
from vitface.exchange.bundle import face_files, write_folder
from vitface.exchange.site import in_folders, site_files
from vitface.store.faces import Checkpoint, open_checkpoint
from vitface.store.hub import BUNDLE_FILES
from vitface.store.settings import read_epochs
from vitface.store.sources import SOURCES
from vitface.version import __version__

RESEARCH_ONLY = "non-commercial-research"
REDISTRIBUTABLE = ("Apache-2.0", "MIT")  # the licences of backbones that a page may hold
CARD = "README.md"
MAX_CARD_BYTES = 1 << 15
MAX_DECIMALS = 100  # numbers of four decimals and more: a full table of results has about forty
TAGS = "img|image|svg|picture|object|iframe|script|style|link|video|audio|embed|input|canvas|form|base|meta"
FOLDERS = "home|users|root|mnt|media|data|datasets|tmp|var|srv|opt|scratch|content|volumes|nfs|kaggle|work|workspace"
FORBIDDEN = {
    "an image or a tag of HTML that loads something": rf"!\[|<\s*(?:{TAGS})\b|data:[\w/+.-]*[;,]",
    "a path on a machine": rf"file:/|\\\\\w|(?<!\w)[a-z]:[\\/](?!/)|~/\w|(?<![\w.:/])//?(?:{FOLDERS})/\S",
    "a word of over 200 characters": r"\S{201}",
}


def write_bundle(checkpoint: Checkpoint, out: Path, repository: str, data: str | None, licence: str | None) -> None:
    """Writes a checkpoint's folder with a new card.

    `data` describes what the model was trained on, and `licence` is an identifier of the Hub; both have defaults for
    procedural faces. ConfigError where the card would lack one, ExchangeError for a model without adapters.
    """
    if not checkpoint.config.lora_rank:
        raise ExchangeError(f"{checkpoint.path} has no adapters: everything in it is published already")
    data, licence = described(checkpoint, data, licence)
    card = model_card(checkpoint, repository, data, licence)
    files = face_files(checkpoint.load(), checkpoint.backbone, checkpoint.calibration)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, {"": {**files, CARD: card.encode()}})


def described(checkpoint: Checkpoint, data: str | None, licence: str | None) -> tuple[str, str]:
    """(What the model was trained on, its licence) for the card; both have defaults."""
    synthetic = checkpoint.settings.get("train_data") in SYNTHETIC
    data = data or ("procedural faces, drawn by vitface: no person's" if synthetic else None)
    if data is None:
        raise ConfigError("describe the training data with --data; the card is public, and a path may name somebody")
    licence = licence or ("apache-2.0" if synthetic else RESEARCH_ONLY)
    if not re.fullmatch(r"[a-z0-9.-]+", licence):
        raise ConfigError(f"--licence {licence} is not an identifier of the Hub, such as mit or cc-by-nc-4.0")
    return data, licence


def model_card(checkpoint: Checkpoint, repository: str, data: str, licence: str) -> str:
    """The card, README.md, of a model that will be in `repository`; its text is in card.md.j2.

    `data` describes in words what the model was trained on. The results are those of this very checkpoint among the
    run's scores. Where it was not evaluated, or not calibrated, the card states that.
    """
    results, model = {}, ""
    if checkpoint.run is not None and (checkpoint.run / SCORES).is_file():
        results, model = load_scores(checkpoint.run / SCORES)
    return render(
        "exchange/card.md.j2",
        repository=repository,
        config=checkpoint.config,
        source=SOURCES.get(checkpoint.config.backbone),
        data=data,
        licence=licence,
        research_only=RESEARCH_ONLY,
        results=results_json(results) if results and model == checkpoint.sha256 else {},
        thresholds=checkpoint.calibration,
        held_out=any(row.get("holdout_auc") for row in (read_epochs(checkpoint.run) if checkpoint.run else ())),
        version=__version__,
    )


def people_of(checkpoint: Checkpoint) -> list[str] | None:
    """The names of the training people, which no card may hold; None if the training data is not here."""
    if checkpoint.settings.get("train_data") in SYNTHETIC:
        return []
    try:
        return list(load_samples(checkpoint.settings["train_data"]).names)
    except (DataError, OSError, KeyError, TypeError):
        return None


def check_bundle(folder: Path, weights: str | None, people: Sequence[str], own: str) -> dict[str, bytes]:
    """The files of a bundle by name, the card last; ExchangeError names the first thing that must not be published.

    `people` and `own` are those of `check_card`.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ExchangeError(f"{folder} is not a folder of a model")
    for entry in sorted(folder.iterdir()):
        if entry.name not in BUNDLE_FILES or entry.is_symlink() or not entry.is_file():
            raise ExchangeError(f"{entry} is not part of a model; nothing is published with it there")
    try:
        checkpoint = open_checkpoint(folder, weights)
        expected = face_files(checkpoint.load(), checkpoint.backbone, checkpoint.calibration)
    except VitfaceError as error:
        raise ExchangeError(f"{error}; it is not published") from None
    if not re.fullmatch(r"random|[0-9a-f]{64}", checkpoint.config.weights_sha256):
        raise ExchangeError(f"{folder}/model.json: weights_sha256 is not a SHA-256")
    found = {name: (folder / name).read_bytes() for name in BUNDLE_FILES if (folder / name).is_file()}
    card = found.pop(CARD, b"")
    for name in BUNDLE_FILES[:-1]:
        if found.get(name) != expected.get(name):
            fault = f"{folder / name} is not what vitface writes for this model"
            raise ExchangeError(f"{fault}, and may hold more than it: remove {folder} and publish again")
    check_card(card, people, own)
    return {**found, CARD: card}


def space_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The page of a model by path, without a card, and without a backbone that others may not have from us."""
    source = SOURCES.get(checkpoint.config.backbone)
    closed = source is not None and source.licence not in REDISTRIBUTABLE
    return site_files(checkpoint, apart=closed and checkpoint.backbone != "random")


def write_space(
    checkpoint: Checkpoint, out: Path, page: dict[str, bytes], repository: str, data: str | None, licence: str | None
) -> None:
    """Writes a page with a new card; the other arguments are those of `write_bundle`."""
    card = space_card(checkpoint, page, repository, *described(checkpoint, data, licence))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, in_folders({**page, CARD: card.encode()}))


def space_card(checkpoint: Checkpoint, page: dict[str, bytes], repository: str, data: str, licence: str) -> str:
    """As `model_card`, of a page; its text is in space.md.j2."""
    return render(
        "exchange/space.md.j2",
        repository=repository,
        config=checkpoint.config,
        data=data,
        licence=licence,
        research_only=RESEARCH_ONLY,
        about=json.loads(page["page.json"]),
        version=__version__,
    )


def check_space(folder: Path, page: dict[str, bytes], people: Sequence[str], own: str) -> dict[str, bytes]:
    """The files of a folder by path: those of `space_files`, and its card; ExchangeError names the first that is not.

    `people` and `own` are those of `check_card`.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ExchangeError(f"{folder} is not a folder of a page")
    folders = {name.rpartition("/")[0] for name in page}
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        kept = entry.is_dir() if name in folders else entry.is_file() and (name in page or name == CARD)
        if entry.is_symlink() or not kept:
            raise ExchangeError(f"{entry} is not part of a page; nothing is published with it there")
    for name, data in page.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != data:
            fault = f"{folder / name} is not what vitface writes for this model"
            raise ExchangeError(f"{fault}, and may hold more than it: remove {folder} and publish again")
    card = (folder / CARD).read_bytes() if (folder / CARD).is_file() else b""
    check_card(card, people, own)
    return {**page, CARD: card}


def check_card(card: bytes, people: Sequence[str] = (), own: str = "") -> None:
    """ExchangeError if a card is missing, too large or not text, or holds an image, a path, a secret or a name.

    The names are those of `people`; lines of `own`, the card without words of the user, do not count.
    """
    if not 0 < len(card) <= MAX_CARD_BYTES:
        raise ExchangeError(f"{CARD} has {len(card):,} bytes; a card has at most {MAX_CARD_BYTES:,}, and at least one")
    try:
        text = card.decode()
    except UnicodeDecodeError:
        raise ExchangeError(f"{CARD} is not text") from None
    kinds = [kind for kind, pattern in FORBIDDEN.items() if re.search(pattern, text, re.IGNORECASE)]
    secret = find_secret(text)
    kinds += [secret] if secret else []
    kinds += ["a list of numbers"] if len(re.findall(r"\d\.\d{4,}", text)) > MAX_DECIMALS else []
    named = first_named(text, people, own)
    kinds += ["the name of somebody in the training data ({}, line {})".format(*named)] if named else []
    if kinds:
        raise ExchangeError(f"{CARD} holds {kinds[0]}; take it out, the card is public")


def first_named(text: str, people: Sequence[str], own: str = "") -> tuple[str, int] | None:
    """(The first of the names that a text has in some form, its line from 1), or None; lines of `own` do not count.

    Neither do case, accents, punctuation and the order of the words.
    """
    written = set(own.splitlines())
    found = [(word, n) for n, line in enumerate(text.splitlines(), 1) if line not in written for word in _words(line)]
    words = [word for word, _ in found]
    every, squeezed = set(words), "".join(words)
    for name in people:
        for parts in _forms(name):
            joined = "".join(parts)
            if joined.upper() == joined.lower() and joined in squeezed:  # a script without spaces
                return name, [n for word, n in found for _ in word][squeezed.index(joined)]
            if joined in every:
                return name, found[words.index(joined)][1]
            if every.issuperset(parts):
                size, one = len(parts), sorted(parts)
                at = next((i for i in range(len(words)) if sorted(words[i : i + size]) == one), None)
                if at is not None:
                    return name, found[at][1]
    return None


def _forms(name: str) -> list[list[str]]:
    """The words of a name, and those without a number where they still are a name: person-01 is not any person.

    A name of fewer than three letters has no form, except in scripts without case, as Chinese names often have two
    characters.
    """
    parts = _words(name)
    plain = [part for part in parts if not part.isdigit()]
    letters = "".join(plain)
    caseless = letters.upper() == letters.lower()
    if sum(map(str.isalpha, letters)) < (2 if caseless else 3):
        return []
    return [parts, plain] if caseless or len(plain) > 1 else [parts]


def _words(text: str) -> list[str]:
    """The words of a text without case, accents and characters that are not seen."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    seen = "".join(c for c in plain if unicodedata.category(c) not in ("Mn", "Cf"))
    return re.sub(r"\W|_", " ", seen).split()


def upload(repository: str, files: dict[str, bytes], public: bool = False, space: bool = False) -> str:
    """Uploads the files in one commit, into a model's repository or a static Space, and says where they are.

    A new repository is private. ExchangeError if the Hub refuses, and for a public one unless `public`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api, kind, sdk = HfApi(), "space" if space else "model", "static" if space else None
        url = api.create_repo(repository, private=True, exist_ok=True, repo_type=kind, space_sdk=sdk)
        private = bool(api.repo_info(repository, repo_type=kind).private)
        if not private and not public:
            raise ExchangeError(f"{url} is public: nothing was uploaded; to publish there, pass --public")
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        api.create_commit(repository, operations, commit_message="Model of vitface", repo_type=kind)
    except ExchangeError:
        raise
    except Exception as error:  # its own, its HTTP library's, the system's
        reason = str(error).strip().split("\n")[0]
        message = f"the Hub did not take {repository} ({reason}); are you logged in?\n  hf auth login"
        raise ExchangeError(message) from None
    return f"uploaded to {url}, {'a private repository until you open it' if private else 'which is public'}"
