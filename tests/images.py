"""Image files built byte by byte that no library writes. Samples are arrays [H, W, C]."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def packed(samples, bits, order=">"):
    """Rows of samples [H, W, C] of `bits` bits, each row padded to whole bytes."""
    rows = samples.reshape(len(samples), -1)
    if bits in (8, 16, 32):
        return rows.astype(f"{order}u{bits // 8}").tobytes()
    digits = np.unpackbits(rows.astype(">u2")[..., None].view(np.uint8), axis=2)[..., -bits:]
    return np.packbits(digits.reshape(len(rows), -1), axis=1).tobytes()


def exif(orientation, kind=3, order="<", extra=b""):
    """A TIFF block with only an orientation, of type BYTE (1), SHORT (3) or LONG (4)."""
    value = struct.pack(order + {1: "B", 3: "H", 4: "I"}[kind], orientation).ljust(4, b"\0")
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, 1) + value + bytes(4) + extra


def saved(image, kind, **options):
    """An array or a Pillow image, encoded by Pillow."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_segment(jpeg, payload, marker=0xE1):
    """A JPEG with an additional segment before all others."""
    return (
        jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]
    )


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples, depth, colours, *before, after=b"", interlaced=False):
    """Samples [H, W, C] of `depth` bits and a PNG colour type, with chunks around IDAT."""
    height, width = samples.shape[:2]
    passes = [(0, 0, 1, 1)]  # first row and column, and their steps
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)]
        passes += [(2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    raw = b""
    for top, left, down, right in passes:
        part = samples[top::down, left::right]
        raw += b"".join(b"\0" + packed(row[None], depth) for row in part)
    head = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlaced)
    body = chunk(b"IHDR", head) + b"".join(before) + chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + body + after + chunk(b"IEND", b"")


def tiff(samples, bits, photometric, order="<", tags=None, planar=False, tile=None, big=False):
    """Uncompressed: one strip, planes, or square tiles; `tags` is {tag: (type, values)}."""
    height, width, depth = samples.shape
    if planar:
        parts = [packed(samples[..., [channel]], bits, order) for channel in range(depth)]
    elif tile:
        grid = [(y, x) for y in range(0, height, tile) for x in range(0, width, tile)]
        parts = [packed(samples[y : y + tile, x : x + tile], bits, order) for y, x in grid]
    else:
        parts = [packed(samples, bits, order)]
    entries = {256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * depth), 259: (3, [1])}
    entries |= {262: (3, [photometric]), 277: (3, [depth]), 284: (3, [2 if planar else 1])}
    offsets, data = [], bytearray(16)
    for part in parts:
        offsets.append(len(data))
        data += part + bytes(len(part) % 2)
    sizes = [len(part) for part in parts]
    if tile:
        entries |= {322: (4, [tile]), 323: (4, [tile]), 324: (4, offsets), 325: (4, sizes)}
    else:
        entries |= {273: (4, offsets), 278: (4, [height]), 279: (4, sizes)}
    word, letter = (8, "Q") if big else (4, "I")
    listed = b""
    for tag, (kind, values) in sorted((entries | (tags or {})).items()):
        letters = {1: "B", 3: "H", 4: "I", 11: "f"}[kind]
        payload = struct.pack(f"{order}{len(values)}{letters}", *values)
        if len(payload) > word:
            at = len(data)
            data += payload + bytes(len(payload) % 2)
            payload = struct.pack(order + letter, at)
        listed += struct.pack(f"{order}HH{letter}", tag, kind, len(values)) + payload.ljust(
            word, b"\0"
        )
    count = struct.pack(order + ("Q" if big else "H"), len(entries | (tags or {})))
    head = b"II" if order == "<" else b"MM"
    start = struct.pack(
        order + ("HHHQ" if big else "HI"), *((43, 8, 0) if big else (42,)), len(data)
    )
    data[: len(head + start)] = head + start
    return bytes(data) + count + listed + bytes(word)


def webp_animation(stills, height, width):
    """Frames of the size of the canvas, from simple lossless or lossy WebP files."""
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]

    def part(name, payload):
        return name + struct.pack("<I", len(payload)) + payload + bytes(len(payload) % 2)

    body = b"WEBP" + part(b"VP8X", b"\x12\0\0\0" + sides) + part(b"ANIM", bytes(6))
    for still in stills:
        body += part(b"ANMF", bytes(6) + sides + bytes([100, 0, 0, 2]) + still[12:])
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(encoded, bits, compression=0, palette=b"", masks=(), info=40):
    """`encoded` is the pixel bytes, the width, and the height as in the header."""
    data, width, height = encoded
    colours = len(palette) // 4
    fields = b"".join(struct.pack("<I", mask) for mask in masks)
    if info == 12:
        head = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        head = struct.pack(
            "<IiiHHIIiiII", info, width, height, 1, bits, compression, len(data), 0, 0, colours, 0
        )
        head += fields if info == 40 else fields.ljust(info - 40, b"\0")
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + palette + data


def rows(samples, bits, top_down=False):
    """Pixel bytes of a BMP, its width and signed height; usually bottom row first."""
    height, width = samples.shape[:2]
    data = [packed(row[None], bits, "<") for row in (samples if top_down else samples[::-1])]
    return (
        b"".join(row + bytes(-len(row) % 4) for row in data),
        width,
        -height if top_down else height,
    )


def gif(
    indices, palette, *, at=(0, 0), canvas=None, background=0, transparent=None, interlaced=False
):
    """One frame [H, W] of indices below 4, without compression: a clear code before each."""
    height, width = indices.shape
    canvas = canvas or (height, width)
    if interlaced:
        order = [
            *range(0, height, 8),
            *range(4, height, 8),
            *range(2, height, 4),
            *range(1, height, 2),
        ]
        indices = indices[order]
    codes = np.stack([np.full(indices.size, 4), indices.ravel()], 1).ravel()
    bits = ((np.append(codes, 5)[:, None] >> np.arange(3)) & 1).astype(np.uint8)
    data = np.packbits(bits.ravel(), bitorder="little").tobytes()
    out = b"GIF89a" + struct.pack("<HHBBB", *canvas[::-1], 0x81, background, 0) + palette
    if transparent is not None:
        out += b"\x21\xf9\x04" + bytes([1, 0, 0, transparent, 0])
    out += b"\x2c" + struct.pack("<HHHHB", *at[::-1], width, height, 0x40 * interlaced) + b"\x02"
    for i in range(0, len(data), 255):
        out += bytes([len(data[i : i + 255])]) + data[i : i + 255]
    return out + b"\0\x3b"


def pam(samples, maxval, kind):
    height, width, depth = samples.shape
    head = f"P7\nWIDTH {width}\nHEIGHT {height}\n# a comment\nDEPTH {depth}\nMAXVAL {maxval}\n"
    return f"{head}TUPLTYPE {kind}\nENDHDR\n".encode() + packed(samples, 8 if maxval < 256 else 16)
