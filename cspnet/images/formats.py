"""What all image formats share: errors, a header's facts, OpenCV's decoder, conversions."""

from typing import NamedTuple

import cv2
import numpy as np

from cspnet.images import MAX_PIXELS

TOO_LARGE = f"its header announces more than {MAX_PIXELS:,} pixels"
# Signatures at the start of a file, by the names that Pillow gives the formats.
_SIGNATURES = {
    "JPEG": (b"\xff\xd8",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "BMP": (b"BM",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "PPM": tuple(b"P%d" % digit for digit in range(1, 8)),
    "JPEG2000": (b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"),
}


class UnreadableError(ValueError):
    """The bytes are not an image that can be decoded."""


class TooLargeError(UnreadableError):
    """The image has, or would get, more pixels than memory should be given to."""


class UnsupportedError(UnreadableError):
    """The image has samples or colours for which docs/data.md defines no conversion to RGB."""


class ImageInfo(NamedTuple):
    """What a file says of its image, as the decoder applies it."""

    format: str
    orientation: int = 1  # 1 to 8, as in EXIF; applied
    damaged_exif: bool = False  # so that no orientation is known
    top: int = 255  # the largest value that a sample can have
    grey: bool = False
    alpha: bool = False
    cmyk: bool = False
    frames: bool = False  # more than one frame or page


def container(data: bytes) -> str | None:
    """The format that the first bytes announce; None for one that is not read."""
    for name, signatures in _SIGNATURES.items():
        if data.startswith(signatures):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4]), 128)
        if any(data[at : at + 4] in (b"avif", b"avis") for at in range(8, end, 4)):  # brands
            return "AVIF"
    return None


def require_pixels(width: int, height: int) -> None:
    """Raises TooLarge for more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise TooLargeError(TOO_LARGE)


def opencv(data: bytes, flags: int) -> np.ndarray:
    """The image as OpenCV decodes it. Raises Unreadable."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            raise TooLargeError(TOO_LARGE) from None
        raise UnreadableError(str(error).strip()) from None
    if image is None:
        raise UnreadableError("not a readable image")
    return image


def to_8_bits(samples: np.ndarray, top: int) -> np.ndarray:
    """Samples from 0 to `top` as uint8 from 0 to 255: 255 × sample / top, halves rounded up."""
    if top == 255:
        return samples.astype(np.uint8)
    values = np.arange(top + 1, dtype=np.int64)
    return ((values * 510 + top) // (2 * top)).astype(np.uint8)[samples]


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """The image turned and mirrored as EXIF's orientation 1 to 8 asks for."""
    if orientation == 1:
        return image
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    # After the transposition, 6 is mirrored horizontally, 8 vertically, 7 both ways.
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return image if flip is None else cv2.flip(image, flip)
