"""Image files of all formats: what their headers say, and their pixels as RGB.

docs/data.md has the table of what is done with depth, alpha, orientation and colour, which
tests/test_formats.py checks row by row.
"""

import cv2
import numpy as np

from cspnet.images import bmp, chunks, jpeg, pnm, tiff
from cspnet.images.formats import ImageInfo, UnreadableError, container, opencv, to_8_bits

_HEADERS = {
    "JPEG": jpeg.header,
    "PNG": chunks.png,
    "WEBP": chunks.webp,
    "GIF": chunks.gif,
    "AVIF": chunks.avif,
    "JPEG2000": chunks.jpeg2000,
    "TIFF": tiff.header,
    "BMP": bmp.header,
    "PPM": pnm.header,
}
_OWN = {"TIFF": tiff.read, "BMP": bmp.read, "PPM": pnm.read}
# The colour of transparent pixels is kept: alpha is dropped, not applied.
_OPAQUE = {"WEBP": chunks.webp_still, "GIF": chunks.gif_opaque}


def read_info(data: bytes) -> ImageInfo:
    """What the header says of the image, as the decoder applies it. Raises Unreadable."""
    kind = container(data)
    if kind is None:
        raise UnreadableError("not a readable image")
    return _HEADERS[kind](data)


def read(data: bytes) -> tuple[np.ndarray, int]:
    """RGB uint8 [H, W, 3] as stored, and the orientation to apply; of any format but JPEG.

    BGR is asked of OpenCV, since its RGB is not RGB in all formats. Raises Unreadable.
    """
    header = read_info(data)
    if header.format in _OWN:
        return _OWN[header.format](data), header.orientation
    data = _OPAQUE.get(header.format, lambda data: data)(data)
    flags = cv2.IMREAD_COLOR_BGR | cv2.IMREAD_IGNORE_ORIENTATION
    deep = header.top == 65_535
    image = opencv(data, flags | cv2.IMREAD_ANYDEPTH if deep else flags)
    if image.dtype == np.uint16:
        image = to_8_bits(image, 65_535)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB), header.orientation
