"""What the header of a JPEG tells, and a JPEG that ends early."""

from collections.abc import Iterator
from typing import NamedTuple

from cspnet.images.formats import ImageInfo
from cspnet.images.ifd import ORIENTATION, Broken, Directory, exif_orientation

# Markers (ITU-T T.81, table B.1).
START, END = b"\xff\xd8", b"\xff\xd9"
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
SCAN, RESTARTS, APP1 = 0xDA, 0xDD, 0xE1
EXIF = b"Exif\0\0"  # how an APP1 segment with EXIF begins


class Frame(NamedTuple):
    """The size of the image, and where the file says it."""

    width: int
    height: int
    at: int  # offset of the height's two bytes
    block: int  # rows that are coded together
    scan: int  # where the only scan begins; 0 where it is not alone, or has restart markers


def frame(data: bytes) -> Frame | None:
    """From the header of a JPEG.

    None for other formats, for an image that EXIF turns or mirrors, and wherever there is doubt.
    """
    if not data.startswith(START):
        return None
    at, found, restarts = 2, None, False
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in (BASELINE, EXTENDED, PROGRESSIVE):
            height, width = (int.from_bytes(data[at + i : at + i + 2]) for i in (5, 7))
            components = data[at + 10 : at + 2 + length : 3]
            if not (width and height and components):
                return None
            block = 8 * max(sampling & 15 for sampling in data[at + 11 : at + 2 + length : 3])
            found = Frame(width, height, at + 5, block, 0)
            if marker == PROGRESSIVE:
                return found
        elif marker == SCAN and found:
            whole = data[at + 4] == len(components) and not restarts
            return found._replace(scan=at) if whole else found
        elif not 0xC4 <= marker <= 0xFE or 0xD0 <= marker <= SCAN or length < 2:
            return found
        elif marker == RESTARTS:
            restarts = True
        elif marker == APP1 and not _upright(data[at + 4 : at + 2 + length]):
            return None
        at += 2 + length
    return found


def cut(data: bytes, frame: Frame, rows: int) -> bytearray | None:
    """The same JPEG with only its first `rows` rows: what lies below them is never decoded.

    But for the last few rows, which lack their neighbours' colour, libjpeg's pixels are those of
    the whole, and damage further down goes unnoticed. None where nothing would be saved, or where
    that is not certain: several scans, restart markers, whatever follows the image.
    """
    blocks, all_blocks = -(-rows // frame.block), -(-frame.height // frame.block)
    if not frame.scan or not 0 < blocks < all_blocks:
        return None
    end = data.find(END, frame.scan)
    if end != len(data) - len(END):
        return None
    # Without the end's marker libjpeg looks for no more; with it, it would complain on stderr.
    shorter = bytearray(data[:end])
    shorter[frame.at : frame.at + 2] = rows.to_bytes(2)
    return shorter


def _upright(segment: bytes) -> bool:
    """Whether an APP1 segment certainly leaves the image as it is."""
    if not segment.startswith(EXIF):
        return True  # XMP as a rule, which does not count
    try:
        return Directory(segment.removeprefix(EXIF)).values(ORIENTATION, (1,)) == (1,)
    except Broken:
        return False


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, first byte and end of the segments in front of the first scan."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == SCAN or end < at + 4:
            return
        yield marker, at + 4, end
        at = end


def orientation(data: bytes) -> int:
    """1 to 8, from the first EXIF segment; 1 where there is none, or it is damaged."""
    try:
        return _orientation(data)
    except Broken:
        return 1


def _orientation(data: bytes) -> int:
    """The same; raises Broken for damaged EXIF."""
    for marker, start, end in _segments(data):
        if marker == APP1 and data.startswith(EXIF, start):
            return exif_orientation(data[start:end])
    return 1


def header(data: bytes) -> ImageInfo:
    """What the segments in front of the first scan say."""
    try:
        turned, damaged = _orientation(data), False
    except Broken:
        turned, damaged = 1, True
    components = 3
    for marker, start, _ in _segments(data):
        if (
            marker in range(0xC0, 0xD0)
            and marker not in (0xC4, 0xC8, 0xCC)
            and start + 5 < len(data)
        ):
            components = data[start + 5]
    return ImageInfo("JPEG", turned, damaged, grey=components == 1, cmyk=components == 4)
