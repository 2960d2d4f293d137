"""Inspect image files for `cspnet check`: readable or not, oddities, digest.

A file is unreadable if the decoder of training refuses it. `codecs.inspect`, which the decoder uses
itself, reports how an image is converted. Pillow decides whether a file is complete, because some
versions of OpenCV fill the missing part of a truncated JPEG with grey.
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

from cspnet.data.worker import init_worker
from cspnet.errors import CspnetError
from cspnet.images import MAX_PIXELS, codecs
from cspnet.images.decode import MAX_ASPECT, MAX_SIDE, PILLOW_FORMATS, decode
from cspnet.images.formats import ImageInfo, TooLargeError, UnreadableError, UnsupportedError
from cspnet.sources.folder import Folder
from cspnet.sources.protocol import Source

CHUNK_SIZE = 32  # files that a process inspects before it reports
DIGEST_SIZE = 16  # bytes
MAX_FILE_BYTES = 2**30  # larger files are no images; reading them could exhaust the memory
TINY_SIDE = 32  # an image is tiny if its shorter side has fewer pixels
FORMAT_BY_SUFFIX = {
    **dict.fromkeys((".jpg", ".jpeg"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm"), "PPM"),
    **{".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"},
}
# Pillow does not support all variants of these formats, so only its reports of truncation count.
PARTIAL_IN_PILLOW = ("TIFF", "PPM", "BMP", "AVIF", "JPEG2000")
XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\s*["'<]""")


class Inspection(NamedTuple):
    """The result of inspecting one file."""

    digest: bytes  # of its contents, [DIGEST_SIZE]; empty if training cannot use the file
    findings: tuple[tuple[str, str], ...]  # (kind of contents.FILE_FINDINGS, detail)


