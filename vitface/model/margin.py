"""Margin softmax: embeddings and labels -> loss. All of it runs in float32, whatever the backbone runs in.

A loss is an identity matrix, one learned prototype for each training person (C, E), and a margin: a function of the
cosine between an image and its own person. The identity matrix is biometric data: it stays in the training checkpoint
and is never part of a shared model. Letters: B images, E embedding, C identities.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # a larger floor than torch's 1e-12: an all-zero embedding then has a bounded gradient


class CosFace(nn.Module):
    """cos θ - m (Wang et al. 2018, arXiv:1801.09414, eq. 4): cosines (B,), norms of the embeddings (B,) -> (B,)."""

    def __init__(self, margin: float):
        super().__init__()
        self.margin = margin

    def forward(self, cosine: Tensor, norms: Tensor) -> Tensor:
        return cosine - self.margin


class ArcFace(nn.Module):
    """cos(θ + m) (Deng et al. 2019, arXiv:1801.07698, eq. 3): cosines (B,), norms (B,) -> (B,).

    Past θ + m = π the cosine would rise again; its linear continuation keeps the loss decreasing in cos θ.
    """

    def __init__(self, margin: float):
        super().__init__()
        self.margin = margin

    def forward(self, cosine: Tensor, norms: Tensor) -> Tensor:
        sine = (1 - cosine.square()).clamp_min(0).add(EPS * EPS).sqrt()
        rotated = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        return torch.where(cosine > -math.cos(self.margin), rotated, cosine - self.margin * math.sin(self.margin))


class AdaFace(nn.Module):
    """cos(θ - m ẑ) - m ẑ - m, ẑ = clip(h (|z| - mean |z|) / std |z|, -1, 1), h = 0.333 (Kim et al. 2022,
    arXiv:2204.00964, eq. 9-11): cosines (B,), norms |z| (B,) -> (B,).

    The statistics of the norms are averaged over batches with momentum 0.01 and take no gradient. `whole_batch` turns
    the norms of these images into those of a batch that lies on several devices.
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, margin: float, whole_batch: Callable[[Tensor], Tensor] = lambda norms: norms):
        super().__init__()
        self.margin, self.whole_batch = margin, whole_batch
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_std", torch.tensor(100.0))

    def forward(self, cosine: Tensor, norms: Tensor) -> Tensor:
        with torch.no_grad():
            norms = norms.clamp(1e-3, 100)
            if self.training:
                batch = self.whole_batch(norms)
                self.norm_mean.lerp_(batch.mean(), 0.01)
                self.norm_std.lerp_(batch.std(), 0.01)
            quality = (0.333 * (norms - self.norm_mean) / (self.norm_std + 1e-3)).clamp(-1, 1)
        theta = torch.acos(cosine.clamp(-1 + EPS, 1 - EPS)) - self.margin * quality
        return torch.cos(theta.clamp(EPS, math.pi - EPS)) - self.margin * (1 + quality)


def make_margin(kind: str, margin: float, whole_batch: Callable[[Tensor], Tensor] = lambda norms: norms) -> nn.Module:
    """The margin function "cosface", "arcface" or "adaface"; ValueError for another. AdaFace has `whole_batch`."""
    if kind == "adaface":
        return AdaFace(margin, whole_batch)
    if kind not in ("cosface", "arcface"):
        raise ValueError(f"unknown loss {kind!r}; known: cosface, arcface, adaface")
    return CosFace(margin) if kind == "cosface" else ArcFace(margin)


class MarginLoss(nn.Module):
    """embedding (B, E), labels (B,) in [0, C) -> mean cross-entropy of the scaled cosines, the own one with margin."""

    def __init__(self, margin: nn.Module, num_identities: int, embedding_dim: int, scale: float, seed: int = 0):
        super().__init__()
        self.margin, self.scale, self.num_identities = margin, scale, num_identities
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_identities, embedding_dim, generator=generator) * 0.01)

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        embedding = embedding.float()
        cosine = F.linear(F.normalize(embedding, eps=EPS), F.normalize(self.weight, eps=EPS))  # (B, C)
        rows = torch.arange(len(labels), device=labels.device)
        own = self.margin(cosine[rows, labels], embedding.detach().norm(dim=1))
        return F.cross_entropy(self.scale * cosine.index_put((rows, labels), own), labels)
