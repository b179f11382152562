"""The errors that a user can fix. A command prints their message, without a traceback, and ends with exit code 2."""

import difflib
import errno
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any


class VitfaceError(ValueError):
    """The base class. A command catches nothing else, so that a bug still shows its traceback."""


class ConfigError(VitfaceError):
    """Flags or settings that cannot work, alone or together."""


class WeightsError(VitfaceError):
    """A backbone file that is missing, not converted, damaged, or not the one that was asked for."""


class CheckpointError(VitfaceError):
    """A run or checkpoint directory that is missing, incomplete, damaged, or does not belong to this run."""


class ExchangeError(VitfaceError):
    """An adapter folder, an export or a bundle that other programs cannot use, or other people must not get."""


class DataError(VitfaceError):
    """Training data or a benchmark that cannot be read."""


class ImageError(DataError):
    """Bytes that are not an image, or not one that vitface accepts."""


class EvaluationError(VitfaceError):
    """Scores or labels that cannot be evaluated; the message has the likely cause."""


class WorkerError(VitfaceError):
    """A process that decodes images was killed or could not be started; the message says what to change."""


class RankError(VitfaceError):
    """Another rank failed, was killed or did not answer; the message names it."""


def expect(good: object, name: str, value: object, what: str) -> None:
    """ConfigError that the argument `name` must be `what`, and is this value, unless it is `good`."""
    if not good:
        raise ConfigError(f"{name} must be {what}, not {in_one_line(repr(value))[:60]}")


def is_path(value: object) -> bool:
    """Whether a value can be a path: a string that is not empty, or a Path, without the character 0."""
    return isinstance(value, str | os.PathLike) and str(value) != "" and "\0" not in str(value)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, of Python's or numpy's types."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def command(*words: object) -> str:
    """`vitface WORDS...` to copy into a shell, which takes each word as it is, whatever characters a path has."""
    return shlex.join(["vitface", *map(str, words)])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean X?", X the most similar of the `known` words; empty if none is similar."""
    return "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(word, known, n=1, cutoff=0.7))


UNSEEN = "[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def printable(text: str) -> str:
    """A text in which nothing moves the cursor or turns the direction of writing, as names in files may want to.

    Lines stay lines; a name that must not begin a new one is printed by `in_one_line`. Bytes of a file's name that are
    not UTF-8 become \\xe9.
    """
    return re.sub(UNSEEN, _escaped, text)


def in_one_line(name: str) -> str:
    """`printable`, also without ends of lines."""
    return re.sub(r"\n", _escaped, printable(name))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code & 0xFF:02x}" if 0xDC80 <= code <= 0xDCFF or code < 0x100 else f"\\u{code:04x}"


CURES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "choose another place, or change its permissions"),
    errno.EROFS: "choose another place, or copy the folder to where you may write",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or choose another disk"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a folder is wanted, and this is a file; name another"),
    errno.EISDIR: "a file is wanted, and this is a folder; name a file",
}


def in_words(error: OSError) -> str:
    """What the operating system refused: the path, the reason, and what helps."""
    if error.filename is None or not error.strerror:
        return str(error)
    cure = CURES.get(error.errno or 0)
    return f"{os.fsdecode(error.filename)}: {error.strerror}{f'; {cure}' if cure else ''}"


class PrintableStream:
    """A stream whose text is `printable`, whoever wrote it: no name of a file or a person steers the terminal."""

    def __init__(self, stream: io.TextIOWrapper):
        self._wrapped = stream  # the name by which tqdm finds out that two streams are one

    def write(self, text: str) -> int:
        return self._wrapped.write(printable(text))

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def raw(stream: Any) -> Any:
    """The stream itself, for what steers the terminal on purpose."""
    return getattr(stream, "_wrapped", stream)


@contextmanager
def _printable_streams() -> Iterator[None]:
    """Inside, what is written to stdout and stderr is printable; in notebooks they are left as they are."""
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks
            setattr(sys, name, PrintableStream(stream))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def exit_code(action: Callable[[], int | None]) -> int:
    """Runs a command's action and returns its exit code, 0 for None; 2 after a printed error, 130 after Ctrl-C.

    The errors that are printed are `VitfaceError` and those of the operating system (a full disk, a read-only folder).
    Where nobody reads the output any more, as after `| head`, the code is 141, as for other programs.
    """
    with _printable_streams():
        return _exit_code(action)


def _exit_code(action: Callable[[], int | None]) -> int:
    try:
        code = action() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python flushes at the end
        return 141
    except (VitfaceError, OSError) as error:
        text = in_words(error) if isinstance(error, OSError) else str(error)
        print(f"error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 130
