"""The process group of a run under torchrun: its ranks, the messages between them, and how a lost rank is found.

On one device there is no process group and every function here is the identity. Under torchrun each rank is a process;
tensors travel by NCCL where there is one, else by gloo, and small messages always by gloo. A rank waits RANK_TIMEOUT
seconds for the others. A thread of each rank increases a counter in the store once a second: this heartbeat
distinguishes a rank that was killed or stopped from one that waits. A rank that fails leaves its error in the store.
"""

import ctypes
import datetime
import itertools
import json
import os
import secrets
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vitface.errors import ConfigError, RankError, VitfaceError

HEARTBEAT = 1.0  # seconds between two of them
RANK_TIMEOUT = 600.0  # seconds
ADVICE = "start all ranks again with --resume auto (torchrun --max-restarts does)"
_watch: "_Watch | None" = None  # of the process group there is


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(text: str) -> None:
    """Prints on rank 0 alone."""
    if rank() == 0:
        print(text)


def launched() -> int:
    """The number of processes that were started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_share(count: int) -> int:
    """Of so many processes of a machine, those of this rank, at least one of any."""
    return -(-count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def local_device(name: str) -> str:
    """The device of this process: under torchrun, "auto" and "cuda" are the GPU with its number on this machine, or the
    only one that it sees, as under SLURM. ConfigError for one GPU by its number, where it would be that of several.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and name.startswith("cuda:"):
        raise ConfigError(f"--device {name} is one GPU for all ranks; --device cuda gives each rank its own")
    if launched() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) if torch.cuda.device_count() > 1 else 0}"
    return name


@contextmanager
def process_group(device: str, seconds: float = RANK_TIMEOUT) -> Iterator[None]:
    """Inside, the ranks that torchrun started are a process group; nothing happens if there is one process.

    If a rank fails, is killed or keeps the others waiting for so many `seconds`, the others get a RankError that names
    it.
    """
    if launched() == 1:
        yield
        return
    timeout = datetime.timedelta(seconds=seconds)
    nccl = device.startswith("cuda") and dist.is_nccl_available()
    try:
        store, number, count = next(rendezvous("env://", timeout=timeout))
        store = PrefixStore(_meet(store, number, count, timeout), store)
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ConfigError(f"no process group of {launched()} ranks: {error}; start it with torchrun") from error
    # never destroyed, not even at exit: gloo's destructor waits for threads that may wait for Python's lock, or a peer
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    global _watch
    watch = _watch = _Watch(store, number, count)
    try:
        yield
    except BaseException as error:
        found = watch.reason(error) if _lost_contact(error) else None
        watch.report(found or error)
        if found is not None:
            raise found from error
        raise
    finally:
        _watch = None
        watch.stopped.set()
        dist.destroy_process_group()


@contextmanager
def as_one(device: str) -> Iterator[None]:
    """`process_group` for a command of which rank 0 alone prints; an error is told once, by the first that has it."""
    watch = None
    try:
        with process_group(device):
            watch = _watch
            if rank() == 0:
                yield
                return
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield
    except (VitfaceError, OSError) as error:
        if watch is not None and not watch.is_first_to_tell():
            raise SystemExit(2) from error
        raise


def _meet(store: Store, number: int, count: int, timeout: datetime.timedelta) -> str:
    """Agrees on a name for the keys of these ranks: torchrun's store still has those of ranks that were restarted.

    Each rank sends rank 0 a number of its own, and takes the name from the answer to that number alone.
    """
    if number > 0:
        own = secrets.token_hex(8)
        store.set(f"hello/{number}", own)
        store.wait([f"answer/{own}"], timeout)
        name = store.get(f"answer/{own}").decode()
        store.add(f"{name}/there", 1)
        return name
    name, end = f"ranks-{secrets.token_hex(8)}", time.monotonic() + timeout.total_seconds()
    while store.add(f"{name}/there", 0) < count - 1:
        for other in range(1, count):
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", name)
        if time.monotonic() > end:
            raise RuntimeError(f"not all of {count} ranks came within {timeout.total_seconds():.0f} s")
        time.sleep(0.02)
    return name


