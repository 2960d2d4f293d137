"""What can go wrong through no fault of the code. Each kind knows the exit code of the command."""


def sentence(text: object) -> str:
    """A message as a sentence that others may follow: with one full stop at its end, never two."""
    told = str(text).rstrip()
    return told if told.endswith((".", "!", "?", "…")) else f"{told}."


class CspnetError(Exception):
    """A mistake or mishap told in one message: what, where, what to do. No traceback is shown."""

    exit_code = 1


class RecipeError(CspnetError):
    """The recipe, an override or an option is wrong."""

    exit_code = 2


class DataError(CspnetError):
    """The data set is not there, or is not what it has to be."""

    exit_code = 2


class CheckpointError(CspnetError):
    """A checkpoint is missing, broken, or belongs to another run."""

    exit_code = 2


class SaveError(CspnetError):
    """A checkpoint could not be written; the earlier one is as it was."""


class NotFinite(CspnetError):
    """The loss became NaN or infinite; nothing was saved after it did."""


class OutOfMemory(CspnetError):
    """The device has too little memory for what was asked."""


class Lost(CspnetError):
    """Another process of the run has ended, or hangs."""


class Incomplete(CspnetError):
    """Some images could not be read; the results of the others are out."""


class Stopped(CspnetError):
    """Stopped by a signal after a good save (EX_TEMPFAIL: run me again)."""

    exit_code = 75
