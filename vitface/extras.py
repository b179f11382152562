"""Libraries that only some commands need: those of the extras in pyproject.toml."""

import importlib.util

from vitface.errors import ConfigError

PACKAGES = {"cv2": "opencv-python-headless"}  # what provides a module, where that has another name


def require(purpose: str, *modules: str, otherwise: str = "") -> None:
    """ConfigError with the command that installs what `purpose` lacks of these modules; `otherwise`: another way."""
    missing = [PACKAGES.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{purpose} needs {', '.join(missing)}:\n  pip install {' '.join(missing)}{otherwise}")
