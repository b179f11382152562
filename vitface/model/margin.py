"""Margin softmax: embeddings and labels -> loss. All of it in float32, whatever the backbone runs in.

Each loss holds the identity matrix, one learned prototype per training person, (C, E). It is biometric data: it stays
in the training checkpoint and is never part of a shared model. Letters: B images, E embedding, C identities.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6  # a larger floor than torch's 1e-12: an all-zero embedding then has a bounded gradient


class MarginLoss(nn.Module):
    """embedding (B, E), labels (B,) in [0, C) -> mean cross-entropy of the margin-adjusted, scaled cosines.

    kind "cosface"  s (cos θ_y - m)          Wang et al. 2018, arXiv:1801.09414, eq. 4
    kind "arcface"  s cos(θ_y + m)           Deng et al. 2019, arXiv:1801.07698, eq. 3
    kind "adaface"  s (cos(θ_y - m ẑ) - m ẑ - m), ẑ = clip(h (|z| - mean |z|) / std |z|, -1, 1)
                                             Kim et al. 2022, arXiv:2204.00964, eq. 9-11; batch statistics are averaged
                                             with momentum 0.01 and take no gradient
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, kind: str, num_identities: int, embedding_dim: int, margin: float, scale: float, seed: int = 0):
        super().__init__()
        if kind not in LOSSES:
            raise ValueError(f"unknown loss {kind!r}; known: {', '.join(LOSSES)}")
        generator = torch.Generator().manual_seed(seed)
        self.kind, self.margin, self.scale = kind, margin, scale
        self.weight = nn.Parameter(torch.randn(num_identities, embedding_dim, generator=generator) * 0.01)
        if kind == "adaface":
            self.register_buffer("norm_mean", torch.tensor(20.0))
            self.register_buffer("norm_std", torch.tensor(100.0))

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        embedding = embedding.float()
        cosine = F.linear(F.normalize(embedding, eps=EPS), F.normalize(self.weight, eps=EPS))  # (B, C)
        rows = torch.arange(len(labels), device=labels.device)
        target = LOSSES[self.kind](self, cosine[rows, labels], embedding)
        return F.cross_entropy(self.scale * cosine.index_put((rows, labels), target), labels)

    def _cosface(self, target: Tensor, embedding: Tensor) -> Tensor:
        return target - self.margin

    def _arcface(self, target: Tensor, embedding: Tensor) -> Tensor:
        sine = (1 - target.square()).clamp_min(0).add(EPS * EPS).sqrt()
        rotated = target * math.cos(self.margin) - sine * math.sin(self.margin)
        # past θ + m = π the cosine would rise again; the linear continuation keeps the loss decreasing in cos θ
        return torch.where(target > -math.cos(self.margin), rotated, target - self.margin * math.sin(self.margin))

    def _adaface(self, target: Tensor, embedding: Tensor, concentration: float = 0.333) -> Tensor:
        with torch.no_grad():
            norms = embedding.norm(dim=1).clamp(1e-3, 100)
            if self.training:
                self.norm_mean.lerp_(norms.mean(), 0.01)
                self.norm_std.lerp_(norms.std(), 0.01)
            quality = (concentration * (norms - self.norm_mean) / (self.norm_std + 1e-3)).clamp(-1, 1)
        theta = torch.acos(target.clamp(-1 + EPS, 1 - EPS)) - self.margin * quality
        return torch.cos(theta.clamp(EPS, math.pi - EPS)) - self.margin * (1 + quality)


LOSSES = {"cosface": MarginLoss._cosface, "arcface": MarginLoss._arcface, "adaface": MarginLoss._adaface}
