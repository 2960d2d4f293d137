"""One file: whether it can be trained on, what is odd in it, its digest. Many, by many processes.

What training's decoder refuses is unreadable. What it does with an image is reported by
`codecs.inspect`, which the decoder uses itself. Whether a file is whole is Pillow's to say: some
versions of OpenCV fill up with grey what a truncated JPEG lacks.
"""

import hashlib
import io
import multiprocessing
import os
import re
import signal
import stat
import sys
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from PIL import Image

from cspnet.data import worker
from cspnet.images import MAX_PIXELS
from cspnet.errors import CspnetError
from cspnet.images import codecs
from cspnet.images.decode import MAX_ASPECT, MAX_SIDE, PILLOW_FORMATS, decode
from cspnet.images.formats import ImageInfo, TooLargeError, UnreadableError, UnsupportedError
from cspnet.sources.data_root import Folder, Source

CHUNK = 32  # files that a process looks at before it reports
DIGEST = 16  # bytes of a digest
MAX_BYTES = 2**30  # of a file: more is no image, and would only fill the memory
TINY = 32  # pixels of the shorter side
NATIVE = {
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm"), "PPM"),
    **{".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"},
}
# Formats of which Pillow reads less than the decoder: of its complaints only missing bytes count.
LIMITED_IN_PILLOW = ("TIFF", "PPM", "BMP", "AVIF", "JPEG2000")
XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")


class Look(NamedTuple):
    """What there is to say of a file."""

    digest: bytes  # of all its bytes, [DIGEST]; empty where they cannot be trained on
    found: tuple[tuple[str, str], ...]  # kinds of cspnet.datasets.check.KINDS, each with a detail


def look(source: Source, index: int) -> Look:
    """Reads one image of a source and looks at it. Raises nothing, whatever the bytes are."""
    name = source.name(index)
    try:
        if isinstance(source, Folder):
            status = os.stat(name)
            if not stat.S_ISREG(status.st_mode):  # a pipe would never end
                return Look(b"", (("unopenable", "not a regular file"),))
            if status.st_size > MAX_BYTES:
                return Look(b"", (("huge", f"more than {MAX_BYTES / 2**30:g} GiB"),))
        data, _ = source.read(index)
    except FileNotFoundError:
        return Look(b"", (("broken link", ""),) if os.path.islink(name) else (("gone", ""),))
    except OSError as error:
        return Look(b"", (("unopenable", error.strerror or str(error)),))
    return look_at(data, os.path.splitext(name)[1].lower())


def look_at(data: bytes, suffix: str) -> Look:
    """What there is to say of the bytes of a file with that suffix."""
    if not data:
        return Look(b"", (("empty", ""),))
    header = None
    try:
        height, width = decode(data).shape[:2]
        if max(height, width) > MAX_SIDE:
            return Look(b"", (("huge", f"a side of more than {MAX_SIDE:,} pixels"),))
        if max(height, width) > MAX_ASPECT * min(height, width):
            return Look(b"", (("ribbon", f"one side more than {MAX_ASPECT} times the other"),))
        header = codecs.read_info(data)
    except TooLargeError:
        return Look(b"", (("huge", f"more than {MAX_PIXELS:,} pixels"),))
    except UnsupportedError as error:
        return Look(b"", (("unsupported", str(error)),))
    except UnreadableError as error:
        if "truncated" in str(error):
            return Look(b"", (("truncated", ""),))
    whole, odd = True, ()
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # the two disagree on the header
                return Look(b"", (("huge", f"more than {MAX_PIXELS:,} pixels"),))
            image.load()
            pages = getattr(image, "n_frames", 1) > 1  # of a JPEG too: MPO has several
    except Exception as error:  # of any kind, from parsers that trust the file
        whole, pages = "truncated" not in str(error).lower(), False
        if header and header.format not in LIMITED_IN_PILLOW:
            odd = (("damaged", ""),)
    if not whole or not header:
        cut = not whole or _cut_short(data)
        return Look(b"", (("truncated" if cut else "unreadable", ""),))
    if not odd:
        header = header._replace(frames=header.frames or pages)
        odd = tuple(_oddities(header, min(height, width), data, suffix))
    return Look(hashlib.blake2b(data, digest_size=DIGEST).digest(), odd)


