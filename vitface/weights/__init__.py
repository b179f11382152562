"""Published weights: key maps, sources, conversion, and vit_nano.

Their files lie in weights/ at the top of a clone; in a wheel they lie in this folder.
"""

from pathlib import Path

_CLONE = Path(__file__).parents[2]
if (_CLONE / "pyproject.toml").is_file():
    __path__.append(str(_CLONE / "weights"))
