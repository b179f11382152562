"""How many multiply-adds a face model needs for an image; a step's share of the measured ceiling is computed from it.

A block of N tokens of width D has (4 + m) N D² in its linear layers, m = 8 for an MLP of hidden width 4 D and 12 with
SwiGLU, and 2 N² D in attention. The last block computes proj and MLP for the Q tokens alone that are read:
3 N D² + (1 + m) Q D² + 2 Q N D. An adapter adds K·R (in + out) a token to each of its layers. The router's blocks see
every second row and column of patches.

A training step is 2 of the frozen part (forward, and the gradient of the input; frozen weights have none), 3 of the
adapters and 1 of the router's blocks. Left out: the embedding head, a pool, the margin, what is not a product. A peer
is credited with the same count, though it may compute more.
"""

from vitface.config import FaceConfig
from vitface.model.router import STRIDE


def forward_and_step(config: FaceConfig) -> tuple[int, int]:
    """Multiply-adds of one image: (embedding it, merged if it is plain LoRA; a training step)."""
    vit, dim = config.vit, config.vit.embed_dim
    grid = vit.grid(config.image_size)
    tokens = vit.num_tokens(config.image_size)
    read = tokens if config.head == "patches" or vit.pool != "cls" else 1
    fc1 = vit.mlp_ratio * (2 if vit.act == "swiglu" else 1)  # its outputs in D
    mlp = fc1 + vit.mlp_ratio
    patches = grid**2 * 3 * vit.patch_size**2 * dim
    last = 3 * tokens * dim**2 + (1 + mlp) * read * dim**2 + 2 * read * tokens * dim
    blocks = (vit.depth - 1) * _block(tokens, dim, mlp) + last
    columns = config.lora_rank * config.num_domains
    qkv, others = 4, 2 if config.lora_targets == "attn" else 2 + 2 + mlp  # in + out in D: qkv; proj, fc1, fc2
    adapters = columns * dim * ((vit.depth - 1) * tokens * (qkv + others) + tokens * qkv + read * others)
    router = 0
    if config.num_domains > 1:
        router = config.router_depth * _block(vit.prefix + (-(-grid // STRIDE)) ** 2, dim, mlp)
    embedding = patches + blocks + router + (adapters if config.num_domains > 1 else 0)
    return round(embedding), round(patches + 2 * blocks + 3 * adapters + router)


def _block(tokens: int, dim: int, mlp: float) -> float:
    return (4 + mlp) * tokens * dim**2 + 2 * tokens**2 * dim
