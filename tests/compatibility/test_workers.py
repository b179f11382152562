"""Processes that decode images: what ends one of them is said at once, and nobody waits for it."""

import errno
import faulthandler
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cases import case

from vitface.__main__ import main
from vitface.config import resolve
from vitface.data import background
from vitface.data.background import in_processes
from vitface.errors import ConfigError, WorkerError

KIND = "Workers that die while the parent waits"
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
LARGE = 4 << 20  # bytes, more than a pipe holds


def large(item: int) -> np.ndarray:
    return np.full(LARGE, item, np.uint8)


def killed(item: int) -> np.ndarray:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return large(item)


def gone(item: int) -> None:
    os._exit(7)


def crashed(item: int) -> None:
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def out_of_memory(item: int) -> None:
    raise MemoryError


def broken(item: int) -> None:
    raise ZeroDivisionError("a bug")


SMALL_SHM = """
import numpy as np
from vitface.data.background import in_processes
def work(item): return np.full(4 << 20, item, np.uint8)
print(sum(int(result[-1]) for result in in_processes(work, range(6), 2)))
"""


@case(
    "`/dev/shm` of 1 MB, two workers with results of 4 MB",
    "works: results travel through pipes, none through `/dev/shm`",
)
def test_a_small_dev_shm(tmp_path):
    inside = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("this system mounts nothing for an ordinary user")
    done = subprocess.run([*inside, sys.executable, "-c", SMALL_SHM], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "15\n"), done.stderr


@pytest.mark.parametrize(
    ("work", "message"),
    [
        pytest.param(
            killed, r"one of 2 worker processes was killed \(SIGKILL\), most likely .* out of memory; lower --num-w",
            marks=case("a worker is killed by the system, as where memory runs out", "an error says what to lower"),
        ),
        pytest.param(
            crashed, r"was killed \(SIGSEGV\), by a crash",
            marks=case("a worker crashes in a decoder", "an error names the signal"),
        ),
        pytest.param(
            gone, r"ended by itself \(exit code 7\)",
            marks=case("a worker ends by itself", "an error has its exit code"),
        ),
        pytest.param(
            out_of_memory, "ran out of memory; lower --num-workers",
            marks=case("a worker cannot allocate", "an error says what to lower"),
        ),
    ],
)  # fmt: skip
def test_a_worker_that_dies(work, message):
    with pytest.raises(WorkerError, match=message):
        list(in_processes(work, range(8), 2))
    assert not multiprocessing.active_children()


@case("a worker is killed while it sends a result", "an error, not a wait for the rest")
def test_a_worker_that_dies_in_the_middle_of_a_result():
    results = in_processes(large, range(8), 2)
    next(results)
    time.sleep(0.1)  # both wait with a half-sent result
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="SIGKILL"):
        list(results)


def test_a_bug_in_a_worker_shows_its_traceback():
    with pytest.raises(RuntimeError, match="(?s)in a worker process.*in broken.*ZeroDivisionError: a bug"):
        list(in_processes(broken, range(8), 2))


@case("no further process is allowed (`ulimit -u`, a container's limit)", "an error says to lower `--num-workers`")
def test_no_process_can_start(monkeypatch):
    started, start = [], multiprocessing.Process.start

    def third(process):
        if len(started) == 2:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.Process, "start", third)
    with pytest.raises(WorkerError, match=r"4 processes are too many here \(Resource temporarily unavailable\); lower"):
        list(in_processes(large, range(8), 4))
    assert not multiprocessing.active_children() and not background._readers


@case("the training process itself is killed", "its workers end; none is left over")
def test_workers_end_with_their_parent():
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        results = in_processes(large, range(9), 3)
        next(results)
        for child in multiprocessing.active_children():
            os.write(writer, child.pid.to_bytes(4, "little"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    os.waitpid(pid, 0)
    workers = [int.from_bytes(os.read(reader, 4), "little") for _ in range(3)]
    end = time.monotonic() + 10
    while any(_running(worker) for worker in workers):
        assert time.monotonic() < end
        time.sleep(0.02)


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@case(
    "SIGTERM or Ctrl-C for all processes of a job, as schedulers send it", "workers go on; the parent finishes its step"
)
def test_workers_leave_signals_to_the_parent():
    results = in_processes(large, range(4), 2)
    first = [next(results), next(results)]  # one of each worker: both run
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    assert [int(result[0]) for result in (*first, *results)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param("-1", marks=case("`--num-workers -1`", "refused: at least 0")),
        pytest.param("100000", marks=case("`--num-workers 100000`", "refused: at most 1024")),
        pytest.param("many", marks=case("`data pack --num-workers many`", "refused: it is no number")),
    ],
)
def test_numbers_of_workers_that_cannot_be_meant(number, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["data", "pack", "photos", "out", "--num-workers", number])
    assert stop.value.code == 2
    assert f"--num-workers: must be at least 0 and at most 1024, not {number}" in capsys.readouterr().err
    if number != "many":
        with pytest.raises(ConfigError, match=f"--num-workers must be at least 0 and at most 1024, not {number}"):
            resolve({"num_workers": int(number)})
