"""Face recognition from a frozen foundation ViT and low-rank adapters (LoRA, DA-LoRA).

import vitface
model = vitface.load("runs/a")                        # a run (its best checkpoint) or one checkpoint directory
embeddings = model.embed(["a.jpg", "b.jpg"])          # float32 (2, E), unit norm
verdict = model.verify("a.jpg", "b.jpg")                # photos or crops: score, threshold, far, same
gallery = vitface.Gallery(model.config.embedding_dim)
gallery.add(["a", "b"], embeddings)
gallery.search(embeddings, k=2)                       # for each row: the most alike names, and their cosines
"""

__all__ = ["Gallery", "__version__", "load", "load_backbone"]

import importlib
from typing import TYPE_CHECKING, Any

from vitface.version import __version__

if TYPE_CHECKING:
    from vitface.gallery.gallery import Gallery
    from vitface.recogniser import load
    from vitface.store.backbone import load_backbone

# name -> (module, its name there); imported when first used, so that `vitface --help` does not wait for torch
_PLACES = {
    "Gallery": ("vitface.gallery.gallery", "Gallery"),
    "load": ("vitface.recogniser", "load"),
    "load_backbone": ("vitface.store.backbone", "load_backbone"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    globals()[name] = value = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
