"""benchmarks/memory.py: its count, on a module whose saved bytes are known by hand."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import memory
import train_step


class Squares(torch.nn.Module):
    """(B, 3, S, S) -> (B, E): keeps what it squares, S² numbers of an image."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        x = self.weight * images.mean(1).flatten(1)
        return torch.nn.functional.pad(x**2, (0, train_step.EMBEDDING - x.shape[1]))


@pytest.mark.parametrize("side", [4, 16])
def test_bytes_of_an_image(side):
    small, large = memory.saved(Squares(), side, False), memory.saved(Squares(), 2 * side if side == 4 else 8, False)
    # the factor of the weight, and what is squared: two float32 maps of S²
    assert abs(large - small) == 2 * 4 * abs((2 * side if side == 4 else 8) ** 2 - side**2)
