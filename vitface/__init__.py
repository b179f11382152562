"""Face recognition from a frozen foundation ViT and low-rank adapters (LoRA, DA-LoRA).

import vitface
model = vitface.load("runs/a")            # a run (its best checkpoint) or one checkpoint directory
embeddings = model.embed(["a.jpg", "b.jpg"])          # float32 (2, E), unit norm
score = embeddings[0] @ embeddings[1]                 # cosine
"""

__all__ = ["__version__", "load", "load_backbone"]

from vitface.model.store import load_backbone
from vitface.model.store import load_face as load
from vitface.version import __version__
