"""Errors that are no bugs. Each class defines the exit code of the command."""

from cspnet.text import printable


class CspnetError(Exception):
    """An expected error; its message says what happened, where, and what to do.

    Commands print the message without a traceback. It may contain file names: characters that are
    not printable, except newlines, are escaped.
    """

    exit_code = 1

    def __init__(self, message: str = ""):
        super().__init__(printable(str(message), keep="\n"))


class RecipeError(CspnetError):
    """A recipe, an override or an option is invalid."""

    exit_code = 2


class DataError(CspnetError):
    """A data set is missing or invalid.

    Newlines in the message are taken for parts of file names and escaped, unless `lines` is true.
    """

    exit_code = 2

    def __init__(self, message: str = "", lines: bool = False):
        super().__init__(message if lines else printable(str(message)))


class CheckpointError(CspnetError):
    """A checkpoint is missing or damaged, or belongs to another run."""

    exit_code = 2


class CheckpointVersionError(CheckpointError):
    """A checkpoint has the format of another version of cspnet."""


class SaveError(CspnetError):
    """A checkpoint or the metrics could not be written; the earlier checkpoint is unchanged."""


class NonFiniteError(CspnetError):
    """The loss or a weight became NaN or Inf; no state with NaN or Inf was saved."""


class OutOfMemoryError(CspnetError):
    """The device has too little memory."""


class RankFailedError(CspnetError):
    """Another process of the run has ended, or does not respond."""


class WorkersFailedError(CspnetError):
    """Dataloader workers died repeatedly."""


class CrashError(CspnetError):
    """An unexpected exception ended the run; the run folder contains its traceback."""


class PartialResultError(CspnetError):
    """A command produced only a part of its results, for example if some images are unreadable."""


class StoppedError(CspnetError):
    """The run was stopped after its state was saved; the exit code is EX_TEMPFAIL: retry."""

    exit_code = 75
