"""Image files by the keys of the table in docs/data.md.

Each value makes (suffix, bytes, expected pixels or exception), and for lossy ones a tolerance.
"""

import base64
import functools
import struct

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
    SHAPE,
    SMOOTH,
    noise,
    orient,
    plain,
    scaled,
)
from tests.images import saved
from tests.raster_cases import BMP, PNM, TIFF

# JPEG


@functools.cache
def jpeg(*, mode="RGB", **options):
    image = Image.fromarray(SMOOTH).convert(mode)
    return saved(image, "JPEG", quality=95, **options)


def jpeg_exif(block):
    return images.with_segment(jpeg(), b"Exif\0\0" + block)


def ycck():
    """Inverted Y, Cb, Cr of each colour, without black, as Adobe's applications write it."""
    values = np.asarray(Image.fromarray(255 - SMOOTH).convert("YCbCr"))
    bands = np.concatenate([255 - values, np.zeros_like(values[..., :1])], 2)  # Pillow inverts
    data = bytearray(saved(Image.fromarray(bands, "CMYK"), "JPEG", quality=95, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def frame_changed(marker, precision=8):
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 1], data[at + 4] = marker, precision
    return bytes(data)


# A grey ramp, +5 per row and +3 per column, written by libjpeg-turbo with arith_code. Pillow lacks
# this option.
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoH"
    "BwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGBYUGBIUFRT/yQALCAAgACABAREA/8wABgAQEAX/2gAI"
    "AQEAAD8A/wDsZDU/DHn2WrxzkO52lDEbHYFrnFD3eHARr4TuFalcrkAXIymp/Lc3NDOcirVdUmTsGLzQjhh7yHYt"
    "vc6Jr6fva+huFcD/2Q=="
)


def arithmetic():
    ramp = np.add.outer(np.arange(32) * 5, np.arange(32) * 3)[..., None]
    return "jpg", ARITHMETIC, plain(ramp), 3


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/>'
ICC = b"\0\0\2\x0cswap" + bytes(504)  # any content
GREY = np.asarray(Image.fromarray(SMOOTH).convert("L"))[..., None]
MPO = {"save_all": True, "append_images": [Image.fromarray(picture(4, *SHAPE))]}

JPEG = {
    "jpeg": lambda: ("jpg", jpeg(), SMOOTH, 3),
    "jpeg-progressive": lambda: ("jpg", jpeg(progressive=True), SMOOTH, 3),
    "jpeg-rgb": lambda: ("jpg", jpeg(keep_rgb=True, subsampling=0), SMOOTH, 3),
    "jpeg-grey": lambda: ("jpg", jpeg(mode="L"), plain(GREY), 3),
    "jpeg-cmyk": lambda: ("jpg", jpeg(mode="CMYK"), SMOOTH, 3),
    "jpeg-ycck": lambda: ("jpg", ycck(), SMOOTH, 3),
    "jpeg-icc": lambda: ("jpg", jpeg(icc_profile=ICC), SMOOTH, 3),
    "jpeg-mpo": lambda: ("jpg", saved(SMOOTH, "MPO", quality=95, **MPO), SMOOTH, 3),
    "jpeg-arithmetic": arithmetic,
    "jpeg-12-bit": lambda: ("jpg", frame_changed(0xC1, 12), UnreadableError),
    "jpeg-lossless": lambda: ("jpg", frame_changed(0xC3), UnreadableError),
    "jpeg-exif-long": lambda: ("jpg", jpeg_exif(images.exif(6, 4, ">")), orient(SMOOTH, 6), 3),
    "jpeg-exif-byte": lambda: ("jpg", jpeg_exif(images.exif(8, 1)), orient(SMOOTH, 8), 3),
    "jpeg-exif-0": lambda: ("jpg", jpeg_exif(images.exif(0)), SMOOTH, 3),
    "jpeg-exif-9": lambda: ("jpg", jpeg_exif(images.exif(9)), SMOOTH, 3),
    "jpeg-exif-damaged": lambda: ("jpg", jpeg_exif(images.exif(6)[:14]), SMOOTH, 3),
    "jpeg-xmp": lambda: ("jpg", images.with_segment(jpeg(), XMP), SMOOTH, 3),
    **{
        f"jpeg-exif-{o}": lambda o=o: ("jpg", jpeg_exif(images.exif(o)), orient(SMOOTH, o), 3)
        for o in range(1, 9)
    },
}

