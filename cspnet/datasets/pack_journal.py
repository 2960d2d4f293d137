"""The progress of a pack: what is finished, and how to resume after an interruption.

A tar file gets its name when it is complete, and a split gets its name when all its tar files are
complete. `pack.json` in the output folder records the options, the source and the finished files.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cspnet.errors import DataError
from cspnet.files import replace_text, temporary_path
from cspnet.sources.protocol import Source

JOURNAL_FILE = "pack.json"


@dataclass(frozen=True)
class PackSettings:
    """The options of a pack, by the names of the command-line options."""

    short_side: int  # maximum length of the shorter side, in pixels
    quality: int  # of JPEG, 1 to 100
    shard_mb: int  # approximate size of a tar file, in 10^6 bytes


@dataclass
class PackedShard:
    """The contents of one finished tar file."""

    file: str
    start: int  # index of its first image in the source
    end: int = 0  # index after its last image
    copied: int = 0  # images
    encoded: int = 0  # images
    bytes_before: int = 0  # of its images in the source
    bytes_after: int = 0  # of its images in the tar file
    size: int = 0  # bytes of the tar file
    unreadable: list[str] = field(default_factory=list)  # skipped images, with reasons


class PackJournal:
    """The journal of a new or interrupted pack. Raises DataError if it cannot start or resume."""

    def __init__(self, output: Path, settings: PackSettings, sources: dict[str, Source]):
        self.output, self.settings, self.file = output, settings, output / JOURNAL_FILE
        digests = {name: _digest(source) for name, source in sources.items()}
        self.plan = {**asdict(settings), "sources": digests}
        self.splits: dict[str, list[PackedShard]] = {name: [] for name in sources}
        if output.exists() and not output.is_dir():
            raise DataError(f"--output {output} is a file. Choose a folder")
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--output {output} cannot be created: {error.strerror}") from None
        if not os.access(output, os.R_OK | os.W_OK | os.X_OK):
            raise DataError(f"--output {output}: no permission to read and write. Choose another")
        if self.file.exists():
            self._resume()
        elif set(os.listdir(output)) - {temporary_path(self.file).name}:
            raise DataError(
                f"--output {output} is neither empty nor an interrupted pack. Choose a new folder"
            )
        self.save()

    def _resume(self) -> None:
        try:
            content = json.loads(self.file.read_text("utf-8"))
            plan, is_finished = content["plan"], content["finished"]
            splits = {
                name: [PackedShard(**shard) for shard in shards]
                for name, shards in content["splits"].items()
            }
            if plan.keys() != self.plan.keys():
                raise KeyError("settings of another version")
            differing = [key for key in self.plan if plan[key] != self.plan[key]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(
                f"{self.file} is damaged or from another version. Remove {self.output} and pack "
                "again"
            ) from None
        where = f"--output {self.output} contains"
        if is_finished:
            raise DataError(f"{where} a finished pack. Choose a new folder")
        if "sources" in differing:
            raise DataError(f"{where} an interrupted pack of other images. Choose a new folder")
        if differing:
            options = ", ".join(f"--{key.replace('_', '-')} {plan[key]}" for key in differing)
            raise DataError(f"{where} an interrupted pack with {options}. Use the same options")
        for name in self.splits:
            for shard in splits.get(name, []):
                if not self._is_intact(name, shard):
                    break
                self.splits[name].append(shard)

    def _is_intact(self, name: str, shard: PackedShard) -> bool:
        folder = self.output / name if self.is_finished(name) else self.partial_folder(name)
        file = folder / shard.file
        return file.is_file() and file.stat().st_size == shard.size

    def is_finished(self, name: str) -> bool:
        """Whether all tar files of a split are finished."""
        return (self.output / name).is_dir()

    def partial_folder(self, name: str) -> Path:
        """The folder of an unfinished split. It is hidden, so that nobody trains on it."""
        return self.output / f".{name}"

    def add(self, name: str, shard: PackedShard) -> None:
        """Record a finished tar file of a split."""
        self.splits[name].append(shard)
        self.save()

    def save(self, finished: bool = False) -> None:
        splits = {name: [asdict(s) for s in shards] for name, shards in self.splits.items()}
        content = {"plan": self.plan, "finished": finished, "splits": splits}
        replace_text(self.file, json.dumps(content, indent=1), durable=True)


def _digest(source: Source) -> str:
    """A digest of the classes, labels and file names of a source."""
    digest = hashlib.blake2b(json.dumps(source.classes).encode(), digest_size=16)
    digest.update(source.labels.tobytes())
    for index in range(len(source)):
        digest.update(os.fsencode(os.path.basename(source.name(index))) + b"\0")
    return digest.hexdigest()
