"""What training needs beyond the model, as tensors by name: the identity matrix and the optimiser's moments.

A sharded identity matrix is not among them: `identity_files` keeps its rows and their moments.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vitface.store.tensors import read_tensors
from vitface.training.ranks.parallel import Shard

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


def training_tensors(margin: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """margin.NAME, and optimizer.I.MOMENT of the I-th parameter in the order of its groups."""
    state = optimizer.state_dict()["state"]
    moments = {
        f"optimizer.{i}.{key}": state[i][key]
        for i, parameter in _parameters(optimizer)
        for key in _kept(parameter)
        if i in state  # not before the first step
    }
    return {**_margin_tensors(margin), **moments}


def read_training(path: Path, margin: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The training tensors in a file; CheckpointError unless they are those of this margin and this optimiser."""
    expected = _margin_tensors(margin)
    for i, parameter in _parameters(optimizer):
        shapes = (torch.tensor(0.0), parameter, parameter)
        expected |= {f"optimizer.{i}.{key}": like for key, like in zip(_kept(parameter), shapes, strict=False)}
    return read_tensors(path, expected)


def load_training(tensors: dict[str, Tensor], margin: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts what `read_training` gave in its place."""
    margin.load_state_dict({name[7:]: tensors[name] for name in _margin_tensors(margin)}, strict=False)
    state = {i: {key: tensors[f"optimizer.{i}.{key}"] for key in _kept(p)} for i, p in _parameters(optimizer)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> Iterable[tuple[int, nn.Parameter]]:
    return enumerate(parameter for group in optimizer.param_groups for parameter in group["params"])


def _kept(parameter: nn.Parameter) -> tuple[str, ...]:
    return MOMENTS[:1] if isinstance(parameter, Shard) else MOMENTS


def _margin_tensors(margin: nn.Module) -> dict[str, Tensor]:
    shards = {name for name, parameter in margin.named_parameters() if isinstance(parameter, Shard)}
    return {f"margin.{name}": value for name, value in margin.state_dict().items() if name not in shards}
