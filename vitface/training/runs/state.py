"""The state of a training run, and how a checkpoint saves and restores it.

It is the trained part of the face model, the identity matrix, the optimizer state, the loss scale and the progress. A
sharded identity matrix has files of its own (see `vitface.training.ranks.identities`).
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitface.model.face import TOKEN_WIDTH, FaceModel
from vitface.model.margin import MarginLoss
from vitface.model.positions import resample_rows
from vitface.store.faces import load_trained, trained_tensors
from vitface.store.tensors import read_tensors, tensor_bytes
from vitface.training.loss_scale import LossScale
from vitface.training.ranks.identities import MOMENTS, ShardedMargin, identity_files, load_identities
from vitface.training.ranks.parallel import Shard
from vitface.training.ranks.process_group import rank
from vitface.training.runs.checkpoint import Progress, save_checkpoint

Margin = MarginLoss | ShardedMargin


@dataclasses.dataclass
class TrainingState:
    """The state of a run between two steps."""

    model: FaceModel
    margin: Margin
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    progress: Progress = dataclasses.field(default_factory=Progress)

    def __post_init__(self) -> None:
        start_moments(self.optimizer)

    def save(self, run_dir: Path, facts: dict[str, Any], is_best: bool) -> None:
        """Writes the checkpoint of this step, with the `facts` that resuming compares. All ranks must call it."""
        margin = self.margin
        more_files = identity_files(margin, self.optimizer) if isinstance(margin, ShardedMargin) else iter(())
        if rank() == 0:
            save_checkpoint(
                run_dir,
                self.progress.step,
                trained_tensors(self.model),
                dataclasses.asdict(self.model.config),
                self.tensors(),
                {"progress": dataclasses.asdict(self.progress), **facts},
                is_best,
                more_files,
            )
        for _ in more_files:  # rank 0 has read them all; the other ranks send their rows here
            pass

    def restore(self, checkpoint: Path, written: dict[str, Any]) -> None:
        """Loads the tensors of a verified checkpoint, and the progress of its `load_state`.

        CheckpointError, with the state unchanged, if the tensors are those of another model.
        """
        own = self.tensors()
        saved = read_tensors(checkpoint / "training.safetensors", own)
        load_trained(self.model, checkpoint / "model.safetensors")
        for name, tensor in own.items():
            tensor.copy_(saved[name])
        if isinstance(self.margin, ShardedMargin):
            load_identities(checkpoint, self.margin, self.optimizer)
        self.progress = Progress(**written["progress"])

    @torch.no_grad()
    def take_over(self, before: "TrainingState") -> None:
        """Continues from a state of the same margin whose model saw images of another size, and is not used any more.

        What the head "patches" and its moments hold for each patch is resampled.
        """
        config = self.model.config
        places = config.vit.prefix, TOKEN_WIDTH, config.vit.grid(config.image_size)
        trained = trained_tensors(before.model)
        for name, mine in trained_tensors(self.model).items():
            same = mine.shape == trained[name].shape
            mine.copy_(trained[name] if same else resample_rows(trained[name], *places, of_map=True))
        for theirs, mine in zip(parameters(before.optimizer), parameters(self.optimizer), strict=True):
            moments = before.optimizer.state[theirs]
            if theirs.shape != mine.shape:
                moments |= {name: resample_rows(moments[name], *places) for name in MOMENTS}
            self.optimizer.state[mine] = moments
        self.progress = before.progress

    def tensors(self) -> dict[str, Tensor]:
        """The tensors themselves, not copies, of all but the model and a sharded identity matrix.

        Names: margin.NAME; optimizer.I.MOMENT of the I-th parameter in the order of its groups; loss_scale.NAME.
        """
        shards = {name for name, parameter in self.margin.named_parameters() if isinstance(parameter, Shard)}
        tensors = {f"margin.{name}": value for name, value in self.margin.state_dict().items() if name not in shards}
        for i, parameter in enumerate(parameters(self.optimizer)):
            moments = self.optimizer.state[parameter]
            kept = ["step"] if isinstance(parameter, Shard) else moments
            tensors |= {f"optimizer.{i}.{name}": moments[name] for name in kept}
        return {**tensors, "loss_scale.scale": self.loss_scale.scale, "loss_scale.held": self.loss_scale.held}

    def sha256(self) -> str:
        """The SHA-256 of the trained tensors and the optimizer state, without a sharded identity matrix."""
        return hashlib.sha256(tensor_bytes({**trained_tensors(self.model), **self.tensors()})).hexdigest()


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """All that it trains, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Gives AdamW the state that it would make in its first step, so that a checkpoint can be copied into it."""
    for parameter in parameters(optimizer):
        moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
