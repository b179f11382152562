"""The errors a user can mend, and how every script says them: the message, no traceback, exit code 2."""

import difflib
import sys
from collections.abc import Callable, Iterable


class VitfaceError(ValueError):
    """The base of all of them; nothing else is caught by the scripts, so a bug still shows its traceback."""


class ConfigError(VitfaceError):
    """A flag, a preset or a combination of them that cannot work."""


class WeightsError(VitfaceError):
    """A backbone file that is missing, not converted, damaged, or not the one that was asked for."""


class CheckpointError(VitfaceError):
    """A run or checkpoint directory that is missing, incomplete, damaged, or does not belong to this run."""


class ExchangeError(VitfaceError):
    """An adapter folder, an export or a bundle that is not what other programs, or other people, should be given."""


class DataError(VitfaceError):
    """Training data or a benchmark that cannot be read as what it claims to be."""


class ImageError(DataError):
    """Bytes that are not an image this project accepts."""


class EvaluationError(VitfaceError):
    """Scores or labels that no verification protocol can accept, with the likely cause."""


class RankError(VitfaceError):
    """Another process of a run on several devices failed, was killed or did not answer; names it."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean X?", X the most similar of the `known` words, or nothing."""
    return "".join(f"; did you mean {near}?" for near in difflib.get_close_matches(word, known, n=1, cutoff=0.7))


def exit_code(action: Callable[[], int | None]) -> int:
    """Runs a script's action: its own exit code or 0; 2 with the message of a mendable error; 130 after Ctrl-C.

    Mendable are `VitfaceError` and what the operating system refuses (a full disk, a read-only folder).
    """
    try:
        return action() or 0
    except (VitfaceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
