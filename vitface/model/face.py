"""The face model, in forward order: tokens -> gate -> adapted blocks -> embedding head.

Letters: B images, S input side, N tokens, D width, E embedding, K domains.
"""

import dataclasses

import torch
from einops import rearrange
from torch import Tensor, nn

from vitface.config import FaceConfig
from vitface.data.preprocess import normalise, resize, to_float
from vitface.errors import ConfigError
from vitface.model.lora import TARGETS, add_lora, use_impl
from vitface.model.router import DomainClassifier, FixedGate, thin_out
from vitface.model.vit import ViT

TOKEN_WIDTH = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EmbeddingHead(nn.Module):
    """Tokens (B, N, levels D) of `ViT.encode` -> embedding (B, E), float32.

    "cls"      the CLS token as it is, E = D (no parameters)
    "linear"   CLS -> Linear
    "bn"       CLS -> Linear -> BatchNorm1d
    "patches"  every token -> Linear levels D -> 32, concatenated -> Linear -> BatchNorm1d
    """

    def __init__(self, kind: str, embed_dim: int, num_tokens: int, embedding_dim: int, levels: int = 1):
        super().__init__()
        self.reduce = nn.Linear(levels * embed_dim, TOKEN_WIDTH) if kind == "patches" else None
        width = num_tokens * TOKEN_WIDTH if kind == "patches" else embed_dim
        self.proj = nn.Identity() if kind == "cls" else nn.Linear(width, embedding_dim)
        self.norm = nn.BatchNorm1d(embedding_dim) if kind in ("bn", "patches") else nn.Identity()
        self.queries = None if kind == "patches" else 1  # leading tokens that are read

    def forward(self, tokens: Tensor) -> Tensor:
        if self.reduce is None:
            return self.norm(self.proj(tokens[:, 0].float()))
        return self.norm(self.proj(rearrange(self.reduce(tokens.float()), "b n d -> b (n d)")))


class FaceModel(nn.Module):
    """Normalised images (B, 3, S, S) -> embedding (B, E) float32 and the router's logits (B, K), None for plain LoRA.

    `vit` is frozen here, in `config.dtype`; adapters, router and head are float32 and the only trained parameters,
    with the patch convolution if `config.train_patch_embed`.
    """

    def __init__(self, vit: ViT, config: FaceConfig, impl: str = "auto", seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = config
        self.stem: nn.Module | None = None  # see `vitface.model.inference`
        self.vit = vit.requires_grad_(False)
        for name, parameter in vit.named_parameters():
            if not (config.train_patch_embed and name.startswith("patch_embed.")):
                parameter.data = parameter.data.to(DTYPES[config.dtype])
        use_impl(vit, impl)
        if config.lora_rank:
            add_lora(
                vit, TARGETS[config.lora_targets], config.lora_rank, config.lora_alpha, config.lora_scaling,
                config.num_domains, generator,
            )  # fmt: skip
        if config.train_patch_embed:
            vit.patch_embed.requires_grad_(True)
        dim = config.vit.embed_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.router = None
            if config.num_domains > 1 and config.gate in ("uniform", "random"):
                self.router = FixedGate(config.gate, config.num_domains)
            elif config.num_domains > 1:
                self.router = DomainClassifier(dim, config.num_domains)
            num_tokens = vit.pos_embed.shape[1]
            self.head = EmbeddingHead(config.head, dim, num_tokens, config.embedding_dim, config.head_levels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.read(self.vit.tokens(images))

    def tokens(self, crops: Tensor) -> Tensor:
        """Crops, uint8 (B, 112, 112, 3) -> what enters the first block, (B, N, D)."""
        if self.stem is not None:
            return self.vit.with_positions(self.stem(crops))
        return self.vit.tokens(self.preprocess(to_float(crops)))

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What enters the first block -> what `forward` returns."""
        logits = self.route(tokens)
        seen = self.vit.encode(tokens, self.gate(logits), self.head.queries, self.config.head_levels)
        return self.head(seen), logits

    def gate(self, logits: Tensor | None) -> Tensor | None:
        """Domain logits (B, K) -> the weights that the blocks use, (B, K), rows sum to one; None for plain LoRA.

        The control "shuffled" hands each image the weights of the one half a batch further on: the only gate, and the
        only part of the project, that depends on the company of an image.
        """
        if logits is None:
            return None
        gate = self.mix(logits)
        return gate.roll(max(len(gate) // 2, 1), 0) if self.config.gate == "shuffled" else gate

    def mix(self, logits: Tensor) -> Tensor:
        """Domain logits (B, K) -> domain weights (B, K): softmax(logits / temperature)."""
        return (logits / self.config.gate_temperature).softmax(dim=1)

    def route(self, tokens: Tensor) -> Tensor | None:
        """What enters the first block (B, N, D) -> domain logits (B, K), None for plain LoRA."""
        if self.router is None:
            return None
        depth = 0 if isinstance(self.router, FixedGate) else self.config.router_depth
        with torch.no_grad():
            tokens = thin_out(tokens)
            for block in self.vit.blocks[:depth]:
                tokens = block(tokens, adapted=False)
        return self.router(tokens[:, 1:].mean(dim=1))

    def preprocess(self, images: Tensor) -> Tensor:
        """float (B, 3, H, W) in [0, 1] -> what `forward` takes, (B, 3, S, S)."""
        vit = self.config.vit
        return normalise(resize(images, self.config.image_size, self.config.resize), vit.mean, vit.std)


def shuffle_gate(model: FaceModel) -> FaceModel:
    """The model itself, from now on with each image's domain weights given to another image.

    ConfigError unless it is DA-LoRA with a router that learned.
    """
    if model.config.num_domains == 1 or model.config.gate != "learned":
        raise ConfigError("only a DA-LoRA model with a learned gate can be evaluated with it shuffled")
    model.config = dataclasses.replace(model.config, gate="shuffled")
    return model
