"""Work that other processes or a thread do in advance; the results arrive in order.

Each process sends its results through a pipe of its own. They take no room in /dev/shm, of which a container has 64 MB,
and the end of a process, whatever ended it, is the end of its pipe: nobody waits for the dead.
"""

import itertools
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import Any

import torch

from vitface.errors import VitfaceError, WorkerError

AHEAD = 3  # items that the thread finishes before they are asked for
PATIENCE = 5.0  # seconds in which a process finishes its item when no more are wanted; then it is killed
_readers: set[Connection] = set()  # this process's ends of the pipes


def in_processes(work: Callable[[Any], Any], items: Sequence[Any], num_workers: int) -> Iterator[Any]:
    """Yields `work(item)` of each item, from `num_workers` processes (0: this one); `work` must be picklable.

    The error of an item is raised where its result would come; WorkerError if a process was killed or none can start.
    """
    if not num_workers:
        yield from map(work, items)
        return
    workers: list[_Worker] = []
    try:
        for number in range(min(num_workers, len(items))):
            workers += [_Worker(work, items[number::num_workers], num_workers)]
        for worker in itertools.islice(itertools.cycle(workers), len(items)):
            yield worker.result()
    finally:
        for worker in workers:
            worker.hang_up()
        for worker in workers:
            worker.end()


class _Worker:
    """A process that works through its items; it waits with a result until that is read."""

    def __init__(self, work: Callable[[Any], Any], items: Sequence[Any], count: int):
        self.count = count
        self.reader, writer = multiprocessing.Pipe(duplex=False)
        _readers.add(self.reader)
        self.process = multiprocessing.Process(target=_work_through, args=(work, items, writer), daemon=True)
        try:
            self.process.start()
        except OSError as error:
            self.hang_up()
            raise WorkerError(f"{count} processes are too many here ({error.strerror}); lower --num-workers") from None
        finally:
            writer.close()
        self.end = Finalize(self, _end, (self.process, self.reader), exitpriority=1)

    def result(self) -> Any:
        """The next item's result; raises its error."""
        try:
            result, error = self.reader.recv()
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            raise WorkerError(self._how_it_died()) from None
        if error is not None:
            raise error
        return result

    def hang_up(self) -> None:
        """The process ends when it has finished its item."""
        _readers.discard(self.reader)
        self.reader.close()

    def _how_it_died(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            return f"one of {self.count} worker processes ended by itself (exit code {code}); see what it printed above"
        name = signal.Signals(-code).name
        cause = "most likely this machine or container ran out of memory" if name == "SIGKILL" else "by a crash"
        return f"one of {self.count} worker processes was killed ({name}), {cause}; lower --num-workers, 0 uses none"


def _end(process: multiprocessing.Process, reader: Connection) -> None:
    _readers.discard(reader)
    reader.close()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()


def _work_through(work: Callable[[Any], Any], items: Sequence[Any], writer: Connection) -> None:
    """A worker: sends (result, None) or (None, error) for each item, until nobody reads them any more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group; the parent decides when to stop
        signal.signal(number, signal.SIG_IGN)
    for reader in _readers:  # inherited; while anybody has one open, its writer never learns that the parent is gone
        reader.close()
    torch.set_num_threads(1)
    with suppress(BrokenPipeError):
        for item in items:
            try:
                answer = work(item), None
            except VitfaceError as error:
                answer = None, error
            except MemoryError:
                answer = None, WorkerError("a worker process ran out of memory; lower --num-workers, 0 uses none")
            except Exception:
                answer = None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
            writer.send(answer)


def in_thread(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Yields `work(item)` of each item; a thread works AHEAD items ahead, errors are raised in their order."""
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(work, item) for item in items[:AHEAD])
        for item in items[AHEAD:]:
            yield ahead.popleft().result()
            ahead.append(pool.submit(work, item))
        while ahead:
            yield ahead.popleft().result()
