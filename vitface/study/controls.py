"""The controls of DA-LoRA: routers that do not choose by the image.

Each changes a face model in place, before it is trained and again before it is evaluated. The comparison with them
shows how much DA-LoRA gains from the choice, and how much from its number of parameters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitface.errors import ConfigError
from vitface.model.face import FaceModel
from vitface.model.router import Router
from vitface.model.vit import ViT


def uniform_gate(model: FaceModel, seed: int = 0) -> None:
    """Every domain has the weight 1 / K for every image: the last layer of the router is zero, and is not trained."""
    _fix(model, torch.zeros_like)


def random_gate(model: FaceModel, seed: int = 0) -> None:
    """All images have the same domain weights, the softmax of K normal numbers that `seed` decides; not trained."""
    generator = torch.Generator().manual_seed(seed)
    _fix(model, lambda bias: torch.randn(bias.shape, generator=generator))


@torch.no_grad()
def _fix(model: FaceModel, logits) -> None:
    router = _router_of(model).requires_grad_(False)
    router.fc2.weight.zero_()
    router.fc2.bias.copy_(logits(router.fc2.bias))


class ShuffledRouter(Router):
    """A router that gives each image the domain weights of the image half a batch further on; mirror images count, so
    that the one image of a batch of one has its own."""

    def forward(self, tokens: Tensor, vit: ViT, domains: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, logits = super().forward(tokens, vit)
        return weights.roll(max(len(weights) // 2, 1), 0), logits


def shuffled_gate(model: FaceModel, seed: int = 0) -> None:
    """Each image has the domain weights of another image of its batch."""
    _router_of(model).__class__ = ShuffledRouter


class KnownRouter(Router):
    """A router that is told the domain of each image, and gives it that one alone; where nothing is told, `domain`."""

    domain, shift = 0, 0

    def forward(self, tokens: Tensor, vit: ViT, domains: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if domains is None:
            domains = torch.full((len(tokens),), self.domain, device=tokens.device)
        weights = F.one_hot(domains.roll(self.shift), self.fc2.out_features).float()
        return weights, weights


def known_gate(model: FaceModel, seed: int = 0) -> None:
    """Each image has the adapter of its known domain, and no other: the oracle of all routers; not trained."""
    _router_of(model).requires_grad_(False).__class__ = KnownRouter


class ShiftedRouter(KnownRouter):
    """A router that gives each image the known domain of the one before it in its batch."""

    shift = 1


def known_gate_shuffled(model: FaceModel, seed: int = 0) -> None:
    """Each image has the adapter of another one's known domain; not trained."""
    _router_of(model).requires_grad_(False).__class__ = ShiftedRouter


def _router_of(model: FaceModel) -> Router:
    """ConfigError unless the model has a router that can be replaced by a control."""
    if type(model.router) is not Router:
        raise ConfigError("a control of the gate is for a DA-LoRA model with a router of its own")
    return model.router


CONTROLS = {"uniform": uniform_gate, "random": random_gate, "shuffled": shuffled_gate}
