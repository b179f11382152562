"""The state of a training run, and how a checkpoint saves and restores it.

It is the trained part of the face model, the identity matrix, the optimizer state, the loss scale and the progress. A
sharded identity matrix has files of its own (see `vitface.training.ranks.identity_files`).
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitface.model.face import FaceModel
from vitface.model.margin import MarginLoss
from vitface.store.faces import load_trained, trained_tensors
from vitface.store.tensors import read_tensors, tensor_bytes
from vitface.training.loss_scale import LossScale
from vitface.training.ranks.identities import ShardedMargin
from vitface.training.ranks.identity_files import identity_files, read_identities
from vitface.training.ranks.parallel import Shard
from vitface.training.ranks.process_group import rank
from vitface.training.runs.checkpoint import save_checkpoint

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter
Margin = MarginLoss | ShardedMargin


@dataclasses.dataclass
class Progress:
    """The counters of a run. `epoch` epochs are done and judged; `step` may be in the middle of the next one."""

    step: int = 0
    epoch: int = 0
    first_step: int = 0  # of the current epoch
    epoch_loss: float = 0.0  # summed over the steps of the current epoch
    best_epoch: int = 0
    best_auc: float = -1.0
    skipped: int = 0  # steps of fp16 whose gradients overflowed
    skipped_in_a_row: int = 0
    finished: bool = False

    @property
    def steps_into_epoch(self) -> int:
        return self.step - self.first_step

    def restart_epoch(self) -> None:
        """The current epoch starts again with the next step."""
        self.first_step, self.epoch_loss = self.step, 0.0


@dataclasses.dataclass
class TrainingState:
    """The state of a run between two steps."""

    model: FaceModel
    margin: Margin
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    progress: Progress = dataclasses.field(default_factory=Progress)

    def save(self, run_dir: Path, facts: dict[str, Any], is_best: bool) -> None:
        """Writes the checkpoint of this step, with the `facts` that resuming compares. All ranks must call it."""
        margin = self.margin
        more_files = identity_files(margin, self.optimizer) if isinstance(margin, ShardedMargin) else iter(())
        if rank() == 0:
            counters = {"progress": dataclasses.asdict(self.progress), "loss_scale": self.loss_scale.state()}
            save_checkpoint(
                run_dir,
                self.progress.step,
                trained_tensors(self.model),
                dataclasses.asdict(self.model.config),
                training_tensors(margin, self.optimizer),
                {**counters, "is_best": is_best, **facts},
                is_best,
                more_files,
            )
        for _ in more_files:  # if the step was there already, rank 0 has not asked for them, but the others still send
            pass

    def restore(self, checkpoint: Path, counters: dict[str, Any]) -> None:
        """Loads the tensors of a verified checkpoint, and its `counters`.

        CheckpointError, with the state unchanged, if the tensors are those of another model.
        """
        tensors = read_training(checkpoint / "training.safetensors", self.margin, self.optimizer)
        load_trained(self.model, checkpoint / "model.safetensors")
        load_training(tensors, self.margin, self.optimizer)
        if isinstance(self.margin, ShardedMargin):
            self.margin.load_rows(self.optimizer, read_identities(checkpoint, self.margin))
        self.loss_scale.load(counters["loss_scale"])
        self.progress = Progress(**counters["progress"])

    def sha256(self) -> str:
        """The SHA-256 of the trained tensors and the optimizer state, without a sharded identity matrix."""
        tensors = {**trained_tensors(self.model), **training_tensors(self.margin, self.optimizer)}
        return hashlib.sha256(tensor_bytes(tensors)).hexdigest()


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
    """The training tensors in a file; CheckpointError unless they fit this margin and this optimizer."""
    expected = _margin_tensors(margin)
    for i, parameter in _parameters(optimizer):
        shapes = (torch.tensor(0.0), parameter, parameter)
        expected |= {f"optimizer.{i}.{key}": like for key, like in zip(_kept(parameter), shapes, strict=False)}
    return read_tensors(path, expected)


def load_training(tensors: dict[str, Tensor], margin: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the result of `read_training` into the margin and the optimizer."""
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
