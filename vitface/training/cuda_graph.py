"""A training step as one CUDA graph: recorded once, then launched whole, without Python between its kernels.

It saves the time that the processor takes to launch some thousand kernels, which matters where they are short: small
batches, small models. A graph replays fixed kernels on fixed addresses, so everything in it has to be computed on the
device, in tensors that stay where they are; `update` is made for that. The first steps run as they do without a graph,
on the stream that is recorded later: they are steps of the run like all others, and what is allocated or compiled on
first use is there when the graph is recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitface.config import TrainConfig
from vitface.errors import ConfigError
from vitface.training.ranks.process_group import launched

WARM_UP = 3  # steps before the one that is recorded


def check_graph(config: TrainConfig) -> None:
    """ConfigError, with the reason, if --cuda-graph is asked for where it cannot work."""
    reasons = {
        f"needs CUDA, not --device {config.device}": not config.device.startswith("cuda"),
        "is for one GPU: torchrun's processes would have to agree within the graph": launched() > 1,
        "does not go with --shard-identities, whose tensors change their size": config.shard_identities,
        "does not go with --grad-accum: a graph holds one pass and its update": config.grad_accum > 1,
    }
    for reason, holds in reasons.items():
        if config.cuda_graph and holds:
            raise ConfigError(f"--cuda-graph {reason}")


class GraphedStep:
    """`step(*inputs)`, tensors of fixed shapes and constants -> tensors by name, replayed from the fourth call on.

    What it returns is overwritten by the next call. The gradients that `step` leaves stay where they are.
    """

    def __init__(self, step: Callable[..., dict[str, Tensor]], optimizer: torch.optim.Optimizer, device: torch.device):
        self.step, self.optimizer = step, optimizer
        self.stream = torch.cuda.Stream(device)
        self.warmed_up = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Any] = []
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        if self.warmed_up < WARM_UP:
            return self._warm_up(inputs)
        if self.graph is None:
            self._record(inputs)
        assert self.graph is not None
        for fixed, value in zip(self.inputs, inputs, strict=True):
            if isinstance(fixed, Tensor):
                fixed.copy_(value)
        self.graph.replay()
        return self.outputs

    def _warm_up(self, inputs: tuple) -> dict[str, Tensor]:
        self.warmed_up += 1
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.step(*inputs)
        current.wait_stream(self.stream)
        return outputs

    def _record(self, inputs: tuple) -> None:
        """Nothing is computed yet."""
        self.inputs = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
        for group in self.optimizer.param_groups:
            group["capturable"] = True  # only now: else AdamW warns in every step before
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": the thread that pins the next batch allocates meanwhile
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.outputs = self.step(*self.inputs)
