"""Unreadable training images: which ones a run met, and when there are too many."""

import os
from collections.abc import Sequence
from contextlib import suppress

from cspnet.console import RunOutput
from cspnet.data.loader import Batch
from cspnet.errors import DataError
from cspnet.run.folder import RunFolder
from cspnet.runtime.distributed import Processes
from cspnet.sources.protocol import Source
from cspnet.text import printable

MAX_SHARE_OF_GROUP = 0.5  # beyond it the data set is at fault, not single images
PRINTED = 3  # that are named on the console


class UnreadableImages:
    """Names of unreadable images, in memory and in the list of the run.

    The main process writes the list; `exchange` tells it what the others have met.
    """

    def __init__(
        self,
        folder: RunFolder,
        source: Source,
        max_share: float,
        output: RunOutput,
        processes: Processes,
    ):
        self._folder, self.names = folder, folder.read_unreadable()  # in all starts of the run
        self._source, self._max_share = source, max_share
        self._output, self._processes = output, processes
        self._met: set[str] = set()  # in this start: images repaired since the last no longer count
        self._unshared: list[str] = []  # names that only this process knows

    @property
    def shown_path(self) -> str:
        return printable(str(self._folder.unreadable_file))

    def check(self, groups: Sequence[Batch]) -> None:
        """Note the unreadable images of loaded groups. Raises DataError if there are too many."""
        for group in groups:
            for index in group.unreadable:
                self._note(self._source.name(index))
            if group.replaced > MAX_SHARE_OF_GROUP * len(group.labels):
                raise DataError(
                    f"{group.replaced} unreadable images in one group of {len(group.labels)}, such "
                    f"as {printable(self._source.name(group.unreadable[0]))}. They are listed in "
                    f"{self.shown_path}; repair the files in place, then --resume."
                )
            self.require_few()

    def exchange(self) -> None:
        """Collect the names that the other processes have met since the last call."""
        for names in self._processes.gather(self._unshared):
            for name in names:
                self._note(name)
        self._unshared.clear()

    def require_few(self) -> None:
        """Raise DataError if more than data.max_unreadable of the training images are."""
        if len(self._met) > self._max_share * len(self._source):
            raise DataError(
                f"{len(self._met):,} of {len(self._source):,} training images are unreadable "
                f"so far, more than data.max_unreadable={self._max_share:g} of them. They are "
                f"listed in {self.shown_path}; repair the files in place, or allow more, "
                "then --resume."
            )

    def _note(self, name: str) -> None:
        # Absolute, since a resumed run may have another working directory.
        name = os.path.abspath(name)
        if name in self._met:
            return
        self._met.add(name)
        self._unshared.append(name)
        if name not in self.names:
            self.names.add(name)
            if self._processes.is_main:
                with suppress(OSError):
                    self._folder.append_unreadable(name)
        if len(self._met) <= PRINTED:
            self._output.print(
                f"unreadable image, replaced by the next one: {printable(name)}", style="yellow"
            )
