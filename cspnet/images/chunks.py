"""PNG, WebP, GIF, AVIF and JPEG 2000: the header information that decoding depends on.

Each function raises UnreadableError if the file is damaged before the pixel data.
"""

import struct
from collections.abc import Iterator

from cspnet.images.formats import ImageInfo, UnreadableError, UnsupportedError
from cspnet.images.ifd import exif_orientation


def png_info(data: bytes) -> ImageInfo:
    """PNG, third edition (W3C 2025). Only EXIF in an eXIf chunk is used."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"IHDR", b"tRNS", b"acTL", b"eXIf"):
            chunks.setdefault(kind, data[at + 8 : at + 8 + length])
        elif kind == b"IEND":
            break
        at += 12 + length
    header = chunks.get(b"IHDR", b"")
    if len(header) != 13:
        raise UnreadableError("not a readable image: the PNG header is damaged")
    depth, colour_type = header[8], header[9]
    orientation, damaged = exif_orientation(chunks.get(b"eXIf"))
    return ImageInfo(
        "PNG",
        orientation,
        damaged,
        max_value=65_535 if depth == 16 else 255,
        grey=colour_type in (0, 4),
        alpha=colour_type in (4, 6) or b"tRNS" in chunks,
        multi_frame=int.from_bytes(chunks.get(b"acTL", b"")[:4]) > 1,
    )


def _riff(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Chunks of a RIFF file: name, offset and length of the payload."""
    while at + 8 <= end:
        name, length = struct.unpack_from("<4sI", data, at)
        yield name, at + 8, length
        at += 8 + length + length % 2


def webp_info(data: bytes) -> ImageInfo:
    """WebP container (RFC 9649)."""
    exif, alpha, frames = None, False, 0
    for name, at, length in _riff(data, 12, len(data)):
        if name == b"VP8X" and length >= 10:
            alpha = bool(data[at] & 0x10) if at < len(data) else False
        elif name == b"VP8L" and data[at : at + 1] == b"\x2f":
            alpha = bool(int.from_bytes(data[at + 1 : at + 5], "little") >> 28 & 1)
        elif name == b"ANMF":
            frames += 1
        elif name == b"EXIF" and exif is None:
            exif = data[at : at + length]
    orientation, damaged = exif_orientation(exif)
    return ImageInfo("WEBP", orientation, damaged, alpha=alpha, multi_frame=frames > 1)


def webp_still(data: bytes) -> bytes:
    """The first frame of an animation as a still image, if it covers the canvas.

    libwebp's animation decoder blends with a transparent black canvas, which loses the colour of
    transparent pixels. Any other WebP is returned unchanged.
    """
    canvas = None
    for name, at, length in _riff(data, 12, len(data)):
        if name == b"VP8X":
            canvas = data[at + 4 : at + 10]
        elif name == b"ANMF":
            if at + length > len(data) or data[at + 6 : at + 12] != canvas:
                return data
            body = data[at + 16 : at + length]
            alpha = b"\x10" if body[:4] in (b"ALPH", b"VP8L") else b"\0"
            body = b"WEBPVP8X" + struct.pack("<I", 10) + alpha + bytes(3) + canvas + body
            return b"RIFF" + struct.pack("<I", len(body)) + body
    return data


def _gif_blocks(data: bytes) -> Iterator[tuple[int, int]]:
    """Offsets and introducers of the blocks of a GIF (GIF89a specification)."""
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    while at + 10 < len(data) and data[at] in (0x21, 0x2C):
        yield at, data[at]
        if data[at] == 0x21:
            at += 2
        else:
            packed = data[at + 9]
            at += 11 + (3 << (packed & 7) + 1 if packed & 0x80 else 0)
        while at < len(data) and data[at]:  # sub-blocks, each preceded by its length
            at += 1 + data[at]
        at += 1


def _gif_transparency(data: bytes) -> int | None:
    """Offset of the flags that make a palette index transparent in the first frame, if any."""
    flags_offset = None
    for at, introducer in _gif_blocks(data):
        if introducer == 0x2C:
            return flags_offset
        if data[at + 1 : at + 3] == b"\xf9\x04":
            flags_offset = at + 3 if data[at + 3] & 1 else None
    return None


def gif_info(data: bytes) -> ImageInfo:
    """GIF87a and GIF89a."""
    frames = sum(introducer == 0x2C for _, introducer in _gif_blocks(data))
    return ImageInfo("GIF", alpha=_gif_transparency(data) is not None, multi_frame=frames > 1)


def gif_opaque(data: bytes) -> bytes:
    """The file without transparency in its first frame: all indices keep their palette colour."""
    at = _gif_transparency(data)
    if at is None:
        return data
    return data[:at] + bytes([data[at] & ~1]) + data[at + 1 :]


# EXIF orientation of an anticlockwise rotation by 90° × angle, followed by a flip: vertical for
# axis 0, horizontal for axis 1, none for None (ISO/IEC 23008-12, 6.5.10 and 6.5.12).
_ORIENTATIONS: dict[tuple[int, int | None], int] = {
    **{(0, None): 1, (1, None): 8, (2, None): 3, (3, None): 6},
    **{(0, 0): 4, (1, 0): 5, (2, 0): 2, (3, 0): 7},
    **{(0, 1): 2, (1, 1): 7, (2, 1): 4, (3, 1): 5},
}
_AUXILIARY_ALPHA = b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha"


def avif_info(data: bytes) -> ImageInfo:
    """AVIF: irot and imir define the orientation; EXIF is ignored, as the format requires."""
    start = data.find(b"ipco")
    end = start - 4 + int.from_bytes(data[start - 4 : start]) if start >= 4 else 0
    properties: dict[bytes, set[bytes]] = {}
    at = start + 4
    while start > 0 and at + 8 <= min(end, len(data)):
        length, name = struct.unpack_from(">I4s", data, at)
        if length < 8:
            break
        properties.setdefault(name, set()).add(data[at + 8 : at + length])
        at += length
    turns, mirrors = properties.get(b"irot", {b"\0"}), properties.get(b"imir", {b""})
    if len(turns) > 1 or len(mirrors) > 1 or b"clap" in properties:
        raise UnsupportedError("AVIF with several orientations, or with a crop in its header")
    (turn,), (mirror,) = turns, mirrors
    key = turn[0] & 3 if turn else 0, mirror[0] & 1 if mirror else None
    depths = {byte for value in properties.get(b"pixi", ()) for byte in value[5:]}
    return ImageInfo(
        "AVIF",
        _ORIENTATIONS[key],
        max_value=2 ** max(depths, default=8) - 1,
        alpha=any(_AUXILIARY_ALPHA in value for value in properties.get(b"auxC", ())),
        multi_frame=data[8:12] == b"avis",
    )


def jpeg2000_info(data: bytes) -> ImageInfo:
    """JPEG 2000: the SIZ segment of the codestream (ITU-T T.800, A.5.1)."""
    start = data.find(b"\xff\x4f\xff\x51")
    count = int.from_bytes(data[start + 40 : start + 42])
    depths = {*data[start + 42 : start + 42 + 3 * count : 3]}
    if start < 0 or not count or not depths:
        raise UnreadableError("not a readable image: the JPEG 2000 header is damaged")
    if depths - {7} and depths - {15}:  # depth - 1; the top bit means signed
        raise UnsupportedError("JPEG 2000 samples that are not unsigned 8 or 16 bits")
    return ImageInfo(
        "JPEG2000",
        max_value=65_535 if depths == {15} else 255,
        grey=count < 3,
        alpha=count in (2, 4),
    )