def _lost_contact(error: BaseException) -> bool:
    """True for the errors that a collective raises when another rank does not take part."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, torch.OutOfMemoryError)
        and any(word in str(error) for word in ("gloo", "NCCL", "pair closure"))
    )


class _Watch:
    """The heartbeats of all ranks, counters in the store, and the errors of those that failed."""

    def __init__(self, store: Store, number: int, count: int):
        self.number, self.others = number, [other for other in range(count) if other != number]
        self.store = store.clone()  # type: ignore[attr-defined]  # a connection of its own: other calls may be waiting
        self.store.set_timeout(datetime.timedelta(seconds=2 * HEARTBEAT))
        self.stopped = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        with suppress(RuntimeError):  # the store ends with its host
            while not self.stopped.wait(HEARTBEAT):
                self.store.add(f"heartbeat/{self.number}", 1)

    def report(self, error: BaseException) -> None:
        """Stores this rank's error for the others; an empty text if it fails because of another rank."""
        text = str(error) if isinstance(error, VitfaceError | OSError) else f"{type(error).__name__}: {error}"
        with suppress(RuntimeError):
            self.store.set(f"error/{self.number}", "" if isinstance(error, RankError) else text)

    def is_first_to_tell(self) -> bool:
        """Whether no rank has asked this before."""
        try:
            return self.store.add("told", 1) == 1
        except RuntimeError:  # the store is gone, and with it the other ranks
            return True

    def reason(self, error: BaseException) -> RankError | None:
        """Why a collective failed, None if no rank is missing; takes a few heartbeats."""
        answers: list[RankError | None] = []

        def ask() -> None:
            with suppress(RuntimeError):
                answers.append(self.missing())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(10 * HEARTBEAT)  # the store of a machine that is gone may not answer for minutes
        if not answers:
            return RankError(f"the process that keeps the ranks together (torchrun, or rank 0) was lost; {ADVICE}")
        if answers[0] is None and "imed out" in str(error):
            return RankError(f"no rank was lost, but one did not arrive in time; {ADVICE}")
        return answers[0]

    def missing(self) -> RankError | None:
        """Names the ranks that stored an error, or else those without a heartbeat."""
        before = {other: self.store.add(f"heartbeat/{other}", 0) for other in self.others}
        time.sleep(3 * HEARTBEAT)
        failed, lost = [], []
        for other in self.others:
            if self.store.check([f"error/{other}"]):
                text = self.store.get(f"error/{other}").decode()
                failed += [f"rank {other} stopped: {text}"] if text else []
            elif before[other] == self.store.add(f"heartbeat/{other}", 0):
                lost.append(str(other))
        if failed:
            return RankError("; ".join(failed))
        if lost:
            return RankError(f"rank {', '.join(lost)} was lost (killed, stopped, or its machine is gone); {ADVICE}")
        return None

    def barrier(self, name: str) -> None:
        """Returns when every rank has called it, however long that takes; RankError if one is lost instead."""
        self.store.add(name, 1)
        for turn in itertools.count(1):
            if self.store.add(name, 0) > len(self.others):
                return
            time.sleep(HEARTBEAT / 20)
            found = self.missing() if turn % 200 == 0 else None
            if found is not None:
                raise found


def all_gather(value: Any) -> list[Any]:
    """Every rank's JSON value, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(zlib.compress(json.dumps(value).encode(), 1)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = max(int(size) for size in sizes)
    padded = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(padded, torch.cat([data, data.new_zeros(longest - len(data))]))
    texts = (zlib.decompress(each[: int(size)].numpy().tobytes()) for each, size in zip(padded, sizes, strict=True))
    return [json.loads(text) for text in texts]


def broadcast(value: Any, source: int = 0) -> Any:
    """The JSON value of rank `source`, on every rank; it is also a barrier."""
    return all_gather(value if rank() == source else None)[source]


def agree(flag: bool, values: list[float]) -> tuple[bool, list[float]]:
    """(True if `flag` is true on any rank, the means of `values` over the ranks), the same on every rank."""
    if world_size() == 1:
        return flag, values
    message = torch.tensor([float(flag), *values], dtype=torch.float64)
    dist.all_reduce(message)
    return bool(message[0] > 0), (message[1:] / world_size()).tolist()


def barrier(name: str) -> None:
    """Waits for all ranks without a time limit, while one of them works for all, as in packing; `name` is used once."""
    if _watch is not None:
        _watch.barrier(name)


def check_same(facts: dict[str, Any]) -> None:
    """ConfigError, which names a rank and the fact that differs, unless every rank has the same facts."""
    everyone = all_gather(facts)
    for name in facts:
        for other, theirs in enumerate(everyone):
            if theirs.get(name) != everyone[0].get(name):
                raise ConfigError(
                    f"rank {other} has other {name} than rank 0: {theirs.get(name)} instead of "
                    f"{everyone[0].get(name)}; every rank needs the same command, files and versions"
                )
