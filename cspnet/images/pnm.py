"""The Netpbm formats, read as specified: PBM, PGM and PPM (P1 to P6), and PAM (P7).

Samples range from 0 to the maxval of the file, which OpenCV ignores in binary files. If a file has
several images, only the first is read.
"""

import re
from typing import NamedTuple

import cv2
import numpy as np

from cspnet.images.formats import (
    ImageInfo,
    UnreadableError,
    UnsupportedError,
    check_pixel_count,
    to_8_bits,
)

_NUMBER = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,9})")
_COMMENT = re.compile(rb"#[^\r\n]*")
_DEPTHS = {1: 1, 2: 1, 3: 3, 4: 1, 5: 1, 6: 3}  # samples per pixel of P1 to P6
_TUPLE_TYPES = {  # of PAM, by samples per pixel; b"" if the header has none
    1: (b"", b"BLACKANDWHITE", b"GRAYSCALE"),
    2: (b"", b"BLACKANDWHITE_ALPHA", b"GRAYSCALE_ALPHA"),
    3: (b"", b"RGB"),
    4: (b"", b"RGB_ALPHA"),
}


class PnmHeader(NamedTuple):
    """The header of a Netpbm file."""

    variant: int  # the digit after P
    width: int
    height: int
    depth: int  # samples per pixel
    maxval: int
    start: int  # offset of the samples


def read_pnm_header(data: bytes) -> PnmHeader:
    """Parse the header. Raises UnreadableError."""
    variant = data[1] - ord("0")
    if variant == 7:
        header = _read_pam_header(data)
    else:
        at, numbers = 2, []
        for _ in range(2 if variant in (1, 4) else 3):
            match = _NUMBER.match(data, at)
            if not match:
                raise UnreadableError("not a readable image: the PNM header is damaged")
            numbers.append(int(match[1]))
            at = match.end()
        if not data[at : at + 1].isspace():
            raise UnreadableError("not a readable image: the PNM header is truncated")
        width, height, maxval = (*numbers, 1)[:3]
        header = PnmHeader(variant, width, height, _DEPTHS[variant], maxval, at + 1)
    if not 0 < header.maxval < 65_536 or not header.width or not header.height:
        raise UnreadableError("the PNM header has an invalid size or maxval")
    return header


def _read_pam_header(data: bytes) -> PnmHeader:
    header, mark, _ = data[: 2**16].partition(b"\nENDHDR\n")
    lines = [_COMMENT.sub(b"", line).split(None, 1) for line in header.split(b"\n")[1:]]
    fields = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    try:
        keys = (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL")
        width, height, depth, maxval = (int(fields[key]) for key in keys)
    except (KeyError, ValueError):
        raise UnreadableError("not a readable image: the PAM header is damaged") from None
    if not mark or min(width, height, depth, maxval) < 1:
        raise UnreadableError("not a readable image: the PAM header is damaged")
    kind = fields.get(b"TUPLTYPE", b"")
    if kind not in _TUPLE_TYPES.get(depth, ()):
        raise UnsupportedError(
            f"PAM of {depth} samples per pixel, {kind.decode('ascii', 'replace')!r}"
        )
    return PnmHeader(7, width, height, depth, maxval, len(header) + len(mark))


def pnm_info(data: bytes) -> ImageInfo:
    """Properties of a Netpbm file. Raises UnreadableError."""
    header = read_pnm_header(data)
    grey, alpha = header.depth < 3, header.depth in (2, 4)
    top = 255 if header.variant in (1, 4) else header.maxval  # a bitmap has no maxval
    return ImageInfo("PPM", max_value=top, grey=grey, alpha=alpha)


def read_pnm(data: bytes) -> np.ndarray:
    """RGB uint8 [H, W, 3]. Raises UnreadableError if samples are missing or exceed maxval."""
    variant, width, height, depth, maxval, start = read_pnm_header(data)
    check_pixel_count(width, height)
    count = width * height * depth
    if variant in (1, 2, 3):
        samples = _parse_text(data[start:], count, variant == 1)
    elif variant == 4:
        stride = -(-width // 8)
        packed = np.frombuffer(data, np.uint8, offset=start)[: stride * height]
        if len(packed) < stride * height:
            raise UnreadableError("the file is truncated")
        samples = np.unpackbits(packed.reshape(height, stride), axis=1, count=width).ravel()
    else:
        kind = np.dtype(np.uint8 if maxval < 256 else ">u2")
        if len(data) - start < count * kind.itemsize:
            raise UnreadableError("the file is truncated")
        samples = np.frombuffer(data, kind, count, start)
    if samples.max() > maxval or samples.min() < 0:
        raise UnreadableError(f"a sample is not between 0 and maxval ({maxval})")
    if variant in (1, 4):
        samples = 1 - samples  # 1 is black
    image = to_8_bits(samples.reshape(height, width, depth), maxval)
    if depth < 3:
        return cv2.cvtColor(np.ascontiguousarray(image[..., 0]), cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(image[..., :3])


def _parse_text(text: bytes, count: int, bits: bool) -> np.ndarray:
    if b"#" in text:
        text = _COMMENT.sub(b"", text)
    words = re.findall(rb"[01]", text) if bits else text.split(None, count)[:count]
    if len(words) < count:
        raise UnreadableError("the file is truncated")
    try:
        return np.array(words[:count]).astype(np.int64)
    except ValueError:
        raise UnreadableError("a sample is not a number") from None
