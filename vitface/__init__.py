"""Face recognition from a frozen foundation ViT and low-rank adapters (LoRA, DA-LoRA).

import vitface
model = vitface.load("runs/a")                        # a run (its best checkpoint) or one checkpoint directory
embeddings = model.embed(["a.jpg", "b.jpg"])          # float32 (2, E), unit norm
verdict = model.verify("a.jpg", "b.jpg", align=True)  # photos: score, threshold, far, same
gallery = vitface.Gallery(model.config.embedding_dim)
gallery.add(["a", "b"], embeddings)
gallery.search(embeddings, k=2)                       # for each row: the most alike names, and their cosines
"""

__all__ = ["Gallery", "__version__", "load", "load_backbone"]

from vitface.gallery.gallery import Gallery
from vitface.store.backbones import load_backbone
from vitface.store.faces import load_face as load
from vitface.version import __version__
