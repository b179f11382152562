"""The errors a user can mend. Each message says what is wrong and what to do; the scripts print it and exit with 2."""


class VitfaceError(ValueError):
    """The base of all of them; nothing else is caught by the scripts, so a bug still shows its traceback."""


class ConfigError(VitfaceError):
    """A flag, a preset or a combination of them that cannot work."""


class WeightsError(VitfaceError):
    """A backbone file that is missing, not converted, damaged, or not the one that was asked for."""


class CheckpointError(VitfaceError):
    """A run or checkpoint directory that is missing, incomplete, damaged, or does not belong to this run."""


class DataError(VitfaceError):
    """Training data or a benchmark that cannot be read as what it claims to be."""


class ImageError(DataError):
    """Bytes that are not an image this project accepts."""


class EvaluationError(VitfaceError):
    """Scores or labels that no verification protocol can accept, with the likely cause."""
