"""The face model, in forward order: tokens -> router -> adapted blocks -> embedding head.

Letters: B images, S input side, N tokens, D width, E embedding, K domains.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

import vitface.kernels.fused as fused
from vitface.config import FaceConfig
from vitface.data.preprocess import normalise, resize, to_float
from vitface.device import DTYPES
from vitface.model import ops
from vitface.model.lora import TARGETS, Mix, add_lora
from vitface.model.router import Router
from vitface.model.vit import ViT

TOKEN_WIDTH = 32


class PretrainedHead(nn.Module):
    """Head "pretrained": what the backbone's own pool makes of its tokens, as it is.

    Every head -> embeddings (B, E), float32: of the pool's numbers (B, D) or, where it `reads_tokens`, of (B, N, D).
    """

    reads_tokens = False

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled.float()


class LinearHead(nn.Module):
    """Head "linear": pool -> Linear."""

    reads_tokens = False

    def __init__(self, pooled_dim: int, embedding_dim: int):
        super().__init__()
        self.proj = nn.Linear(pooled_dim, embedding_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.proj(pooled.float())


class BatchNormHead(nn.Module):
    """Head "bn": pool -> Linear -> BatchNorm1d."""

    reads_tokens = False

    def __init__(self, pooled_dim: int, embedding_dim: int):
        super().__init__()
        self.proj = nn.Linear(pooled_dim, embedding_dim)
        self.norm = nn.BatchNorm1d(embedding_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.proj(pooled.float()))


class PatchesHead(nn.Module):
    """Head "patches": every token (B, N, levels D) -> Linear to 32 values, concatenated -> Linear -> BatchNorm1d."""

    reads_tokens = True

    def __init__(self, embed_dim: int, embedding_dim: int, num_tokens: int, levels: int):
        super().__init__()
        self.reduce = nn.Linear(levels * embed_dim, TOKEN_WIDTH)
        self.proj = nn.Linear(num_tokens * TOKEN_WIDTH, embedding_dim)
        self.norm = nn.BatchNorm1d(embedding_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.proj(rearrange(self.reduce(tokens.float()), "b n d -> b (n d)")))


Head = PretrainedHead | LinearHead | BatchNormHead | PatchesHead


def make_head(config: FaceConfig) -> Head:
    """The embedding head of the kind `config.head`."""
    vit, embedding_dim = config.vit, config.embedding_dim
    if config.head == "patches":
        return PatchesHead(vit.embed_dim, embedding_dim, vit.num_tokens(config.image_size), config.head_levels)
    if config.head == "pretrained":
        return PretrainedHead()
    return (LinearHead if config.head == "linear" else BatchNormHead)(vit.output_dim, embedding_dim)


class FaceOutput(NamedTuple):
    """What a face model computes of B images."""

    embedding: Tensor  # (B, E), float32
    weights: Tensor | None  # of the domains (B, K), each row of sum one; None for plain LoRA
    logits: Tensor | None  # of those weights (B, K)


class FaceModel(nn.Module):
    """Normalised images (B, 3, S, S) -> `FaceOutput`.

    The constructor freezes `vit` and turns it into `config.dtype`. Trained are, in float32, the adapters, the router
    and the head; with `config.train_patch_embed` the patch convolution, with `train_head` the pool. `seed` decides how
    they start.
    """

    def __init__(self, vit: ViT, config: FaceConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.stem: nn.Module | None = None
        self.vit = vit.requires_grad_(False)
        trained = ("patch_embed.",) * config.train_patch_embed + ("pool.",) * config.train_head
        for name, parameter in vit.named_parameters():
            parameter.requires_grad = name.startswith(trained) and ".running_" not in name
            if not name.startswith(trained):
                parameter.data = parameter.data.to(DTYPES[config.dtype])
        if config.lora_rank:
            generator = torch.Generator().manual_seed(seed)
            targets, scale = TARGETS[config.lora_targets], (config.lora_alpha, config.lora_scaling)
            add_lora(vit, targets, config.lora_rank, *scale, config.num_domains, generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.router: nn.Module | None = None
            if config.num_domains > 1:
                sizes = config.vit.embed_dim, config.vit.prefix, config.num_domains, config.router_depth
                self.router = Router(*sizes, config.gate_temperature)
            self.head = make_head(config)
        vit.keep_queries(None if self.head.reads_tokens or config.vit.pool != "cls" else 1)
        self.use_ops(fused)

    def use_ops(self, module: ModuleType) -> None:
        """All layers run the operations of `module` from now on (see `vitface.model.ops.use_ops`)."""
        ops.use_ops(self.vit, module)

    def use_stem(self, stem: nn.Module | None) -> None:
        """`stem` makes the patch embeddings of crops from now on (see `vitface.model.inference`)."""
        self.stem = stem

    def forward(self, images: Tensor, domains: Tensor | None = None) -> FaceOutput:
        return self.embed_tokens(self.vit.tokens(images), domains)

    def embed_tokens(self, tokens: Tensor, domains: Tensor | None = None) -> FaceOutput:
        """The input of the first block (B, N, D), see `tokens` -> `FaceOutput`."""
        weights, logits = self.route(tokens, domains)
        seen = self.vit.encode(tokens, Mix(weights), self.config.head_levels)
        return FaceOutput(self.head(seen if self.head.reads_tokens else self.vit.pool(seen)), weights, logits)

    def route(self, tokens: Tensor, domains: Tensor | None = None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The input of the first block -> domain weights and their logits, (B, K) each; None for plain LoRA."""
        return (None, None) if self.router is None else self.router(tokens, self.vit, domains)

    def tokens(self, crops: Tensor) -> Tensor:
        """Crops, uint8 (B, 112, 112, 3) -> the input of the first block (B, N, D)."""
        if self.stem is not None:
            return self.vit.with_positions(self.stem(crops))
        return self.vit.tokens(self.preprocess(to_float(crops)))

    def preprocess(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W) in [0, 1] -> the input of `forward`, (B, 3, S, S)."""
        vit = self.config.vit
        return normalise(resize(images, self.config.image_size, self.config.resize), vit.mean, vit.std)
