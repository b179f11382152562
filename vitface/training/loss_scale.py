"""Loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740), so that small gradients do not become zero.

The loss is multiplied by a power of two before the backward pass, and the gradients are divided by it afterwards. A
step whose gradients overflow is skipped and halves the scale; GROWTH good steps in a row double it. The rule is that of
`torch.amp.GradScaler`, and tests compare the two. But torch's decides on each rank alone; this one gets the decision of
all ranks. Nothing here waits for the device.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

START, GROWTH = 2.0**16, 2000  # torch's


class LossScale:
    """The scale and the number of good steps since it changed, tensors on the device; no effect unless `enabled`."""

    def __init__(self, enabled: bool, device: torch.device):
        self.enabled = enabled
        self.scale = torch.tensor(START, device=device)
        self.held = torch.zeros((), device=device)

    def __call__(self, loss: Tensor) -> Tensor:
        return loss * self.scale if self.enabled else loss

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divides gradients, in place."""
        if self.enabled:
            inverse = self.scale.reciprocal()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(inverse)

    def update(self, skipped: Tensor) -> None:
        """After a step that was `skipped` (1.0) or taken (0.0)."""
        if not self.enabled:
            return
        self.held.add_(1).mul_(1 - skipped)
        grown = (self.held == GROWTH).float()
        self.scale.mul_((1 - skipped / 2) * (1 + grown))  # arithmetic: torch.where would copy its numbers to the device
        self.held.mul_(1 - grown)
