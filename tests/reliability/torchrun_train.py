"""What test_lost_ranks.py starts under torchrun: train.py on tiny.py's faces, with ranks that kill themselves.

python torchrun_train.py RUN_DIR [STEP:RANK:ATTEMPT ...]
"""

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import TINY, use_tiny  # noqa: E402

from vitface.errors import exit_code  # noqa: E402
from vitface.training import loop  # noqa: E402
from vitface.training.run import run  # noqa: E402
from vitface.training.runs.resume import configure  # noqa: E402


def main() -> int:
    torch.set_num_threads(1)
    use_tiny(pytest.MonkeyPatch())
    run_dir, *kills = sys.argv[1:]
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    steps = [int(step) for step, *who in (kill.split(":") for kill in kills) if who == [rank, attempt]]
    update, taken = loop.update, iter(range(1, 1000))

    def deadly(*arguments):
        if next(taken) in steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(*arguments)

    loop.update = deadly
    flags = {**TINY, "save_dir": run_dir, "resume": "auto", "save_every": 3}
    return exit_code(lambda: run(configure(flags)) and 0)


if __name__ == "__main__":
    sys.exit(main())