# PNG


PLTE = images.chunk(b"PLTE", COLOURS.tobytes())


def apng(first, **options):
    more = [Image.fromarray(picture(9, *SHAPE)).convert(first.mode)]
    return saved(first, "PNG", save_all=True, append_images=more, **options)


def png(depth, colours, channels, *before, **options):
    """Noise of a given bit depth, and the expected pixels."""
    samples, top = noise(depth, channels), 2**depth - 1
    visible = samples[..., : 3 if channels > 2 else 1]
    return "png", images.png(samples, depth, colours, *before, **options), scaled(visible, top)


def palette_png(depth, *before):
    return "png", images.png(INDICES[..., None], depth, 3, PLTE, *before), PAINTED


def turned_png(block, orientation, **options):
    chunk = images.chunk(b"eXIf", block)
    where = {"after": chunk} if options else {}
    name, data, image = png(8, 2, 3, *([] if options else [chunk]), **where)
    return name, data, orient(image, orientation)


def transparent(values):
    return images.chunk(b"tRNS", values)


PNG = {
    "png-grey-1": lambda: png(1, 0, 1),
    "png-grey-2": lambda: png(2, 0, 1),
    "png-grey-4": lambda: png(4, 0, 1),
    "png-grey-8": lambda: png(8, 0, 1),
    "png-grey-16": lambda: png(16, 0, 1),
    "png-grey-trns": lambda: png(8, 0, 1, transparent(b"\0\7")),
    "png-grey-alpha-8": lambda: png(8, 4, 2),
    "png-grey-alpha-16": lambda: png(16, 4, 2),
    "png-rgb-8": lambda: png(8, 2, 3),
    "png-rgb-16": lambda: png(16, 2, 3),
    "png-rgb-trns": lambda: png(8, 2, 3, transparent(bytes(6))),
    "png-rgba-8": lambda: png(8, 6, 4),
    "png-rgba-16": lambda: png(16, 6, 4),
    "png-palette-2": lambda: palette_png(2),
    "png-palette-8": lambda: palette_png(8),
    "png-palette-trns": lambda: palette_png(8, transparent(b"\0\x80")),
    "png-interlaced": lambda: png(8, 2, 3, interlaced=True),
    "png-sbit": lambda: png(8, 0, 1, images.chunk(b"sBIT", b"\5")),
    "png-sbit-16": lambda: png(16, 0, 1, images.chunk(b"sBIT", b"\x0c")),
    "png-gama": lambda: png(8, 2, 3, images.chunk(b"gAMA", struct.pack(">I", 100_000))),
    "png-exif": lambda: turned_png(images.exif(6), 6),
    "png-exif-last": lambda: turned_png(images.exif(5), 5, after=True),
    "png-exif-text": lambda: png(
        8,
        2,
        3,
        images.chunk(
            b"tEXt", b"Raw profile type exif\0\nexif\n26\n" + images.exif(6).hex().encode()
        ),
    ),
    "png-animated": lambda: ("png", apng(Image.fromarray(PAINTED)), PAINTED),
    "png-default-image": lambda: (
        "png",
        apng(Image.fromarray(PAINTED), default_image=True),
        PAINTED,
    ),
}

# WebP


