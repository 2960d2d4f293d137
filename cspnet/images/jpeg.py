"""The header of a JPEG, and how to truncate a JPEG after a number of rows."""

from collections.abc import Iterator
from typing import NamedTuple

from cspnet.images.formats import ImageInfo
from cspnet.images.ifd import ORIENTATION, IfdError, ImageFileDirectory, exif_orientation

# Markers (ITU-T T.81, table B.1).
SOI, EOI = b"\xff\xd8", b"\xff\xd9"
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
SOS, DRI, APP1 = 0xDA, 0xDD, 0xE1
EXIF = b"Exif\0\0"  # prefix of an APP1 segment with EXIF


class JpegHeader(NamedTuple):
    """The image size, and what is needed to change the height."""

    width: int
    height: int
    height_offset: int  # of the two bytes with the height
    block_rows: int  # rows that are coded together (height of an MCU)
    scan_offset: int  # of the only scan; 0 if there are several, or restart markers


def read_header(data: bytes) -> JpegHeader | None:
    """Parse the header of a JPEG.

    None for other formats, for an image that EXIF rotates or flips, and in case of any doubt.
    """
    if not data.startswith(SOI):
        return None
    at, restarts = 2, False
    header: JpegHeader | None = None
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in (BASELINE, EXTENDED, PROGRESSIVE):
            height, width = (int.from_bytes(data[at + i : at + i + 2]) for i in (5, 7))
            components = data[at + 10 : at + 2 + length : 3]
            if not (width and height and components):
                return None
            rows = 8 * max(sampling & 15 for sampling in data[at + 11 : at + 2 + length : 3])
            header = JpegHeader(width, height, at + 5, rows, 0)
            if marker == PROGRESSIVE:
                return header
        elif marker == SOS and header:
            only_scan = data[at + 4] == len(components) and not restarts
            return header._replace(scan_offset=at) if only_scan else header
        elif not 0xC4 <= marker <= 0xFE or 0xD0 <= marker <= SOS or length < 2:
            return header
        elif marker == DRI:
            restarts = True
        elif marker == APP1 and not _is_upright(data[at + 4 : at + 2 + length]):
            return None
        at += 2 + length
    return header


def truncate_rows(data: bytes, header: JpegHeader, rows: int) -> bytes | None:
    """The same JPEG with only its first `rows` rows; the rows below are never decoded.

    libjpeg then decodes the same pixels as from the complete file, except in the last few rows,
    whose chroma is interpolated with the rows below; damage further down goes unnoticed. None if
    this saves nothing, or is not certain to work: several scans, restart markers, data after EOI.
    """
    blocks, all_blocks = -(-rows // header.block_rows), -(-header.height // header.block_rows)
    if not header.scan_offset or not 0 < blocks < all_blocks:
        return None
    end = data.find(EOI, header.scan_offset)
    if end != len(data) - len(EOI):
        return None
    # Without EOI libjpeg stops after the last row; with it, it would print a warning to stderr.
    at = header.height_offset
    return b"".join((data[:at], rows.to_bytes(2), data[at + 2 : end]))


def _is_upright(segment: bytes) -> bool:
    """Whether an APP1 segment certainly does not rotate or flip the image."""
    if not segment.startswith(EXIF):
        return True  # usually XMP, which is ignored
    try:
        directory = ImageFileDirectory(segment.removeprefix(EXIF))
        return directory.values(ORIENTATION, (1,)) == (1,)
    except IfdError:
        return False


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the payload of each segment before the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == SOS or end < at + 4:
            return
        yield marker, at + 4, end
        at = end


def orientation(data: bytes) -> tuple[int, bool]:
    """The orientation, 1 to 8, from the first EXIF segment, and whether that is damaged."""
    for marker, start, end in _segments(data):
        if marker == APP1 and data.startswith(EXIF, start):
            return exif_orientation(data[start:end])
    return 1, False


def jpeg_info(data: bytes) -> ImageInfo:
    """Properties of a JPEG by the segments before the first scan."""
    exif, damaged = orientation(data)
    components = 3
    for marker, start, _ in _segments(data):
        is_frame = marker in range(0xC0, 0xD0) and marker not in (0xC4, 0xC8, 0xCC)
        if is_frame and start + 5 < len(data):
            components = data[start + 5]
    return ImageInfo("JPEG", exif, damaged, grey=components == 1, cmyk=components == 4)
