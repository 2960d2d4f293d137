"""Image files of all formats: header information, and pixels as RGB.

docs/data.md tabulates the treatment of depth, alpha, orientation and colour;
tests/test_formats.py checks each row of that table.
"""

import cv2
import numpy as np

from cspnet.images import bmp, chunks, jpeg, pnm, tiff
from cspnet.images.formats import (
    ImageInfo,
    UnreadableError,
    decode_opencv,
    detect_format,
    to_8_bits,
)

_INFO = {
    "JPEG": jpeg.jpeg_info,
    "PNG": chunks.png_info,
    "WEBP": chunks.webp_info,
    "GIF": chunks.gif_info,
    "AVIF": chunks.avif_info,
    "JPEG2000": chunks.jpeg2000_info,
    "TIFF": tiff.tiff_info,
    "BMP": bmp.bmp_info,
    "PPM": pnm.pnm_info,
}
_READERS = {"TIFF": tiff.read_tiff, "BMP": bmp.read_bmp, "PPM": pnm.read_pnm}
# Alpha is dropped, not applied, so transparent pixels keep their colour.
_OPAQUE = {"WEBP": chunks.webp_still, "GIF": chunks.gif_opaque}


def read_info(data: bytes) -> ImageInfo:
    """Properties of an image according to its header. Raises UnreadableError."""
    name = detect_format(data)
    if name is None:
        raise UnreadableError("not a readable image")
    return _INFO[name](data)


def read_image(data: bytes) -> tuple[np.ndarray, int]:
    """RGB uint8 [H, W, 3] as stored, and the orientation to apply; for any format except JPEG.

    OpenCV decodes to BGR, since its RGB flag does not work for all formats. Raises UnreadableError.
    """
    info = read_info(data)
    if info.format in _READERS:
        return _READERS[info.format](data), info.orientation
    data = _OPAQUE.get(info.format, lambda data: data)(data)
    flags = cv2.IMREAD_COLOR_BGR | cv2.IMREAD_IGNORE_ORIENTATION
    deep = info.max_value == 65_535
    image = decode_opencv(data, flags | cv2.IMREAD_ANYDEPTH if deep else flags)
    if image.dtype == np.uint16:
        image = to_8_bits(image, 65_535)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), info.orientation
