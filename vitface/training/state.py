"""What training needs beyond the model, as tensors by name: the identity matrix and the optimiser's moments."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vitface.model.store import read_tensors

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def training_tensors(margin: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """margin.NAME, and optimizer.I.MOMENT of the I-th parameter in the order of its groups."""
    moments = {
        f"optimizer.{i}.{key}": value
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    return {**_margin_tensors(margin), **moments}


def read_training(path: Path, margin: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The training tensors in a file; CheckpointError unless they are those of this margin and this optimiser."""
    expected = _margin_tensors(margin)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for i, parameter in enumerate(parameters):
        shapes = (torch.tensor(0.0), parameter, parameter)
        expected |= {f"optimizer.{i}.{key}": like for key, like in zip(MOMENTS, shapes, strict=True)}
    return read_tensors(path, expected)


def load_training(tensors: dict[str, Tensor], margin: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts what `read_training` gave in its place."""
    margin.load_state_dict({name: tensors[f"margin.{name}"] for name in margin.state_dict()})
    whole = optimizer.state_dict()
    count = sum(len(group["params"]) for group in whole["param_groups"])
    state = {i: {key: tensors[f"optimizer.{i}.{key}"] for key in MOMENTS} for i in range(count)}
    optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})


def _margin_tensors(margin: nn.Module) -> dict[str, Tensor]:
    return {f"margin.{name}": value for name, value in margin.state_dict().items()}
