"""Netpbm's formats, read by their specifications: PBM, PGM and PPM (P1 to P6), and PAM (P7).

The samples of a file range from 0 to its own maxval, which OpenCV ignores in binary files. Of
several images in a file the first is read.
"""

import re
from typing import NamedTuple

import cv2
import numpy as np

from cspnet.images.formats import (
    ImageInfo,
    UnreadableError,
    UnsupportedError,
    require_pixels,
    to_8_bits,
)

_NUMBER = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,9})")
_COMMENT = re.compile(rb"#[^\r\n]*")
_DEPTHS = {1: 1, 2: 1, 3: 3, 4: 1, 5: 1, 6: 3}  # samples per pixel of P1 to P6
_TUPLES = {  # of PAM, by the samples per pixel; also without a name
    1: (b"", b"BLACKANDWHITE", b"GRAYSCALE"),
    2: (b"", b"BLACKANDWHITE_ALPHA", b"GRAYSCALE_ALPHA"),
    3: (b"", b"RGB"),
    4: (b"", b"RGB_ALPHA"),
}


class Layout(NamedTuple):
    """What the header of a file says."""

    variant: int  # the digit after P
    width: int
    height: int
    depth: int  # samples per pixel
    maxval: int
    start: int  # of the samples


def layout(data: bytes) -> Layout:
    """Raises Unreadable."""
    variant = data[1] - ord("0")
    if variant == 7:
        found = _pam(data)
    else:
        at, numbers = 2, []
        for _ in range(2 if variant in (1, 4) else 3):
            match = _NUMBER.match(data, at)
            if not match:
                raise UnreadableError("not a readable image: the PNM header is damaged")
            numbers.append(int(match[1]))
            at = match.end()
        if not data[at : at + 1].isspace():
            raise UnreadableError("not a readable image: the PNM header is cut short")
        width, height, maxval = (*numbers, 1)[:3]
        found = Layout(variant, width, height, _DEPTHS[variant], maxval, at + 1)
    if not 0 < found.maxval < 65_536 or not found.width or not found.height:
        raise UnreadableError("the PNM header has a size or a maxval that PNM does not allow")
    return found


def _pam(data: bytes) -> Layout:
    head, mark, _ = data[: 2**16].partition(b"\nENDHDR\n")
    lines = [_COMMENT.sub(b"", line).split(None, 1) for line in head.split(b"\n")[1:]]
    fields = {line[0]: line[1].strip() for line in lines if len(line) == 2}
    try:
        keys = (b"WIDTH", b"HEIGHT", b"DEPTH", b"MAXVAL")
        width, height, depth, maxval = (int(fields[key]) for key in keys)
    except (KeyError, ValueError):
        raise UnreadableError("not a readable image: the PAM header is damaged") from None
    if not mark or min(width, height, depth, maxval) < 1:
        raise UnreadableError("not a readable image: the PAM header is damaged")
    kind = fields.get(b"TUPLTYPE", b"")
    if kind not in _TUPLES.get(depth, ()):
        raise UnsupportedError(
            f"PAM of {depth} samples per pixel, {kind.decode('ascii', 'replace')!r}"
        )
    return Layout(7, width, height, depth, maxval, len(head) + len(mark))


def header(data: bytes) -> ImageInfo:
    """Raises Unreadable."""
    found = layout(data)
    grey, alpha = found.depth < 3, found.depth in (2, 4)
    top = 255 if found.variant in (1, 4) else found.maxval  # of a bitmap it is no choice
    return ImageInfo("PPM", top=top, grey=grey, alpha=alpha)


def read(data: bytes) -> np.ndarray:
    """RGB uint8 [H, W, 3]. Raises Unreadable where samples are missing or exceed maxval."""
    variant, width, height, depth, maxval, start = layout(data)
    require_pixels(width, height)
    count = width * height * depth
    if variant in (1, 2, 3):
        found = _text(data[start:], count, variant == 1)
    elif variant == 4:
        stride = -(-width // 8)
        packed = np.frombuffer(data, np.uint8, offset=start)[: stride * height]
        if len(packed) < stride * height:
            raise UnreadableError("the file is truncated")
        found = np.unpackbits(packed.reshape(height, stride), axis=1, count=width).ravel()
    else:
        kind = np.dtype(np.uint8 if maxval < 256 else ">u2")
        if len(data) - start < count * kind.itemsize:
            raise UnreadableError("the file is truncated")
        found = np.frombuffer(data, kind, count, start)
    if found.max() > maxval or found.min() < 0:
        raise UnreadableError(f"a sample is not between 0 and the maxval, {maxval}")
    if variant in (1, 4):
        found = 1 - found  # 1 is black
    image = to_8_bits(found.reshape(height, width, depth), maxval)
    if depth < 3:
        return cv2.cvtColor(np.ascontiguousarray(image[..., 0]), cv2.COLOR_GRAY2RGB)
    return np.ascontiguousarray(image[..., :3])


def _text(text: bytes, count: int, bits: bool) -> np.ndarray:
    if b"#" in text:
        text = _COMMENT.sub(b"", text)
    words = re.findall(rb"[01]", text) if bits else text.split(None, count)[:count]
    if len(words) < count:
        raise UnreadableError("the file is truncated")
    try:
        return np.array(words[:count]).astype(np.int64)
    except ValueError:
        raise UnreadableError("a sample is not a number") from None