def _cut_short(data: bytes) -> bool:
    """Whether bytes that cannot be decoded lack the mark that their format ends with."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    return data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little")


def _oddities(
    header: ImageInfo, shorter: int, data: bytes, suffix: str
) -> Iterator[tuple[str, str]]:
    """What is unusual in an image that can be decoded, with its shorter side in pixels."""
    if suffix in NATIVE and header.format != NATIVE[suffix]:
        yield "misnamed", f"{header.format} in a file named {suffix}"
    if header.cmyk:
        yield "CMYK", ""
    if header.grey:
        yield "grey", ""
    if header.alpha:
        yield "alpha", ""
    if header.top > 255:
        yield "16 bits", "" if header.top == 65_535 else f"0 to {header.top:,}"
    if header.top < 255:
        yield "few levels", f"0 to {header.top:,}"
    if shorter < TINY:
        yield "tiny", ""
    if header.damaged_exif:
        yield "broken EXIF", ""
    if header.orientation != 1:
        yield "turned", ""
    xmp = XMP_ORIENTATION.search(data)
    if xmp and int(xmp[1]) != header.orientation:
        yield "XMP orientation", ""
    if header.frames:
        yield "frames", ""


def looks(sources: list[Source], workers: int) -> Iterator[tuple[int, int, list[Look]]]:
    """All images of the sources in order: the number of the source, an index, the looks from it on.

    By `workers` processes; by none of its own below two. Raises CspnetError where one dies.
    """
    chunks = (
        (number, first, min(first + CHUNK, len(source)))
        for number, source in enumerate(sources)
        for first in range(0, len(source), CHUNK)
    )
    pool = _pool(workers, sources) if workers > 1 else None
    if pool is None:
        for number, first, last in chunks:
            yield number, first, _looks_of(sources[number], first, last)
        return
    waiting: deque[tuple[tuple[int, int, int], Future]] = deque()

    def oldest() -> tuple[int, int, list[Look]]:
        (number, first, _), future = waiting[0]
        result = future.result()
        waiting.popleft()
        return number, first, result

    try:
        for chunk in chunks:
            if len(waiting) == 4 * workers:  # the memory stays bounded
                yield oldest()
            waiting.append((chunk, pool.submit(_look_at_chunk, *chunk)))
        while waiting:
            yield oldest()
    except BrokenProcessPool:
        number, first, _ = waiting[0][0] if waiting else chunk
        raise CspnetError(
            "a process died, for want of memory perhaps, at a file soon after "
            f"{sources[number].name(first)}: try --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int, sources: list[Source]) -> ProcessPoolExecutor | None:
    """Processes that look at files; None where the system has no semaphores to make them talk."""
    # Spawned, not forked: the progress bar has a thread, whose locks a fork would copy as they are.
    context = multiprocessing.get_context("spawn")
    try:
        return ProcessPoolExecutor(workers, context, initializer=_start, initargs=(sources,))
    except OSError as error:
        reason = error.strerror or str(error)
    print(
        f"no worker process can be started ({reason}): this process reads all files, which is "
        "slower. In a container, check /dev/shm (docker run --shm-size=1g)",
        file=sys.stderr,
    )
    return None


_sources: list[Source] = []  # of a worker: sent once, not with each chunk


def _start(sources: list[Source]) -> None:
    """Makes a new process a worker."""
    _sources[:] = sources
    worker.begin(signal.SIGINT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libpng's and libjpeg's lines name no file


def _look_at_chunk(number: int, first: int, last: int) -> list[Look]:
    return _looks_of(_sources[number], first, last)


def _looks_of(source: Source, first: int, last: int) -> list[Look]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [look(source, index) for index in range(first, last)]
