"""What can go wrong through no fault of the code. Each kind knows the exit code of the command."""

from cspnet.text import printable


class CspnetError(Exception):
    """A mistake or mishap told in one message: what, where, what to do. No traceback is shown.

    The message may name files: what a terminal should not get is escaped, but for line ends.
    """

    exit_code = 1

    def __init__(self, message: str = ""):
        super().__init__(printable(str(message), keep="\n"))


class RecipeError(CspnetError):
    """The recipe, an override or an option is wrong."""

    exit_code = 2


class DataError(CspnetError):
    """The data set is not there, or is not what it has to be.

    A line end in the message is part of a name, and escaped, unless it has several `lines`.
    """

    exit_code = 2

    def __init__(self, message: str = "", lines: bool = False):
        super().__init__(message if lines else printable(str(message)))


class CheckpointError(CspnetError):
    """A checkpoint is missing, broken, or belongs to another run."""

    exit_code = 2


class SaveError(CspnetError):
    """A checkpoint could not be written; the earlier one is as it was."""


class NonFiniteError(CspnetError):
    """The loss became NaN or infinite; nothing was saved after it did."""


class OutOfMemoryError(CspnetError):
    """The device has too little memory for what was asked."""


class RankFailedError(CspnetError):
    """Another process of the run has ended, or hangs."""


class WorkersFailedError(CspnetError):
    """Dataloader workers died again and again."""


class CrashError(CspnetError):
    """An unexpected exception ended the run; its traceback is in a file of the run folder."""


class PartialResultError(CspnetError):
    """Some images could not be read; the results of the others are out."""


class StoppedError(CspnetError):
    """Stopped by a signal after a good save (EX_TEMPFAIL: run me again)."""

    exit_code = 75