def inspect_image(source: Source, index: int) -> Inspection:
    """Read and inspect one image of a source. Raises no exception for any bytes."""
    name = source.name(index)
    try:
        if isinstance(source, Folder):
            status = os.stat(name)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
                return _unusable("unopenable", "not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                return _unusable("huge", f"more than {MAX_FILE_BYTES / 2**30:g} GiB")
        data, _ = source.read(index)
    except FileNotFoundError:
        return _unusable("broken link" if os.path.islink(name) else "gone")
    except OSError as error:
        return _unusable("unopenable", error.strerror or str(error))
    return inspect_bytes(data, os.path.splitext(name)[1].lower())


def _unusable(kind: str, detail: str = "") -> Inspection:
    return Inspection(b"", ((kind, detail),))


def inspect_bytes(data: bytes, suffix: str) -> Inspection:
    """Inspect the contents of a file with the given suffix."""
    if not data:
        return _unusable("empty")
    header = None
    try:
        height, width = decode(data).shape[:2]
        if max(height, width) > MAX_SIDE:
            return _unusable("huge", f"a side of more than {MAX_SIDE:,} pixels")
        if max(height, width) > MAX_ASPECT * min(height, width):
            return _unusable("ribbon", f"aspect ratio above {MAX_ASPECT}")
        header = codecs.read_info(data)
    except TooLargeError:
        return _unusable("huge", f"more than {MAX_PIXELS:,} pixels")
    except UnsupportedError as error:
        return _unusable("unsupported", str(error))
    except UnreadableError as error:
        if "truncated" in str(error):
            return _unusable("truncated")
    is_complete = True
    oddities: tuple[tuple[str, str], ...] = ()
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:  # Pillow reads the header differently
                return _unusable("huge", f"more than {MAX_PIXELS:,} pixels")
            image.load()
            has_frames = getattr(image, "n_frames", 1) > 1  # for a JPEG, too: MPO
    except Exception as error:  # Pillow's parsers raise any type for a malformed file
        is_complete, has_frames = "truncated" not in str(error).lower(), False
        if header and header.format not in PARTIAL_IN_PILLOW:
            oddities = (("damaged", ""),)
    if not is_complete or not header:
        is_truncated = not is_complete or _lacks_end_marker(data)
        return _unusable("truncated" if is_truncated else "unreadable")
    if not oddities:
        header = header._replace(multi_frame=header.multi_frame or has_frames)
        oddities = tuple(_oddities(header, min(height, width), data, suffix))
    return Inspection(hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest(), oddities)


def _lacks_end_marker(data: bytes) -> bool:
    """Whether undecodable data lack the marker at the end of their format."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    return data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little")


def _oddities(
    header: ImageInfo, shorter: int, data: bytes, suffix: str
) -> Iterator[tuple[str, str]]:
    """Oddities of a decodable image with the given shorter side in pixels: kinds and details."""
    if suffix in FORMAT_BY_SUFFIX and header.format != FORMAT_BY_SUFFIX[suffix]:
        yield "misnamed", f"{header.format} named {suffix}"
    if header.cmyk:
        yield "CMYK", ""
    if header.grey:
        yield "grey", ""
    if header.alpha:
        yield "alpha", ""
    if header.max_value > 255:
        yield "16 bits", "" if header.max_value == 65_535 else f"0 to {header.max_value:,}"
    if header.max_value < 255:
        yield "few levels", f"0 to {header.max_value:,}"
    if shorter < TINY_SIDE:
        yield "tiny", ""
    if header.damaged_exif:
        yield "broken EXIF", ""
    if header.orientation != 1:
        yield "turned", ""
    xmp = XMP_ORIENTATION.search(data)
    if xmp and int(xmp[1]) != header.orientation:
        yield "XMP orientation", ""
    if header.multi_frame:
        yield "frames", ""


def inspect_sources(
    sources: list[Source], workers: int
) -> Iterator[tuple[int, int, list[Inspection]]]:
    """Inspect all images of the sources, in order.

    Yields the number of the source, an index, and the inspections of the images from this index on.
    With fewer than two `workers`, it starts no processes. Raises CspnetError if a process dies.
    """
    chunks = (
        (number, first, min(first + CHUNK_SIZE, len(source)))
        for number, source in enumerate(sources)
        for first in range(0, len(source), CHUNK_SIZE)
    )
    pool = _start_pool(workers, sources) if workers > 1 else None
    if pool is None:
        for number, first, stop in chunks:
            yield number, first, _inspect_range(sources[number], first, stop)
        return
    pending: deque[tuple[tuple[int, int, int], Future]] = deque()

    def oldest() -> tuple[int, int, list[Inspection]]:
        (number, first, _), future = pending[0]
        result = future.result()
        pending.popleft()
        return number, first, result

    try:
        for chunk in chunks:
            if len(pending) == 4 * workers:  # limits the memory
                yield oldest()
            pending.append((chunk, pool.submit(_inspect_chunk, *chunk)))
        while pending:
            yield oldest()
    except BrokenProcessPool:
        number, first, _ = pending[0][0] if pending else chunk
        raise CspnetError(
            f"a worker process died while reading {sources[number].name(first)} or one of the next "
            "files, perhaps because memory ran out. Try --workers 1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_pool(workers: int, sources: list[Source]) -> ProcessPoolExecutor | None:
    """A pool of worker processes, or None if the system has no semaphores for it."""
    # Spawn: a fork would copy the locks of the progress bar's thread in their current state.
    context = multiprocessing.get_context("spawn")
    try:
        return ProcessPoolExecutor(workers, context, initializer=_init_pool, initargs=(sources,))
    except OSError as error:
        reason = error.strerror or str(error)
    print(
        f"cannot start worker processes ({reason}): the main process reads all files, which is "
        "slower. In a container, check the size of /dev/shm (docker run --shm-size=1g)",
        file=sys.stderr,
    )
    return None


_sources: list[Source] = []  # in a worker: sent once instead of with each chunk


def _init_pool(sources: list[Source]) -> None:
    """Initialize a worker process."""
    _sources[:] = sources
    init_worker(signal.SIGINT)
    # libpng and libjpeg print warnings that do not name the file.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _inspect_chunk(number: int, first: int, stop: int) -> list[Inspection]:
    return _inspect_range(_sources[number], first, stop)


def _inspect_range(source: Source, first: int, stop: int) -> list[Inspection]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [inspect_image(source, index) for index in range(first, stop)]
