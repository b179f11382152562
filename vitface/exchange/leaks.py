"""Keeps a published model free of backbones, identity matrices, embeddings, images, names, paths and secrets.

A bundle has five files. Four of them must be, byte for byte, what this version writes for the model that they describe,
which leaves no room for anything else. The fifth is the card, which people write: it is searched.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from vitface.credentials import find_secret
from vitface.errors import ExchangeError, VitfaceError
from vitface.exchange.bundle import face_files
from vitface.store.faces import open_checkpoint
from vitface.store.hub import BUNDLE_FILES

CARD = "README.md"
MAX_CARD_BYTES = 1 << 15
MAX_DECIMALS = 100  # numbers of four decimals and more: a full table of results has about forty
FORBIDDEN = {
    "an image": r"!\[|<(?:img|svg|picture|object|iframe)\b|data:[\w/+.-]*[;,]",
    "a path on a machine": r"(?<![\w/.:])(?:/(?:home|Users|root|mnt|media|data|tmp|var|srv|opt)/|~/|[A-Za-z]:\\)\S",
    "a word of over 200 characters": r"\S{201}",
}


def check_bundle(folder: Path, weights: str | None = None, people: Sequence[str] = ()) -> dict[str, bytes]:
    """The files of a bundle by name, the card last; ExchangeError names the first thing that must not be published.

    `people` are names that the card must not hold.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ExchangeError(f"{folder} is no folder of a model")
    for entry in sorted(folder.iterdir()):
        if entry.name not in BUNDLE_FILES or entry.is_symlink() or not entry.is_file():
            raise ExchangeError(f"{entry} is not part of a model; nothing is published with it there")
    try:
        checkpoint = open_checkpoint(folder, weights)
        expected = face_files(checkpoint.load(), checkpoint.backbone, checkpoint.calibration)
    except VitfaceError as error:
        raise ExchangeError(f"{error}; it is not published") from None
    if not re.fullmatch(r"random|[0-9a-f]{64}", checkpoint.config.weights_sha256):
        raise ExchangeError(f"{folder}/model.json: weights_sha256 is no SHA-256")
    found = {name: (folder / name).read_bytes() for name in BUNDLE_FILES if (folder / name).is_file()}
    card = found.pop(CARD, b"")
    for name in BUNDLE_FILES[:-1]:
        if found.get(name) != expected.get(name):
            fault = f"{folder / name} is not what vitface writes for this model"
            raise ExchangeError(f"{fault}, and may hold more than it: remove {folder} and publish again")
    check_card(card, people)
    return {**found, CARD: card}


def check_card(card: bytes, people: Sequence[str] = ()) -> None:
    """ExchangeError if a card is missing, too large, not text, or holds an image, a path, a secret or a name."""
    if not 0 < len(card) <= MAX_CARD_BYTES:
        raise ExchangeError(f"{CARD} has {len(card):,} bytes; a card has at most {MAX_CARD_BYTES:,}, and at least one")
    try:
        text = card.decode()
    except UnicodeDecodeError:
        raise ExchangeError(f"{CARD} is no text") from None
    kinds = [kind for kind, pattern in FORBIDDEN.items() if re.search(pattern, text)]
    secret = find_secret(text)
    kinds += [secret] if secret else []
    kinds += ["a list of numbers"] if len(re.findall(r"\d\.\d{4,}", text)) > MAX_DECIMALS else []
    words = re.sub(r"\W|_", " ", text)
    for name in (re.sub(r"\W|_", " ", name).strip() for name in people):
        if re.search(r"[^\W\d]{3}", name) and f" {name} " in f" {words} ":
            kinds.append(f"the name of somebody in the training data ({name})")
    if kinds:
        raise ExchangeError(f"{CARD} holds {kinds[0]}; take it out, the card is public")