RGBA = Image.fromarray(np.concatenate([PAINTED, ALPHA], 2))
LOSSLESS = {"lossless": True, "exact": True}
OTHERS = {"save_all": True, "append_images": [Image.fromarray(picture(9, *SHAPE))]}
WEBP = {
    "webp": lambda: ("webp", saved(SMOOTH, "WEBP", quality=95), SMOOTH, 4),
    "webp-lossless": lambda: ("webp", saved(PAINTED, "WEBP", **LOSSLESS), PAINTED),
    "webp-alpha": lambda: ("webp", saved(RGBA, "WEBP", **LOSSLESS), PAINTED),
    "webp-exif": lambda: (
        "webp",
        saved(PAINTED, "WEBP", exif=images.exif(7), **LOSSLESS),
        orient(PAINTED, 7),
    ),
    "webp-animated": lambda: ("webp", saved(PAINTED, "WEBP", **LOSSLESS, **OTHERS), PAINTED),
    "webp-animated-alpha": lambda: (
        "webp",
        images.webp_animation([saved(RGBA, "WEBP", **LOSSLESS)] * 2, *SHAPE),
        PAINTED,
    ),
}

# Other formats, under a supported suffix


def gif(**options):
    return images.gif(INDICES, COLOURS.tobytes(), **options)


def gif_offset():
    image = np.tile(COLOURS[2], (50, 60, 1))
    image[7:47, 5:53] = PAINTED
    return "png", gif(at=(7, 5), canvas=(50, 60), background=2), image


def avif(image, **options):
    return saved(image, "AVIF", quality=95, subsampling="4:4:4", **options)


def deep_avif():
    samples = (SMOOTH[..., ::-1].astype(int) * 1023 // 255).astype(np.uint16)
    options = [cv2.IMWRITE_AVIF_DEPTH, 10, cv2.IMWRITE_AVIF_QUALITY, 95]
    return "png", cv2.imencode(".avif", samples, options)[1].tobytes(), SMOOTH, 4


def jpeg2000(image, expected):
    return "png", saved(image, "JPEG2000", irreversible=False), expected


def changed_depth():
    data = bytearray(saved(PAINTED, "JPEG2000", irreversible=False))
    at = data.index(b"\xff\x4f\xff\x51") + 42
    data[at : at + 9 : 3] = bytes([11, 11, 11])
    return "png", bytes(data), UnsupportedError


SMOOTH_RGBA = Image.fromarray(np.dstack([SMOOTH, np.full(SHAPE, 100, np.uint8)]))
DEEP = noise(16, 1).astype(np.uint16)
REST = {
    "gif": lambda: ("png", gif(), PAINTED),
    "gif-interlaced": lambda: ("png", gif(interlaced=True), PAINTED),
    "gif-transparent": lambda: ("png", gif(transparent=1, background=2), PAINTED),
    "gif-offset": gif_offset,
    "gif-animated": lambda: ("png", gif()[:-1] + gif()[13 + 12 :], PAINTED),
    "avif": lambda: ("png", avif(SMOOTH), SMOOTH, 4),
    "avif-10": deep_avif,
    "avif-alpha": lambda: ("png", avif(SMOOTH_RGBA), SMOOTH, 4),
    "avif-irot-imir": lambda: ("png", avif(SMOOTH, exif=images.exif(7)), orient(SMOOTH, 7), 4),
    "jpeg2000": lambda: jpeg2000(PAINTED, PAINTED),
    "jpeg2000-alpha": lambda: jpeg2000(RGBA, PAINTED),
    "jpeg2000-16": lambda: jpeg2000(Image.fromarray(DEEP[..., 0]), scaled(DEEP, 65_535)),
    "jpeg2000-12": changed_depth,
    "hdr": lambda: (
        "ppm",
        cv2.imencode(".hdr", np.ones((40, 48, 3), np.float32))[1].tobytes(),
        UnreadableError,
    ),
    "sun-raster": lambda: ("ppm", cv2.imencode(".ras", PAINTED)[1].tobytes(), UnreadableError),
}
CASES = JPEG | PNG | WEBP | TIFF | BMP | PNM | REST
