"""What only some commands need: the libraries of pyproject.toml's extras, and the face detector."""

import importlib.util

from vitface.errors import ConfigError

YUNET_SHA256 = "ebafce4e3c118d6554634be5c27ab333b4c047a9a8c3faf1d7cf93101c22f0f0"  # of the fetched face detector
PACKAGES = {"cv2": "opencv-python-headless", "faiss": "faiss-cpu"}  # module -> its package, where that has another name


def require(purpose: str, *modules: str, otherwise: str = "") -> None:
    """ConfigError, with the command that installs them, if some of these modules are missing.

    The message ends with `otherwise`, another way to reach the `purpose`.
    """
    missing = [PACKAGES.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{purpose} needs {', '.join(missing)}:\n  pip install {' '.join(missing)}{otherwise}")
