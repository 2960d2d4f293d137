"""TIFF: what its first directory says, and its pixels as RGB.

OpenCV decodes, but libtiff multiplies colour with unassociated alpha, OpenCV ignores MinIsWhite in
deep samples, and both convert sample formats and Lab otherwise than defined. So the entries in
question are replaced in a copy of the file, and the conversion is done here.
"""

import cv2
import numpy as np

from cspnet.images.formats import ImageInfo, UnreadableError, UnsupportedError, opencv, to_8_bits
from cspnet.images.ifd import ORIENTATION, Broken, Directory

BITS, PHOTOMETRIC, SAMPLES, PLANAR, INKS, EXTRA, FORMAT = 258, 262, 277, 284, 332, 338, 339
WHITE, BLACK, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
COLOURS = {WHITE: 1, BLACK: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, LAB: 3}  # samples
ASSOCIATED = 1  # alpha that colour is multiplied with
UNSIGNED, VOID = 1, 4  # sample formats
DEPTHS = {  # bits of a sample that have a conversion
    WHITE: (1, 8, 10, 12, 14, 16),
    BLACK: (1, 8, 10, 12, 14, 16),
    RGB: (8, 10, 12, 14, 16),
    PALETTE: (1, 2, 4, 8),
    **dict.fromkeys((CMYK, YCBCR, LAB), (8,)),
}


class Page:
    """What the first directory says. Raises Unreadable, or Unsupported for no known conversion."""

    def __init__(self, data: bytes):
        try:
            self.directory = Directory(data)
            self._read()
        except Broken as error:
            raise UnreadableError(f"not a readable image: TIFF, {error}") from None
        try:
            self.orientation, self.damaged = self.directory.orientation(), False
        except Broken:
            self.orientation, self.damaged = 1, True

    def _read(self) -> None:
        values = self.directory.values
        samples, self.photometric = values(SAMPLES, (1,))[0], values(PHOTOMETRIC, (BLACK,))[0]
        bits, formats = values(BITS, (1,)), values(FORMAT, (UNSIGNED,))
        planar = values(PLANAR, (1,))[0]
        self.bits = bits[0]
        if not set(formats) <= {UNSIGNED, VOID}:
            raise UnsupportedError("TIFF with signed, floating-point or complex samples")
        if self.photometric not in COLOURS or values(INKS, (1,)) != (1,):
            raise UnsupportedError(f"TIFF of photometric interpretation {self.photometric}")
        if len(set(bits)) > 1 or self.bits not in DEPTHS[self.photometric]:
            raise UnsupportedError(f"TIFF of {'/'.join(map(str, bits))} bits per sample")
        more = samples - COLOURS[self.photometric]
        extra = values(EXTRA, (0,))
        self.alpha = more == 1
        self.associated = self.alpha and extra == (ASSOCIATED,)
        self.deep = self.bits in (10, 12, 14) or (self.bits == 16 and samples == 1)
        known = self.photometric in (WHITE, BLACK, RGB) and self.bits in (8, 16)
        if more not in (0, 1) or (self.alpha and not known) or len(extra) > 1:
            raise UnsupportedError(f"TIFF of {samples} samples per pixel")
        if self.associated and self.photometric != RGB:
            raise UnsupportedError("TIFF of grey multiplied with alpha")
        if planar != 1 and samples > 1 and (self.deep or self.associated):
            raise UnsupportedError("TIFF of deep or premultiplied samples in separate planes")


def header(data: bytes) -> ImageInfo:
    """Raises Unreadable."""
    page = Page(data)
    return ImageInfo(
        "TIFF",
        orientation=page.orientation,
        damaged_exif=page.damaged,
        top=2**page.bits - 1 if page.bits > 8 else 255,
        grey=page.photometric in (WHITE, BLACK),
        alpha=page.alpha,
        cmyk=page.photometric == CMYK,
        frames=page.directory.more,
    )


def read(data: bytes) -> np.ndarray:
    """RGB uint8 [H, W, 3], as stored: without orientation. Raises Unreadable."""
    page = Page(data)
    changes = {ORIENTATION: 1}
    if page.alpha:
        changes[EXTRA] = ASSOCIATED  # libtiff leaves it as it is
    if page.deep:
        if page.photometric == WHITE:
            changes[PHOTOMETRIC] = BLACK
        return _deep(page, page.directory.replaced(changes))
    if page.photometric == LAB:
        image = opencv(page.directory.replaced(changes | {PHOTOMETRIC: RGB}), cv2.IMREAD_COLOR_BGR)
        lab = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) ^ np.array([0, 128, 128], np.uint8)
        return cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)  # a and b are signed in TIFF
    data = page.directory.replaced(changes)
    if page.associated:
        return _divided(opencv(data, cv2.IMREAD_UNCHANGED), 2**page.bits - 1)
    return cv2.cvtColor(opencv(data, cv2.IMREAD_COLOR_BGR), cv2.COLOR_BGR2RGB)


def _deep(page: Page, data: bytes) -> np.ndarray:
    """Samples of 10 to 16 bits, which OpenCV moves to the upper end of 16."""
    image = opencv(data, cv2.IMREAD_UNCHANGED)
    if image.dtype != np.uint16:
        raise UnreadableError(f"OpenCV reads the samples as {image.dtype}")
    image = to_8_bits(image >> (16 - page.bits), 2**page.bits - 1)
    if page.photometric == WHITE:
        image = 255 - image
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)


def _divided(image: np.ndarray, top: int) -> np.ndarray:
    """Premultiplied BGRA [H, W, 4] as RGB of its own colour; black where alpha is 0."""
    if image.ndim != 3 or image.shape[2] != 4:
        raise UnreadableError("OpenCV reads no alpha")
    alpha = np.maximum(image[..., 3].astype(np.int64), 1)
    divided = np.empty_like(image[..., :3])
    for channel in range(3):
        colour = image[..., 2 - channel].astype(np.int64)
        divided[..., channel] = np.minimum((2 * colour * top + alpha) // (2 * alpha), top)
    return to_8_bits(divided, top)
