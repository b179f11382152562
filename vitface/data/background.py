"""Work that other processes or a thread do in advance; the results arrive in order."""

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vitface.errors import VitfaceError

AHEAD = 3  # items that the thread finishes before they are asked for


class _Task(Dataset):
    """An item -> `work(item)`, or its error, which the parent process raises."""

    def __init__(self, work: Callable[[Any], Any]):
        self.work = work

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.work(item)
        except VitfaceError as error:
            return error


def in_processes(
    work: Callable[[Any], Any], items: Sequence[Any], num_workers: int, pinned: bool = False
) -> Iterator[Any]:
    """Yields `work(item)` of each item, from `num_workers` processes (0: this one); `work` must be picklable.

    Arrays arrive as tensors. The VitfaceError of an item is raised where its result would come.
    """
    loader = DataLoader(
        _Task(work),
        batch_size=None,
        sampler=items,
        num_workers=num_workers,
        pin_memory=pinned,
        worker_init_fn=_leave_interrupts_to_the_parent,
        generator=torch.Generator(),  # its own, so that nothing is drawn from the global one
    )
    for result in loader:
        if isinstance(result, VitfaceError):
            raise result
        yield result


def in_thread(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yields `work(item)` of each item; a thread works AHEAD items ahead, errors are raised in their order."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(work, item) for item in items[:AHEAD])
        for item in items[AHEAD:]:
            yield ahead.popleft().result()
            ahead.append(pool.submit(work, item))
        while ahead:
            yield ahead.popleft().result()


def _leave_interrupts_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
