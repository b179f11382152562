"""The face model, in forward order: tokens -> gate -> adapted blocks -> embedding head.

Letters: B images, S input side, N tokens, D width, E embedding, K domains.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vitface.config import FaceConfig
from vitface.data.faces.detect import FaceDetector
from vitface.data.faces.photos import CropReader, Photo
from vitface.data.images import CROP_SIZE
from vitface.data.preprocess import normalise, resize, to_float
from vitface.errors import ConfigError
from vitface.model.lora import TARGETS, add_lora, use_impl
from vitface.model.router import DomainClassifier, FixedGate, thin_out
from vitface.model.vit import ViT
from vitface.store.thresholds import Verdict, choose_threshold

TOKEN_WIDTH = 32
CPU_BATCH = 16  # images whose activations stay in the caches: ViT-S at 224 px embeds 1.3x as many as in batches of 128
GPU_BATCH = 128
Images = np.ndarray | Tensor | Sequence[Photo]
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
    with the patch convolution if `config.train_patch_embed`. `thresholds` {FAR: cosine} is what two embeddings have to
    reach to be called the same person at that false accept rate, where the run calibrated it.
    """

    def __init__(self, vit: ViT, config: FaceConfig, impl: str = "auto", seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.config = config
        self.thresholds: dict[float, float] = {}
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

    @torch.no_grad()
    def embed(
        self, images: Images, flip: bool = True, batch_size: int | None = None, align: bool | FaceDetector = False
    ) -> np.ndarray:
        """Aligned faces -> float32 (B, E), unit norm: uint8 (B, 112, 112, 3) RGB, or a list of paths, PIL images or
        uint8 (H, W, 3) arrays, which are resized if they are square.

        `align=True` is for photos: the face is found and aligned in every image that is not 112 x 112 pixels (see
        `vitface.data.faces.photos.CropReader`). `flip` sums the embeddings of the image and its mirror image before
        normalising, as the field's protocol does. So many images at a time as suit the device unless `batch_size` says
        otherwise. Runs in eval mode; ImageError names a file that cannot be used.
        """
        rows = []
        for batch in self._batches(images, batch_size, align):
            embedding = self.read(self.tokens(batch))[0]
            if flip:
                embedding = embedding + self.read(self.tokens(batch.flip(2)))[0]
            rows.append(F.normalize(embedding, dim=1).cpu())
        return torch.cat(rows).numpy() if rows else np.zeros((0, self.config.embedding_dim), np.float32)

    def verify(
        self, first: Photo, second: Photo, far: float | None = None, align: bool | FaceDetector = False
    ) -> Verdict:
        """Do two images, a path, PIL image or uint8 (H, W, 3) each, show the same person? The cosine, in [-1, 1], and
        what `thresholds` say of it.

        `far` is one of the calibrated false accept rates, by default the lowest. Without thresholds the verdict has a
        score and no answer (`threshold`, `far` and `same` are None); then a `far` is a ConfigError. `align` and the
        other errors are those of `embed`.
        """
        threshold = choose_threshold(self.thresholds, far)
        rows = self.embed([first, second], align=align)
        return Verdict(float(rows[0] @ rows[1]), *threshold)

    @torch.no_grad()
    def domain_weights(self, images: Images, batch_size: int | None = None) -> np.ndarray:
        """The router's weights for each image, float32 (B, K), rows sum to one; ones (B, 1) for plain LoRA."""
        rows = []
        for batch in self._batches(images, batch_size):
            logits = self.route(self.tokens(batch))
            rows.append(torch.ones(len(batch), 1) if logits is None else self.mix(logits).cpu())
        return torch.cat(rows).numpy() if rows else np.zeros((0, self.config.num_domains), np.float32)

    @torch.no_grad()
    def attention(self, images: Images, block: int = -1) -> np.ndarray:
        """Where CLS looks in one block: float32 (B, nh, g, g) over the patch grid, from the adapted model."""
        rows = []
        for batch in self._batches(images, None):
            inputs = self.preprocess(to_float(batch))
            logits = self.route(self.vit.tokens(inputs))
            maps = self.vit.attention(inputs, self.gate(logits), block)
            rows.append(
                rearrange(maps[:, :, 0, 1:], "b nh (h w) -> b nh h w", h=self.config.vit.grid(inputs.shape[-1]))
            )
        side, heads = self.config.vit.grid(self.config.image_size), self.config.vit.num_heads
        return torch.cat(rows).cpu().numpy() if rows else np.zeros((0, heads, side, side), np.float32)

    def _batches(self, images: Images, batch_size: int | None, align: bool | FaceDetector = False) -> Iterator[Tensor]:
        """uint8 (B, 112, 112, 3) on the model's device, `batch_size` at a time."""
        if self.training:
            raise RuntimeError("call model.eval() first: batch norm would mix the images of a batch")
        if isinstance(images, str | Path):
            raise TypeError(f"images must be a list, even of one: [{str(images)!r}]")
        as_crop, device = CropReader(align), self.vit.pos_embed.device
        batch_size = batch_size or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            if not isinstance(chunk, Tensor):
                chunk = torch.from_numpy(np.stack([as_crop(item) for item in chunk]))
            if chunk.shape[1:] != (CROP_SIZE, CROP_SIZE, 3):
                raise ValueError(f"images must be uint8 (B, 112, 112, 3), not {tuple(chunk.shape)}")
            yield chunk.to(device)


def shuffle_gate(model: FaceModel) -> FaceModel:
    """The model itself, from now on with each image's domain weights given to another image.

    ConfigError unless it is DA-LoRA with a router that learned.
    """
    if model.config.num_domains == 1 or model.config.gate != "learned":
        raise ConfigError("only a DA-LoRA model with a learned gate can be evaluated with it shuffled")
    model.config = dataclasses.replace(model.config, gate="shuffled")
    return model
