"""Where fetched and packed files are kept between runs."""

import os
from pathlib import Path


def cache_home() -> Path:
    """$VITFACE_HOME, default ~/.cache/vitface."""
    return Path(os.environ.get("VITFACE_HOME", "~/.cache/vitface")).expanduser()
