"""A data set made small once: images scaled down, as samples in tar files, in the order they had.

What is packed stays through an interruption: a tar file gets its name when it is whole, a part when
all of its tar files are, and `pack.json` tells how far things are.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2

from cspnet.errors import CspnetError, DataError
from cspnet.images.decode import MAX_SIDE, TooLargeError, UnreadableError, decode
from cspnet.recipe.schema import DIGITS
from cspnet.sources import messages, tar_set
from cspnet.sources.data_root import Source, open_parts, require_data_folder
from cspnet.sources.tar_members import CLASSES_FILE
from cspnet.sources.tar_set import TarSource
from cspnet.text import printable

JOURNAL = "pack.json"
STARTS = {b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp", b"II*": ".tif", b"MM": ".tif"}
STEM = 60  # characters of a file's name that its key keeps


@dataclass(frozen=True)
class Settings:
    """How to pack."""

    short: int  # pixels of the shorter side, at most
    quality: int  # of JPEG, 1 to 100
    shard_mb: int  # 10^6 bytes of a tar file, roughly
    labels: str  # what a .cls holds: name or index


@dataclass
class Shard:
    """What went into a tar file."""

    file: str
    start: int  # index of its first image in the source
    end: int = 0  # index of the first one of the next
    copied: int = 0
    encoded: int = 0
    before: int = 0  # bytes of its images in the source
    after: int = 0  # bytes of its images here
    size: int = 0  # bytes of the tar file
    unreadable: list[str] = field(default_factory=list)  # what was left out, and why


class Sample(NamedTuple):
    """An image, packed; without bytes where it could not be read."""

    index: int
    data: bytes
    suffix: str
    before: int  # bytes
    copied: bool
    problem: str = ""


def shrink(data: bytes, short: int, quality: int) -> bytes:
    """An encoded image with its shorter side scaled down to `short` pixels, as JPEG of a quality.

    The same bytes where it has no more. Orientation is applied. Raises Unreadable.
    """
    image = decode(data)
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise TooLargeError(f"a side of more than {MAX_SIDE:,} pixels")
    side = min(height, width)
    if side <= short:
        return data
    size = (max(1, round(width * short / side)), max(1, round(height * short / side)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    small = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def pack(
    data: str,
    to: Path,
    settings: Settings,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[Shard]]:
    """Packs train/ and val/ of a data root into a folder, or goes on where it was interrupted.

    By `workers` threads; their number changes nothing. `progress` is told how many images are
    done, and of how many. Raises DataError where the data or the folder is wrong, CspnetError where
    the folder cannot be written.
    """
    if data != DIGITS:
        require_data_folder(data, "Give a data root")
    training, validation = open_parts(data)
    sources = {"train": training, "val": validation}
    _require_names(training.classes)
    _require_apart(data, to)
    try:
        journal = _Journal(to, settings, sources)
        total, done = sum(map(len, sources.values())), 0
        for name, source in sources.items():
            for index in _pack_part(journal, name, source, workers):
                progress(done + index, total)
            done += len(source)
        journal.write(finished=True)
    except OSError as error:
        raise CspnetError(
            f"{to} cannot be written: {error.strerror or error}. What is packed stays: make room, "
            "and give the same command again"
        ) from None
    return journal.parts


def summary(parts: dict[str, list[Shard]], settings: Settings) -> Iterator[tuple[str, str]]:
    """What was packed, for people: lines, each with its severity."""
    for name, done in parts.items():
        copied, encoded = sum(shard.copied for shard in done), sum(shard.encoded for shard in done)
        before, after = sum(shard.before for shard in done), sum(shard.after for shard in done)
        yield (
            "",
            f"{name}: tar files {len(done):,}, images {copied + encoded:,}, "
            f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after "
            f"({after / max(before, 1):.0%}); {encoded:,} scaled to a shorter side of "
            f"{settings.short} pixels as JPEG of quality {settings.quality}, {copied:,} copied",
        )
        for problem in (problem for shard in done for problem in shard.unreadable):
            yield "error", f"error: {name}: left out: {printable(problem)}"
    if any(shard.encoded for done in parts.values() for shard in done):
        yield "", "What was scaled has other pixels than before: a run on it is another run."


def _require_names(classes: list[str]) -> None:
    """Raises DataError unless LIST can hold the names: lines of UTF-8 without blanks around."""
    odd = [name for name in classes if not _is_line(name)]
    if odd:
        raise DataError(
            f"{messages.count_and_names(odd, 'class')}: {CLASSES_FILE} cannot hold these names, one per line in UTF-8, "
            "without blanks around them. Rename the class folders."
        )


def _is_line(name: str) -> bool:
    with contextlib.suppress(UnicodeEncodeError):
        return name.encode() and name == name.strip().lstrip("\ufeff") and not {*"\r\n"} & {*name}
    return False


def _require_apart(data: str, to: Path) -> None:
    """Raises DataError where one of the two folders would be in the other."""
    there = os.path.realpath(to)
    parts = [Path(data).expanduser()]
    with contextlib.suppress(OSError):
        parts += [Path(entry) for entry in os.scandir(parts[0]) if entry.is_dir()]
    for part in map(os.path.realpath, parts):
        if os.path.commonpath([part, there]) in (part, there):
            raise DataError(f"--to {to}: {data} and it may not lie in each other; nothing was done")


class _Journal:
    """How far a pack is; begins one, or goes on with one. Raises DataError where it cannot."""

    def __init__(self, to: Path, settings: Settings, sources: dict[str, Source]):
        self.to, self.settings, self.file = to, settings, to / JOURNAL
        self.plan = {**asdict(settings), "of": {k: _digest(v) for k, v in sources.items()}}
        self.parts: dict[str, list[Shard]] = {name: [] for name in sources}
        if to.exists() and not to.is_dir():
            raise DataError(f"--to {to} is a file. Give a folder")
        try:
            to.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--to {to} cannot be made: {error.strerror}") from None
        if not os.access(to, os.R_OK | os.W_OK | os.X_OK):
            raise DataError(f"--to {to} cannot be read and written. Give another folder")
        if self.file.exists():
            self._go_on()
        elif set(os.listdir(to)) - {_partial(self.file).name}:
            raise DataError(f"--to {to} is not empty, and no interrupted pack. Give a new folder")
        self.write()

    def _go_on(self) -> None:
        try:
            content = json.loads(self.file.read_text("utf-8"))
            plan, finished = content["plan"], content["finished"]
            parts = {k: [Shard(**shard) for shard in v] for k, v in content["parts"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{self.file} is damaged. Remove {self.to}, and pack again") from None
        if finished:
            raise DataError(f"--to {self.to} holds a finished pack. Give a new folder")
        differing = [key for key in self.plan if plan.get(key) != self.plan[key]]
        if "of" in differing:
            raise DataError(f"--to {self.to} holds an interrupted pack of other images")
        if differing:
            was = ", ".join(f"--{key.replace('_', '-')} {plan.get(key)}" for key in differing)
            raise DataError(f"--to {self.to} holds an interrupted pack with {was}. Give the same")
        for name in self.parts:
            for shard in parts.get(name, []):
                if not self._is_whole(name, shard):
                    break
                self.parts[name].append(shard)

    def _is_whole(self, name: str, shard: Shard) -> bool:
        folder = self.to / name if self.is_finished(name) else self.partial(name)
        file = folder / shard.file
        return file.is_file() and file.stat().st_size == shard.size

    def is_finished(self, name: str) -> bool:
        return (self.to / name).is_dir()

    def partial(self, name: str) -> Path:
        """The folder of a part until it is finished; hidden, so that nobody trains on it."""
        return self.to / f".{name}"

    def write(self, finished: bool = False) -> None:
        parts = {k: [asdict(shard) for shard in v] for k, v in self.parts.items()}
        content = {"plan": self.plan, "finished": finished, "parts": parts}
        _write(self.file, json.dumps(content, indent=1).encode())


def _digest(source: Source) -> str:
    """Tells sources apart by their classes, labels and names of files."""
    digest = hashlib.blake2b(json.dumps(source.classes).encode(), digest_size=16)
    digest.update(source.labels.tobytes())
    for index in range(len(source)):
        digest.update(os.fsencode(os.path.basename(source.name(index))) + b"\0")
    return digest.hexdigest()


def _partial(file: Path) -> Path:
    """Where a file is written before it gets its name."""
    return file.with_name(f"{file.name}.part")


def _write(file: Path, data: bytes) -> None:
    """Puts a file in place once its bytes have reached the disk."""
    temporary = _partial(file)
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def _pack_part(journal: _Journal, name: str, source: Source, workers: int) -> Iterator[int]:
    """Packs what is left of a part; yields how many of its images are done."""
    done = journal.parts[name]
    yield done[-1].end if done else 0
    if journal.is_finished(name):
        if not done or done[-1].end < len(source):
            raise DataError(f"{journal.to / name} has lost tar files. Remove {journal.to}")
        return
    folder, settings = journal.partial(name), journal.settings
    folder.mkdir(exist_ok=True)
    labels = _labels(source.classes, settings)
    tar = None
    for sample in _samples(source, done[-1].end if done else 0, settings, workers):
        full = tar and tar.size + len(sample.data) > settings.shard_mb * 10**6
        if tar and full and sample.data:
            tar.close(sample.index)
            done.append(tar.shard)
            journal.write()
            tar = None
        tar = tar or _Tar(folder, len(done), sample.index)
        tar.add(source, sample, labels[source.labels[sample.index]])
        yield sample.index + 1
    if tar:
        tar.close(len(source))
        done.append(tar.shard)
        journal.write()
    _write(folder / CLASSES_FILE, "".join(f"{name}\n" for name in source.classes).encode())
    # reads all headers once
    packed = TarSource(tar_set.inside(folder), empty=True, save=True, again=True)
    if len(packed) != sum(shard.copied + shard.encoded for shard in done):
        raise CspnetError(f"{folder} does not hold what was written: is the disk well?")
    os.replace(folder, journal.to / name)


def _labels(classes: list[str], settings: Settings) -> list[bytes]:
    """What stands in the .cls of each class: its name. Names that are numbers would be indices."""
    numbers = any(re.fullmatch("-?[0-9]+", name) for name in classes)
    if numbers or settings.labels == "index":
        return [str(index).encode() for index in range(len(classes))]
    return [name.encode() for name in classes]


def _samples(source: Source, start: int, settings: Settings, workers: int) -> Iterator[Sample]:
    """The images from an index on, packed, in order."""
    if workers < 2:
        for index in range(start, len(source)):
            yield _sample(source, index, settings)
        return
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:  # OpenCV lets go of the interpreter's lock
        try:
            for index in range(start, len(source)):
                if len(waiting) == 4 * workers:  # the memory stays bounded
                    yield waiting.popleft().result()
                waiting.append(pool.submit(_sample, source, index, settings))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _sample(source: Source, index: int, settings: Settings) -> Sample:
    try:
        data, _ = source.read(index)
        packed = shrink(data, settings.short, settings.quality)
    except (OSError, UnreadableError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Sample(index, b"", "", 0, False, reason.partition("\n")[0])
    copied = packed is data
    suffix = _suffix(source.name(index), packed) if copied else ".jpg"
    return Sample(index, packed, suffix.replace(".jpeg", ".jpg"), len(data), copied)


def _suffix(name: str, data: bytes) -> str:
    """Of a file by its name; of a row in a parquet file, which has none, by its content."""
    if messages.is_image(name):
        return os.path.splitext(name)[1].lower()
    return next((suffix for start, suffix in STARTS.items() if data.startswith(start)), ".jpg")


class _Tar:
    """A tar file that is being written."""

    def __init__(self, folder: Path, number: int, start: int):
        self.shard = Shard(f"{number:06d}.tar", start)
        self.file = folder / self.shard.file
        self.temporary = _partial(self.file)
        self.tar = tarfile.TarFile(self.temporary, "w", format=tarfile.USTAR_FORMAT)

    @property
    def size(self) -> int:
        return self.tar.offset

    def add(self, source: Source, sample: Sample, label: bytes) -> None:
        name = source.name(sample.index)
        if sample.problem:
            self.shard.unreadable.append(f"{name}: {sample.problem}")
            return
        stem = os.path.splitext(re.split(r"\.(?:tar|parquet):", os.path.basename(name))[-1])[0]
        stem = re.sub("[^A-Za-z0-9_-]+", "_", stem)[:STEM]  # a dot would end the key
        key = f"{sample.index:08d}-{stem}"  # so that the order by name is that of the source
        for suffix, data in ((sample.suffix, sample.data), (".cls", label)):
            member = tarfile.TarInfo(key + suffix)
            member.size = len(data)
            self.tar.addfile(member, io.BytesIO(data))
        self.shard.copied += sample.copied
        self.shard.encoded += not sample.copied
        self.shard.before += sample.before
        self.shard.after += len(sample.data)

    def close(self, end: int) -> None:
        """Gives the file its name once its bytes have reached the disk."""
        self.tar.close()
        with open(self.temporary, "rb") as file:
            os.fsync(file.fileno())
        self.shard.end, self.shard.size = end, self.temporary.stat().st_size
        os.replace(self.temporary, self.file)
