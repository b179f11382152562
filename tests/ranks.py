"""Several ranks on this machine, as torchrun starts them: forked processes and a store that outlives them."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch.distributed import TCPStore

PORT_DIGITS = 5


@contextmanager
def started(count: int, action: Callable[[int], object]) -> Iterator[list[int]]:
    """Runs `action(rank)` in `count` processes; inside, their pids. What is left of them at the end is killed."""
    reader, writer = os.pipe()
    pids = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            _child(rank, count, int(os.read(reader, PORT_DIGITS)), action)
        pids.append(pid)
    # only now: its thread must not hold a lock, as of the name resolver, while a process is copied
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(writer, f"{store.port:0{PORT_DIGITS}}".encode() * count)
    try:
        yield pids
    finally:
        for pid in pids:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, 9)
                os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


def _child(rank: int, count: int, port: int, action: Callable[[int], object]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    torch.set_num_threads(1)
    code = 1
    try:
        answer = action(rank)
        code = answer if isinstance(answer, int) else 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pids: list[int], seconds: float) -> list[int]:
    """The exit codes of processes (minus the signal of a killed one); fails if one lives longer than `seconds`."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        assert time.monotonic() < end, f"{len(pids) - len(codes)} of {len(pids)} ranks still run after {seconds} s"
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def in_ranks(count: int, action: Callable[[int], object], seconds: float = 300) -> list[int]:
    """Runs `action(rank)` in `count` processes to their end: the exit codes, what an `action` returned if an int."""
    with started(count, action) as pids:
        return wait(pids, seconds)
