"""BMP: header, and pixels of 16 and 32 bits, whose colour masks OpenCV does not apply."""

import cv2
import numpy as np

from cspnet.images.formats import (
    ImageInfo,
    UnreadableError,
    UnsupportedError,
    check_pixel_count,
    decode_opencv,
    to_8_bits,
)

_RGB, _BITFIELDS, _ALPHABITFIELDS = 0, 3, 6  # compression
_X1R5G5B5 = (0x7C00, 0x03E0, 0x001F)  # the layout of 16 bits without masks


def _int(data: bytes, at: int, size: int, signed: bool = False) -> int:
    return int.from_bytes(data[at : at + size], "little", signed=signed)


def _masks(data: bytes) -> tuple[int, ...]:
    """Masks of red, green, blue and, if present, alpha; empty if OpenCV decodes the file itself.

    Raises UnsupportedError for masks that are not contiguous.
    """
    header_size, bits, compression = _int(data, 14, 4), _int(data, 28, 2), _int(data, 30, 4)
    if header_size < 40 or bits not in (16, 32):
        return ()
    if compression == _RGB:
        return _X1R5G5B5 if bits == 16 else ()
    if compression not in (_BITFIELDS, _ALPHABITFIELDS):
        return ()
    count = 4 if header_size >= 56 or compression == _ALPHABITFIELDS else 3
    masks = tuple(_int(data, 54 + 4 * i, 4) for i in range(count))
    for mask in masks[:3]:
        run = mask >> _shift(mask) if mask else 0
        if not mask or run & (run + 1) or mask >> bits or run > 0xFFFF:
            raise UnsupportedError(f"BMP with the colour mask {mask:#x}")
    return masks


def _shift(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


def bmp_info(data: bytes) -> ImageInfo:
    """Properties of a BMP. Raises UnsupportedError."""
    masks = _masks(data)
    top = max((mask >> _shift(mask) for mask in masks[:3]), default=255)
    return ImageInfo("BMP", max_value=top, alpha=len(masks) == 4 and masks[3] != 0)


def read_bmp(data: bytes) -> np.ndarray:
    """RGB uint8 [H, W, 3]. Raises UnreadableError."""
    masks = _masks(data)
    if not masks:
        return cv2.cvtColor(decode_opencv(data, cv2.IMREAD_COLOR_BGR), cv2.COLOR_BGR2RGB)
    start, bits = _int(data, 10, 4), _int(data, 28, 2)
    width, height = (_int(data, at, 4, signed=True) for at in (18, 22))
    check_pixel_count(width, abs(height))
    stride = -(-width * bits // 32) * 4
    if width < 1 or not height or start + stride * abs(height) > len(data):
        raise UnreadableError("the file is truncated")
    rows = np.frombuffer(data, np.uint8, stride * abs(height), start).reshape(-1, stride)
    pixels = rows.view(f"<u{bits // 8}")[:, :width]
    image = np.empty((*pixels.shape, 3), np.uint8)
    for channel, mask in enumerate(masks[:3]):
        shift = _shift(mask)
        image[..., channel] = to_8_bits((pixels & mask) >> shift, mask >> shift)
    return image if height < 0 else np.ascontiguousarray(image[::-1])  # stored bottom row first
