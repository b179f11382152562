"""Face recognition from a frozen foundation ViT and low-rank adapters (LoRA, DA-LoRA)."""

__version__ = "0.1.0"
