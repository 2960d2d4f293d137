"""Pack a data set once: images resized, written as samples of tar files in their original order."""

import contextlib
import io
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2

from cspnet.datasets.pack_journal import PackedShard, PackJournal, PackSettings
from cspnet.errors import CspnetError, DataError
from cspnet.files import move_into_place, replace_text, temporary_path
from cspnet.images.decode import MAX_SIDE, TooLargeError, UnreadableError, decode
from cspnet.recipe.schema import DIGITS
from cspnet.sources.data_root import open_parts, require_data_folder
from cspnet.sources.names import count_and_names
from cspnet.sources.protocol import Source
from cspnet.sources.tar_members import CLASSES_FILE
from cspnet.sources.tar_set import TarSet, TarSource
from cspnet.sources.tree import is_image
from cspnet.text import printable

SIGNATURES = {b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp", b"II*": ".tif", b"MM": ".tif"}
MAX_STEM = 60  # characters of a file name that the key of its sample keeps


class PackedSample(NamedTuple):
    """A packed image, or the reason why it could not be read."""

    position: int  # index in the source
    data: bytes  # empty if the image is unreadable
    suffix: str
    bytes_before: int
    copied: bool
    problem: str = ""


def limit_short_side(data: bytes, short_side: int, quality: int) -> bytes:
    """Scale an encoded image down to a shorter side of `short_side` pixels, as JPEG.

    Returns the same bytes if the image is not larger. Orientation is applied. Raises
    UnreadableError.
    """
    image = decode(data)
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise TooLargeError(f"a side of more than {MAX_SIDE:,} pixels")
    side = min(height, width)
    if side <= short_side:
        return data
    size = (max(1, round(width * short_side / side)), max(1, round(height * short_side / side)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    small = cv2.cvtColor(small, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def pack_dataset(
    data: str,
    output: Path,
    settings: PackSettings,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[PackedShard]]:
    """Pack train/ and val/ of a data root into a folder, or resume an interrupted pack.

    The result does not depend on the number of `workers` (threads). `progress` is called with the
    number of images done and their total. Raises DataError if the data or the folder is unsuitable,
    and CspnetError if the folder cannot be written.
    """
    if data != DIGITS:
        require_data_folder(data, "Give a data root")
    training, validation = open_parts(data)
    sources = {"train": training, "val": validation}
    _require_class_names(training.classes)
    _require_disjoint(data, output)
    try:
        journal = PackJournal(output, settings, sources)
        total, done = sum(map(len, sources.values())), 0
        for name, source in sources.items():
            for count in _pack_split(journal, name, source, workers):
                progress(done + count, total)
            done += len(source)
        journal.save(finished=True)
    except OSError as error:
        raise CspnetError(
            f"cannot write to {output}: {error.strerror or error}. Finished tar files are kept. "
            "Fix the problem, for example free disk space, then run the same command again to "
            "resume"
        ) from None
    return journal.splits


def pack_summary(
    splits: dict[str, list[PackedShard]], settings: PackSettings
) -> Iterator[tuple[str, str]]:
    """The result of a pack as text: (severity, line) pairs."""
    for name, packed in splits.items():
        copied, encoded = sum(s.copied for s in packed), sum(s.encoded for s in packed)
        before, after = sum(s.bytes_before for s in packed), sum(s.bytes_after for s in packed)
        yield (
            "",
            f"{name}: {copied + encoded:,} images in {len(packed):,} tar files, "
            f"{before / 1e6:,.1f} MB reduced to {after / 1e6:,.1f} MB "
            f"({after / max(before, 1):.0%}); {encoded:,} resized to a shorter side of "
            f"{settings.short_side} pixels (JPEG quality {settings.quality}), {copied:,} copied",
        )
        for problem in (problem for shard in packed for problem in shard.unreadable):
            yield "error", f"error: {name}: skipped {printable(problem)}"
    if any(shard.encoded for packed in splits.values() for shard in packed):
        yield (
            "",
            "The pixels of resized images differ from the originals: training on the packed data "
            "set is a different run.",
        )


def _require_class_names(classes: list[str]) -> None:
    """Raise DataError unless every name can be a line of CLASSES_FILE."""
    invalid = [name for name in classes if not _is_line(name)]
    if invalid:
        raise DataError(
            f"{count_and_names(invalid, 'class')}: {CLASSES_FILE} cannot hold these names. Each "
            "must be one line of UTF-8 without leading or trailing blanks. Rename the class "
            "folders."
        )


def _is_line(name: str) -> bool:
    """Whether a name is one line of UTF-8 without surrounding blanks or a byte order mark."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return bool(encoded) and name == name.strip().lstrip("\ufeff") and not {*"\r\n"} & {*name}


def _require_disjoint(data: str, output: Path) -> None:
    """Raise DataError if one of the two folders is inside the other."""
    target = os.path.realpath(output)
    folders = [Path(data).expanduser()]
    with contextlib.suppress(OSError):
        folders += [Path(entry) for entry in os.scandir(folders[0]) if entry.is_dir()]
    for folder in map(os.path.realpath, folders):
        if os.path.commonpath([folder, target]) in (folder, target):
            raise DataError(f"--output {output}: it must not be inside {data} or contain it")


def _pack_split(journal: PackJournal, name: str, source: Source, workers: int) -> Iterator[int]:
    """Pack the remaining images of a split; yield the number of images done."""
    packed = journal.splits[name]
    yield packed[-1].end if packed else 0
    if journal.is_finished(name):
        if not packed or packed[-1].end < len(source):
            raise DataError(
                f"tar files are missing from {journal.output / name}. Remove {journal.output} and "
                "pack again"
            )
        return
    folder, settings = journal.partial_folder(name), journal.settings
    folder.mkdir(exist_ok=True)
    tar = None
    for sample in _packed_samples(source, packed[-1].end if packed else 0, settings, workers):
        is_full = tar and tar.size + len(sample.data) > settings.shard_mb * 10**6
        if tar and is_full and sample.data:
            journal.add(name, tar.close(sample.position))
            tar = None
        tar = tar or _TarWriter(folder, len(packed), sample.position)
        tar.add(source, sample)
        yield sample.position + 1
    if tar:
        journal.add(name, tar.close(len(source)))
    class_names = "".join(f"{name}\n" for name in source.classes)
    replace_text(folder / CLASSES_FILE, class_names, durable=True)
    _verify(folder, sum(shard.copied + shard.encoded for shard in packed))
    move_into_place(folder, journal.output / name)


def _verify(folder: Path, images: int) -> None:
    """Read all tar headers once and save their index. Raise CspnetError unless all images exist."""
    tars = TarSet.in_folder(folder)
    if tars is None or len(TarSource(tars, allow_empty=True, save=True, rebuild=True)) != images:
        raise CspnetError(f"{folder} does not contain what was written. Check the disk")


def _packed_samples(
    source: Source, start: int, settings: PackSettings, workers: int
) -> Iterator[PackedSample]:
    """The packed images from index `start` on, in order."""
    if workers < 2:
        for position in range(start, len(source)):
            yield _pack_image(source, position, settings)
        return
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:  # threads suffice: OpenCV releases the GIL
        try:
            for position in range(start, len(source)):
                if len(pending) == 4 * workers:  # limits the memory
                    yield pending.popleft().result()
                pending.append(pool.submit(_pack_image, source, position, settings))
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _pack_image(source: Source, position: int, settings: PackSettings) -> PackedSample:
    try:
        data, _ = source.read(position)
        packed = limit_short_side(data, settings.short_side, settings.quality)
    except (OSError, UnreadableError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return PackedSample(position, b"", "", 0, False, reason.partition("\n")[0])
    is_copied = packed is data
    suffix = _suffix(source.name(position), packed) if is_copied else ".jpg"
    return PackedSample(position, packed, suffix.replace(".jpeg", ".jpg"), len(data), is_copied)


def _suffix(name: str, data: bytes) -> str:
    """The suffix of an image file; for a row of a parquet file, derived from its contents."""
    if is_image(name):
        return os.path.splitext(name)[1].lower()
    return next((suffix for start, suffix in SIGNATURES.items() if data.startswith(start)), ".jpg")


class _TarWriter:
    """A tar file that is being written under a temporary name."""

    def __init__(self, folder: Path, number: int, start: int):
        self.shard = PackedShard(f"{number:06d}.tar", start)
        self.file = folder / self.shard.file
        self.temporary = temporary_path(self.file)
        self.tar = tarfile.TarFile(self.temporary, "w", format=tarfile.USTAR_FORMAT)

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self.tar.offset

    def add(self, source: Source, sample: PackedSample) -> None:
        """Append an image and its class index, or record why the image could not be read."""
        name = source.name(sample.position)
        if sample.problem:
            self.shard.unreadable.append(f"{name}: {sample.problem}")
            return
        stem = os.path.splitext(re.split(r"\.(?:tar|parquet):", os.path.basename(name))[-1])[0]
        stem = re.sub("[^A-Za-z0-9_-]+", "_", stem)[:MAX_STEM]  # a dot would end the key
        key = f"{sample.position:08d}-{stem}"  # sorts by name in the order of the source
        label = str(source.labels[sample.position]).encode()
        for suffix, data in ((sample.suffix, sample.data), (".cls", label)):
            member = tarfile.TarInfo(key + suffix)
            member.size = len(data)
            self.tar.addfile(member, io.BytesIO(data))
        self.shard.copied += sample.copied
        self.shard.encoded += not sample.copied
        self.shard.bytes_before += sample.bytes_before
        self.shard.bytes_after += len(sample.data)

    def close(self, end: int) -> PackedShard:
        """Finish the file, which contains the images before index `end`, and give it its name."""
        self.tar.close()
        self.shard.end, self.shard.size = end, self.temporary.stat().st_size
        move_into_place(self.temporary, self.file, durable=True)
        return self.shard
