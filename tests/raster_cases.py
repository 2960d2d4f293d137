"""TIFF, BMP and Netpbm files by the keys of the table in docs/data.md.

Each value makes (suffix, bytes, expected pixels or exception), and for lossy ones a tolerance.
"""

import cv2
import numpy as np
from PIL import Image

from cspnet.images.formats import UnreadableError, UnsupportedError
from tests import images
from tests.conftest import picture
from tests.format_samples import (
    ALPHA,
    COLOURS,
    INDICES,
    PAINTED,
    QUADS,
    SHAPE,
    SMOOTH,
    noise,
    orient,
    plain,
    scaled,
    with_alpha,
)
from tests.images import saved

# TIFF


WHITE, BLACK, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
EXTRA, FORMAT = 338, 339


def tiff(bits, photometric, channels, **options):
    """Noise of a given bit depth, and the expected pixels."""
    samples, top = noise(bits, channels), 2**bits - 1
    image = scaled(samples, top)
    if photometric == WHITE:
        image = 255 - image
    return "tif", images.tiff(samples, bits, photometric, **options), image


def tiff_alpha(bits, colour, kind, photometric=RGB):
    """Colour with an alpha that does not change it: unassociated (2) or unspecified (0)."""
    data = images.tiff(
        with_alpha(colour, 2**bits - 1), bits, photometric, tags={EXTRA: (3, [kind])}
    )
    return "tif", data, scaled(colour, 2**bits - 1)


def tiff_grey_alpha_white():
    name, data, image = tiff_alpha(8, noise(8, 1), 2, WHITE)
    return name, data, 255 - image


def tiff_associated(bits):
    top = 2**bits - 1
    samples = with_alpha(noise(bits), top)
    colour, alpha = samples[..., :3], samples[..., 3:]
    stored = np.minimum(colour, alpha)  # a premultiplied colour never exceeds alpha
    data = np.concatenate([stored, alpha], 2)
    straight = np.floor(stored * float(top) / np.maximum(alpha, 1) + 0.5)
    return "tif", images.tiff(data, bits, RGB, tags={EXTRA: (3, [1])}), scaled(straight, top)


def tiff_palette(bits):
    table = np.zeros((3, 2**bits), int)
    table[:, :4] = COLOURS.T.astype(int) * 257
    tags = {320: (3, table.ravel().tolist())}
    return "tif", images.tiff(INDICES[..., None], bits, PALETTE, tags=tags), PAINTED


def tiff_cmyk():
    ink = noise(8, 4)
    colour = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    return "tif", images.tiff(ink, 8, CMYK), colour, 1


def tiff_tiled():
    samples = np.tile(noise(8)[:32, :32], (2, 3, 1))
    return "tif", images.tiff(samples, 8, RGB, tile=32), plain(samples)


def tiff_lab():
    """Lab of sRGB colours, expected values in floats; 8-bit Lab is coarser than 8-bit RGB."""
    lab = cv2.cvtColor(SMOOTH.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)
    samples = np.rint(lab * [255 / 100, 1, 1]).astype(np.int64) & 255
    return "tif", images.tiff(samples, 8, LAB), SMOOTH, 3


def tiff_ycbcr():
    values = np.asarray(Image.fromarray(SMOOTH).convert("YCbCr"))
    return "tif", images.tiff(values, 8, YCBCR, tags={530: (3, [1, 1])}), SMOOTH, 3


def tiff_turned(orientation, **options):
    tags = {0x0112: (3, [orientation])}
    name, data, image = tiff(8, RGB, 3, tags=tags, **options)
    return name, data, orient(image, orientation if orientation < 9 else 1)


def refused_tiff(bits, photometric, channels, **options):
    return (
        "tif",
        images.tiff(noise(min(bits, 16), channels), bits, photometric, **options),
        UnsupportedError,
    )


def high_byte():
    """16-bit grey with alpha is the exception: libtiff keeps only the high byte."""
    samples = noise(16, 1)
    data = images.tiff(with_alpha(samples, 65_535), 16, BLACK, tags={EXTRA: (3, [2])})
    return "tif", data, np.repeat(samples >> 8, 3, 2)


