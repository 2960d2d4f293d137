"""TIFF: properties in the first directory, and pixels as RGB.

OpenCV decodes. But libtiff multiplies colour by unassociated alpha, OpenCV ignores MinIsWhite for
samples of more than 8 bits, and both convert sample formats and Lab incorrectly. So the affected
entries are replaced in a copy of the file, and the conversion is done here.
"""

import cv2
import numpy as np

from cspnet.images.formats import (
    ImageInfo,
    UnreadableError,
    UnsupportedError,
    decode_opencv,
    to_8_bits,
)
from cspnet.images.ifd import ORIENTATION, IfdError, ImageFileDirectory

BITS, PHOTOMETRIC, SAMPLES, PLANAR, INKS, EXTRA, FORMAT = 258, 262, 277, 284, 332, 338, 339
WHITE, BLACK, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
# Samples per pixel, without alpha, by photometric interpretation.
COLOUR_SAMPLES = {WHITE: 1, BLACK: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3, LAB: 3}
ASSOCIATED = 1  # premultiplied alpha
UNSIGNED, VOID = 1, 4  # sample formats
DEPTHS = {  # supported bits per sample, by photometric interpretation
    WHITE: (1, 8, 10, 12, 14, 16),
    BLACK: (1, 8, 10, 12, 14, 16),
    RGB: (8, 10, 12, 14, 16),
    PALETTE: (1, 2, 4, 8),
    **dict.fromkeys((CMYK, YCBCR, LAB), (8,)),
}


class TiffPage:
    """The first page of a TIFF.

    Raises UnreadableError, or UnsupportedError if no conversion is defined.
    """

    def __init__(self, data: bytes):
        try:
            self.directory = ImageFileDirectory(data)
            self._read()
        except IfdError as error:
            raise UnreadableError(f"not a readable image: TIFF, {error}") from None
        try:
            self.orientation, self.damaged = self.directory.orientation(), False
        except IfdError:
            self.orientation, self.damaged = 1, True

    def _read(self) -> None:
        values = self.directory.values
        samples, self.photometric = values(SAMPLES, (1,))[0], values(PHOTOMETRIC, (BLACK,))[0]
        bits, formats = values(BITS, (1,)), values(FORMAT, (UNSIGNED,))
        planar = values(PLANAR, (1,))[0]
        self.bits = bits[0]
        if not set(formats) <= {UNSIGNED, VOID}:
            raise UnsupportedError("TIFF with signed, floating-point or complex samples")
        if self.photometric not in COLOUR_SAMPLES or values(INKS, (1,)) != (1,):
            raise UnsupportedError(f"TIFF of photometric interpretation {self.photometric}")
        if len(set(bits)) > 1 or self.bits not in DEPTHS[self.photometric]:
            raise UnsupportedError(f"TIFF of {'/'.join(map(str, bits))} bits per sample")
        alpha_samples = samples - COLOUR_SAMPLES[self.photometric]
        extra = values(EXTRA, (0,))
        self.alpha = alpha_samples == 1
        self.associated = self.alpha and extra == (ASSOCIATED,)
        self.deep = self.bits in (10, 12, 14) or (self.bits == 16 and samples == 1)
        known = self.photometric in (WHITE, BLACK, RGB) and self.bits in (8, 16)
        if alpha_samples not in (0, 1) or (self.alpha and not known) or len(extra) > 1:
            raise UnsupportedError(f"TIFF of {samples} samples per pixel")
        if self.associated and self.photometric != RGB:
            raise UnsupportedError("TIFF of grey with premultiplied alpha")
        if planar != 1 and samples > 1 and (self.deep or self.associated):
            raise UnsupportedError("TIFF with separate planes of deep or premultiplied samples")


def tiff_info(data: bytes) -> ImageInfo:
    """Properties of the first page. Raises UnreadableError."""
    page = TiffPage(data)
    return ImageInfo(
        "TIFF",
        orientation=page.orientation,
        damaged_exif=page.damaged,
        max_value=2**page.bits - 1 if page.bits > 8 else 255,
        grey=page.photometric in (WHITE, BLACK),
        alpha=page.alpha,
        cmyk=page.photometric == CMYK,
        multi_frame=page.directory.has_next,
    )


def read_tiff(data: bytes) -> np.ndarray:
    """RGB uint8 [H, W, 3], orientation not applied. Raises UnreadableError."""
    page = TiffPage(data)
    changes = {ORIENTATION: 1}
    if page.alpha:
        changes[EXTRA] = ASSOCIATED  # libtiff then leaves the colour unchanged
    if page.deep:
        if page.photometric == WHITE:
            changes[PHOTOMETRIC] = BLACK
        return _read_deep(page, page.directory.replaced(changes))
    if page.photometric == LAB:
        image = decode_opencv(
            page.directory.replaced(changes | {PHOTOMETRIC: RGB}), cv2.IMREAD_COLOR_BGR
        )
        lab = cv2.cvtColor(image, cv2.COLOR_BGR2RGB) ^ np.array([0, 128, 128], np.uint8)
        return cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)  # TIFF stores a and b as signed numbers
    data = page.directory.replaced(changes)
    if page.associated:
        return _unpremultiply(decode_opencv(data, cv2.IMREAD_UNCHANGED), 2**page.bits - 1)
    return cv2.cvtColor(decode_opencv(data, cv2.IMREAD_COLOR_BGR), cv2.COLOR_BGR2RGB)


def _read_deep(page: TiffPage, data: bytes) -> np.ndarray:
    """Samples of 10 to 16 bits, which OpenCV shifts to the most significant bits of 16."""
    image = decode_opencv(data, cv2.IMREAD_UNCHANGED)
    if image.dtype != np.uint16:
        raise UnreadableError(f"OpenCV decodes the samples as {image.dtype}")
    image = to_8_bits(image >> (16 - page.bits), 2**page.bits - 1)
    if page.photometric == WHITE:
        image = 255 - image
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)


def _unpremultiply(image: np.ndarray, top: int) -> np.ndarray:
    """Premultiplied BGRA [H, W, 4] as RGB divided by alpha; black where alpha is 0."""
    if image.ndim != 3 or image.shape[2] != 4:
        raise UnreadableError("OpenCV decodes no alpha channel")
    alpha = np.maximum(image[..., 3].astype(np.int64), 1)
    colours = np.empty_like(image[..., :3])
    for channel in range(3):
        colour = image[..., 2 - channel].astype(np.int64)
        colours[..., channel] = np.minimum((2 * colour * top + alpha) // (2 * alpha), top)
    return to_8_bits(colours, top)
