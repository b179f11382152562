"""Where hostile files are opened: a process of its own that notices execution, growing memory and hanging."""

import faulthandler
import os
import pickle
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tiny import in_child

MAX_GROWTH = 256 << 20
MAX_SECONDS = 20.0  # of one attempt, whatever else the machine does
EXECUTION = {
    "ctypes.dlopen",
    "exec",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "shutil.unpack_archive",
    "socket.connect",
    "subprocess.Popen",
}


def assault(attempt: Callable[[int], str], cases: int, warm_up: Callable[[], object]) -> None:
    """Calls `attempt(0)` ... `attempt(cases - 1)`, each of which names its outcome, in a process of its own.

    Asserts that both "error" and "valid" came out, that nothing was executed, that memory grew by less than MAX_GROWTH,
    and that no attempt took MAX_SECONDS. That the watch is awake is shown by a pickle that names a function.
    """
    assert in_child(lambda: _watched(attempt, cases, warm_up)) == 0


def _watched(attempt, cases, warm_up):
    events: Counter[str] = Counter()

    def watch(event, arguments):
        if event == "exec" and Path(arguments[0].co_filename).is_file():
            return  # Python itself imports a module, on first use
        if event == "ctypes.dlopen" and arguments[0] is None:
            return  # no file, but this process
        if event in EXECUTION:
            events[f"{event} {arguments}"] += 1

    sys.addaudithook(watch)
    assert pickle.loads(pickle.dumps(os.getcwd)) is os.getcwd and len(events) == 1
    warm_up()  # what is imported on first use
    events.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (pages + 2 * MAX_GROWTH, resource.RLIM_INFINITY))
    outcomes: Counter[str] = Counter()
    faulthandler.register(signal.SIGALRM, chain=True)  # says where it hangs, and ends the process
    for case in range(cases):
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
        try:
            outcomes[attempt(case)] += 1
        except BaseException:
            print(f"case {case}", file=sys.stderr)
            raise
    signal.setitimer(signal.ITIMER_REAL, 0)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert not events, events
    assert growth < MAX_GROWTH, growth
    assert set(outcomes) == {"error", "valid"} and outcomes.total() == cases, outcomes
