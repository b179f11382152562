"""Progress of long work: a bar on a terminal; a line now and then elsewhere, as in a log."""

import io
import os
import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from vitface.errors import raw

LINE_SECONDS = 60.0
LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(tqdm):
    """tqdm's bar on a terminal. Elsewhere a line every LINE_SECONDS, and none of work that is done before the first.

    Under torchrun the first process alone shows it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.as_lines = not sys.stderr.isatty()
        if self.as_lines:
            options |= dict(mininterval=LINE_SECONDS, maxinterval=2 * LINE_SECONDS, delay=LINE_SECONDS)
            options |= dict(miniters=1, dynamic_ncols=False, bar_format=LINE)
        options.setdefault("file", raw(sys.stderr))
        super().__init__(*arguments, **options, disable=os.environ.get("RANK", "0") != "0")

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        with suppress(OSError):  # nobody reads it any more, which must not stop the work
            if not self.as_lines:
                return bool(super().display(msg, pos))
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return True

    def close(self) -> None:
        """Ends the bar; in a log, work that took long enough for a line ends with one."""
        if self.as_lines and not self.disable:
            if self.format_dict["elapsed"] >= LINE_SECONDS:
                self.display()
            self.fp = io.StringIO()  # for what tqdm writes to erase a bar
        super().close()
