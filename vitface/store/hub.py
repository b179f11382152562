"""Models on the Hugging Face Hub: `owner/name`, or `owner/name@revision` for one that never changes."""

import re
from pathlib import Path

from vitface.errors import CheckpointError
from vitface.extras import require

# the only files that are published, and the only ones that are downloaded
BUNDLE_FILES = ("model.safetensors", "model.json", "thresholds.json", "manifest.json", "README.md")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(path: Path) -> bool:
    """True for OWNER/NAME and OWNER/NAME@REVISION, unless there is a folder OWNER here."""
    name, _, revision = path.as_posix().partition("@")
    named = REPOSITORY.fullmatch(name) and re.fullmatch(r"[\w./-]*", revision)
    return bool(named) and not Path(name.split("/")[0]).exists()


def download(path: Path) -> Path:
    """The local copy of a repository's bundle, which huggingface_hub makes in its own cache.

    ConfigError without huggingface_hub; CheckpointError if neither the Hub nor the cache has the repository.
    """
    repository, _, revision = path.as_posix().partition("@")
    missing = f"there is no folder {path} here"
    require(f"{missing}, and the Hub", "huggingface_hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(BUNDLE_FILES)))
    except Exception as error:  # of many kinds, all of which mean that there is no copy
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{missing}, and the Hub gives no {repository} ({reason})") from None
