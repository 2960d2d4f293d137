"""Code shared by all image formats: errors, header information, OpenCV's decoder, conversions."""

from typing import NamedTuple

import cv2
import numpy as np

from cspnet.images import MAX_PIXELS

TOO_LARGE = f"its header declares more than {MAX_PIXELS:,} pixels"
# Signatures at the start of a file, by Pillow's names of the formats.
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
    """The image has too many pixels, or would have after resizing."""


class UnsupportedError(UnreadableError):
    """docs/data.md defines no conversion to RGB for the samples or colours of this image."""


class ImageInfo(NamedTuple):
    """Properties of an image according to its header, as the decoder applies them."""

    format: str
    orientation: int = 1  # EXIF orientation, 1 to 8; applied by the decoder
    damaged_exif: bool = False  # the orientation is unknown
    max_value: int = 255  # the largest possible value of a sample
    grey: bool = False
    alpha: bool = False
    cmyk: bool = False
    multi_frame: bool = False  # several frames or pages


def detect_format(data: bytes) -> str | None:
    """The format of a file by its first bytes; None if it is not supported."""
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


def check_pixel_count(width: int, height: int) -> None:
    """Raise TooLargeError for more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise TooLargeError(TOO_LARGE)


def decode_opencv(data: bytes, flags: int) -> np.ndarray:
    """Decode an image with OpenCV and its imread flags. Raises UnreadableError."""
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
    """Convert samples from 0 … `top` to uint8, 0 … 255: 255 × sample / top, halves rounded up."""
    if top == 255:
        return samples.astype(np.uint8)
    values = np.arange(top + 1, dtype=np.int64)
    return ((values * 510 + top) // (2 * top)).astype(np.uint8)[samples]


def apply_orientation(image: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and flip an image [H, W, C] according to its EXIF orientation, 1 to 8."""
    if orientation == 1:
        return image
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    # After the transposition, 6 needs a horizontal flip, 8 a vertical one, 7 both.
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return image if flip is None else cv2.flip(image, flip)
