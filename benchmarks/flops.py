"""How many multiply-adds a face model needs for an image; a step's share of the measured ceiling is computed from it.

A block of N tokens of width D has 12 N D² in its four linear layers and 2 N² D in attention. The last block computes
proj and MLP for the Q tokens alone that the head reads: 3 N D² + 9 Q D² + 2 Q N D. An adapter adds K·R (in + out) a
token to each of its layers. The router's blocks see every second row and column of patches.

A training step is 2 of the frozen part (forward, and the gradient of the input; frozen weights have none), 3 of the
adapters and 1 of the router's blocks. Left out: the embedding head, the margin, what is not a product. A peer is
credited with the same count, though it may compute more.
"""

from vitface.config import FaceConfig
from vitface.model.router import STRIDE


def forward_and_step(config: FaceConfig) -> tuple[int, int]:
    """Multiply-adds of one image: (embedding it, merged if it is plain LoRA; a training step)."""
    vit, dim = config.vit, config.vit.embed_dim
    grid = vit.grid(config.image_size)
    tokens = 1 + grid**2
    read = tokens if config.head == "patches" else 1
    patches = grid**2 * 3 * vit.patch_size**2 * dim
    last = 3 * tokens * dim**2 + 9 * read * dim**2 + 2 * read * tokens * dim
    blocks = (vit.depth - 1) * _block(tokens, dim) + last
    columns = config.lora_rank * config.num_domains
    qkv, others = 4, 2 if config.lora_targets == "attn" else 2 + 5 + 5  # in + out in D: qkv; proj, fc1, fc2
    adapters = columns * dim * ((vit.depth - 1) * tokens * (qkv + others) + tokens * qkv + read * others)
    router = 0
    if config.num_domains > 1:
        router = config.router_depth * _block(1 + (-(-grid // STRIDE)) ** 2, dim)
    embedding = patches + blocks + router + (adapters if config.num_domains > 1 else 0)
    return embedding, patches + 2 * blocks + 3 * adapters + router


def _block(tokens: int, dim: int) -> int:
    return 12 * tokens * dim**2 + 2 * tokens**2 * dim
