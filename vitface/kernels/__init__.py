"""The fused layers. Their files lie in kernels/ at the top of a clone; in a wheel they lie in this folder."""

from pathlib import Path

_CLONE = Path(__file__).parents[2]
if (_CLONE / "pyproject.toml").is_file():
    __path__.append(str(_CLONE / "kernels"))
