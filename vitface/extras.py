"""The libraries that only some commands need: the extras of pyproject.toml."""

import importlib.util

from vitface.errors import ConfigError

PACKAGES = {"cv2": "opencv-python-headless"}  # module -> its package, where that has another name


def require(purpose: str, *modules: str, otherwise: str = "") -> None:
    """ConfigError, with the command that installs them, if some of these modules are missing.

    The message ends with `otherwise`, another way to reach the `purpose`.
    """
    missing = [PACKAGES.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{purpose} needs {', '.join(missing)}:\n  pip install {' '.join(missing)}{otherwise}")
