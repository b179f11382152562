"""Progress of long work: a bar on a terminal, the notebook's own in a notebook; elsewhere a line now and then."""

import io
import os
import sys
from contextlib import suppress
from typing import Any

from tqdm.auto import tqdm  # in a notebook that has ipywidgets, it is the notebook's bar

from vitface.errors import raw

LINE_SECONDS = 60.0
IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(tqdm):
    """tqdm's bar on a terminal and in a notebook. Elsewhere a line every LINE_SECONDS, and none of work that is done
    before the first.

    Under torchrun the first process alone shows it.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.as_lines = not IN_NOTEBOOK and not sys.stderr.isatty()
        if self.as_lines:
            options |= dict(mininterval=LINE_SECONDS, maxinterval=2 * LINE_SECONDS, delay=LINE_SECONDS)
            options |= dict(miniters=1, dynamic_ncols=False, bar_format=LINE)
        options.setdefault("file", raw(sys.stderr))
        super().__init__(*arguments, **options, disable=os.environ.get("RANK", "0") != "0")

    def display(self, msg: str | None = None, pos: int | None = None, **options: Any) -> bool:
        with suppress(OSError):  # nobody reads it any more, which must not stop the work
            if not self.as_lines:
                shown = bool(super().display(msg, pos, **options))
                if IN_NOTEBOOK:  # whose bar ends at total * unit_scale
                    vars(self)["container"].children[1].value = self.n * (self.unit_scale or 1)
                return shown
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