PAGES = {"save_all": True, "append_images": [Image.fromarray(picture(9, *SHAPE))]}
TIFF = {
    "tiff-grey-1": lambda: tiff(1, BLACK, 1),
    "tiff-grey-1-white": lambda: tiff(1, WHITE, 1),
    "tiff-grey-4": lambda: refused_tiff(4, BLACK, 1),
    "tiff-grey-8": lambda: tiff(8, BLACK, 1),
    "tiff-grey-8-white": lambda: tiff(8, WHITE, 1),
    "tiff-grey-10": lambda: tiff(10, BLACK, 1),
    "tiff-grey-12": lambda: tiff(12, BLACK, 1),
    "tiff-grey-12-white": lambda: tiff(12, WHITE, 1),
    "tiff-grey-14": lambda: tiff(14, BLACK, 1),
    "tiff-grey-16": lambda: tiff(16, BLACK, 1),
    "tiff-grey-16-white": lambda: tiff(16, WHITE, 1),
    "tiff-grey-16-big-endian": lambda: tiff(16, BLACK, 1, order=">"),
    "tiff-maxsample": lambda: tiff(16, BLACK, 1, tags={281: (3, [1023])}),
    "tiff-grey-24": lambda: refused_tiff(24, BLACK, 1),
    "tiff-grey-32": lambda: refused_tiff(32, BLACK, 1),
    "tiff-signed": lambda: refused_tiff(16, BLACK, 1, tags={FORMAT: (3, [2])}),
    "tiff-float": lambda: refused_tiff(32, BLACK, 1, tags={FORMAT: (3, [3])}),
    "tiff-rgb-float": lambda: refused_tiff(32, RGB, 3, tags={FORMAT: (3, [3] * 3)}),
    "tiff-rgb-8": lambda: tiff(8, RGB, 3),
    "tiff-rgb-8-planar": lambda: tiff(8, RGB, 3, planar=True),
    "tiff-rgb-12": lambda: tiff(12, RGB, 3),
    "tiff-rgb-16": lambda: tiff(16, RGB, 3),
    "tiff-rgb-16-planar": lambda: tiff(16, RGB, 3, planar=True),
    "tiff-tiled": tiff_tiled,
    "tiff-big": lambda: tiff(16, BLACK, 1, big=True),
    "tiff-lzw": lambda: ("tif", saved(PAINTED, "TIFF", compression="tiff_lzw"), PAINTED),
    "tiff-jpeg": lambda: ("tif", saved(SMOOTH, "TIFF", compression="jpeg", quality=95), SMOOTH, 3),
    "tiff-rgba-8": lambda: tiff_alpha(8, noise(8), 2),
    "tiff-rgba-8-unspecified": lambda: tiff_alpha(8, noise(8), 0),
    "tiff-rgba-16": lambda: tiff_alpha(16, noise(16), 2),
    "tiff-premultiplied-8": lambda: tiff_associated(8),
    "tiff-premultiplied-16": lambda: tiff_associated(16),
    "tiff-grey-alpha-8": lambda: tiff_alpha(8, noise(8, 1), 2, BLACK),
    "tiff-grey-alpha-8-white": tiff_grey_alpha_white,
    "tiff-grey-alpha-16": high_byte,
    "tiff-grey-premultiplied": lambda: refused_tiff(8, BLACK, 2, tags={EXTRA: (3, [1])}),
    "tiff-two-extra": lambda: refused_tiff(8, RGB, 5, tags={EXTRA: (3, [2, 0])}),
    "tiff-palette-4": lambda: tiff_palette(4),
    "tiff-palette-8": lambda: tiff_palette(8),
    "tiff-cmyk-8": tiff_cmyk,
    "tiff-cmyk-16": lambda: refused_tiff(16, CMYK, 4),
    "tiff-lab-8": tiff_lab,
    "tiff-lab-16": lambda: refused_tiff(16, LAB, 3),
    "tiff-logluv": lambda: refused_tiff(16, 32_845, 3),
    "tiff-ycbcr": tiff_ycbcr,
    "tiff-orientation-6": lambda: tiff_turned(6),
    "tiff-orientation-7": lambda: tiff_turned(7, order=">"),
    "tiff-orientation-4-big": lambda: tiff_turned(4, big=True),
    "tiff-orientation-9": lambda: tiff_turned(9),
    "tiff-pages": lambda: ("tif", saved(PAINTED, "TIFF", **PAGES), PAINTED),
}

# BMP


def masked(shifts, bits, wordsize, **options):
    """Noise in words; `bits` and `shifts` are those of red, green, blue and possibly alpha."""
    samples = np.stack([np.roll(noise(n, 1)[..., 0], 5 * i, 1) for i, n in enumerate(bits)], 2)
    words = sum(samples[..., i] << shift for i, shift in enumerate(shifts))
    masks = tuple((2**n - 1) << shift for n, shift in zip(bits, shifts, strict=True))
    image = [scaled(samples[..., [i]], 2 ** bits[i] - 1)[..., 0] for i in range(3)]
    data = images.bmp(images.rows(words[..., None], wordsize), wordsize, 3, masks=masks, **options)
    return "bmp", data, np.stack(image, 2)


def bmp_555():
    samples = noise(5)
    words = samples[..., [0]] << 10 | samples[..., [1]] << 5 | samples[..., [2]]
    return "bmp", images.bmp(images.rows(words, 16), 16), scaled(samples, 31)


def indexed_bmp(bits, **options):
    image = PAINTED
    indices = INDICES[..., None]
    if bits == 1:
        indices, image = indices & 1, COLOURS[INDICES & 1]
    return "bmp", images.bmp(images.rows(indices, bits, **options), bits, palette=QUADS), image


