"""Models on the Hugging Face Hub: `hf://owner/name`, or `hf://owner/name@revision` for one that never changes.

Without the prefix a name is a folder here: a mistyped one is never looked for on the Hub, where anybody may have an
account of that name.
"""

import re
import sys
from pathlib import Path

from vitface.errors import CheckpointError
from vitface.extras import require

# the only files that are published, and the only ones that are downloaded
BUNDLE_FILES = ("model.safetensors", "model.json", "thresholds.json", "manifest.json", "README.md")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def is_repository(path: Path) -> bool:
    """True for hf://..., whose second slash a Path drops."""
    return path.parts[:1] == ("hf:",)


def download(path: Path) -> Path:
    """The local copy of a repository's bundle, which huggingface_hub makes in its own cache; says whose it is.

    ConfigError without huggingface_hub; CheckpointError for another form than hf://OWNER/NAME[@REVISION], and if
    neither the Hub nor the cache has the repository.
    """
    repository, _, revision = path.as_posix().removeprefix("hf:/").lstrip("/").partition("@")
    if not REPOSITORY.fullmatch(repository) or not re.fullmatch(r"[\w./-]*", revision) or ".." in path.as_posix():
        raise CheckpointError(f"hf://{repository} is not the name of a model on the Hub; write hf://OWNER/NAME")
    require(f"hf://{repository}", "huggingface_hub")
    from huggingface_hub import snapshot_download

    try:
        copy = Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(BUNDLE_FILES)))
    except Exception as error:  # of many kinds, all of which mean that there is no copy
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"the Hub gives no {repository} ({reason})") from None
    owner, name = repository.split("/")
    print(f"model: {name} of the Hub's account {owner}, commit {copy.name}", file=sys.stderr)
    return copy