def run_lengths(bits):
    """Runs of one pixel, then two runs of the last colour of the row."""
    if bits == 8:
        lines = [b"".join(bytes([1, i]) for i in row) for row in INDICES[::-1]]
    else:
        lines = [
            b"".join(bytes([2, a << 4 | b]) for a, b in row.reshape(-1, 2)) for row in INDICES[::-1]
        ]
    data = b"\0\0".join(lines) + b"\0\1"
    encoded = data, *SHAPE[::-1]
    return "bmp", images.bmp(encoded, bits, 2 if bits == 4 else 1, palette=QUADS), PAINTED


def bgr(image, more=0):
    return np.concatenate([image[..., ::-1], *[ALPHA] * more], 2)


BMP = {
    "bmp-1": lambda: indexed_bmp(1),
    "bmp-4": lambda: indexed_bmp(4),
    "bmp-8": lambda: indexed_bmp(8),
    "bmp-16-555": bmp_555,
    "bmp-16-565": lambda: masked((11, 5, 0), (5, 6, 5), 16),
    "bmp-16-4444": lambda: masked((8, 4, 0, 12), (4, 4, 4, 4), 16, info=108),
    "bmp-24": lambda: ("bmp", images.bmp(images.rows(bgr(PAINTED), 8), 24), PAINTED),
    "bmp-24-os2": lambda: ("bmp", images.bmp(images.rows(bgr(PAINTED), 8), 24, info=12), PAINTED),
    "bmp-32": lambda: ("bmp", images.bmp(images.rows(bgr(PAINTED, 1), 8), 32), PAINTED),
    "bmp-32-masks": lambda: masked((0, 8, 16), (8, 8, 8), 32),
    "bmp-32-alpha": lambda: masked((16, 8, 0, 24), (8, 8, 8, 8), 32, info=124),
    "bmp-32-10-bit": lambda: masked((20, 10, 0), (10, 10, 10), 32),
    "bmp-top-down": lambda: indexed_bmp(8, top_down=True),
    "bmp-rle-8": lambda: run_lengths(8),
    "bmp-rle-4": lambda: run_lengths(4),
}

# Netpbm


def pnm(variant, maxval, channels, text=False):
    bits = 8 if maxval < 256 else 16
    samples = noise(bits, channels) * maxval // (2**bits - 1)
    body = images.packed(samples, bits)
    if text:
        body = b" # a comment\n".join(b" ".join(b"%d" % v for v in row.ravel()) for row in samples)
    head = f"P{variant}\n# made by hand\n{SHAPE[1]} {SHAPE[0]}\n{maxval}\n".encode()
    suffix = "pgm" if channels == 1 else "ppm"
    return suffix, head + body, scaled(samples, maxval)


def pbm(text):
    bits = noise(1, 1)
    body = images.packed(bits, 1)
    if text:
        body = b"\n".join(b"".join(b"%d" % v for v in row.ravel()) for row in bits)
    head = b"P%d %d %d\n" % (1 if text else 4, SHAPE[1], SHAPE[0])
    return "pgm", head + body, np.repeat(255 * (1 - bits), 3, 2)


def pam(maxval, channels, kind):
    bits = 8 if maxval < 256 else 16
    samples = noise(bits, channels) * maxval // (2**bits - 1)
    visible = samples[..., : 3 if channels > 2 else 1]
    return "ppm", images.pam(samples, maxval, kind), scaled(visible, maxval)


def pfm():
    return "ppm", b"PF\n48 40\n-1.0\n" + bytes(4 * 3 * 48 * 40), UnreadableError


def beyond_maxval():
    _, data, _ = pnm(5, 100, 1)
    return "pgm", data[:-1] + b"\x65", UnreadableError


PNM = {
    "pbm": lambda: pbm(False),
    "pbm-text": lambda: pbm(True),
    "pgm-255": lambda: pnm(5, 255, 1),
    "pgm-15": lambda: pnm(5, 15, 1),
    "pgm-100": lambda: pnm(5, 100, 1),
    "pgm-1023": lambda: pnm(5, 1023, 1),
    "pgm-65535": lambda: pnm(5, 65_535, 1),
    "pgm-text-15": lambda: pnm(2, 15, 1, text=True),
    "pgm-text-1023": lambda: pnm(2, 1023, 1, text=True),
    "pgm-beyond-maxval": beyond_maxval,
    "ppm-255": lambda: pnm(6, 255, 3),
    "ppm-100": lambda: pnm(6, 100, 3),
    "ppm-4095": lambda: pnm(6, 4095, 3),
    "ppm-text-100": lambda: pnm(3, 100, 3, text=True),
    "pam-grey-alpha": lambda: pam(255, 2, "GRAYSCALE_ALPHA"),
    "pam-rgb-100": lambda: pam(100, 3, "RGB"),
    "pam-rgba-1023": lambda: pam(1023, 4, "RGB_ALPHA"),
    "pam-cmyk": lambda: ("ppm", images.pam(noise(8, 4), 255, "CMYK"), UnsupportedError),
    "pfm": pfm,
}
