"""Files of a few hundred bytes whose headers declare hundreds of millions of pixels."""

import io
import struct
import zlib

from PIL import Image

SIDE = 30_000


def saved(kind: str, **options) -> bytearray:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, kind, **options)
    return bytearray(file.getvalue())


def png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def jpeg(progressive: bool = False) -> bytes:
    data = saved("JPEG", progressive=progressive)
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", SIDE, SIDE)
    return bytes(data)


def progressive_jpeg() -> bytes:
    return jpeg(progressive=True)


def bmp() -> bytes:
    data = saved("BMP")
    data[18:26] = struct.pack("<ii", SIDE, SIDE)
    return bytes(data)


def gif() -> bytes:
    data = saved("GIF")
    at = data.index(struct.pack("<HHHH", 0, 0, 16, 16))
    data[6:10] = data[at + 4 : at + 8] = struct.pack("<HH", SIDE, SIDE)
    return bytes(data)


def webp() -> bytes:
    """Lossless, with sides of 16,384 pixels, the maximum of the format."""
    data = saved("WEBP", lossless=True)
    at = data.index(b"VP8L") + 9
    flags = struct.unpack("<I", data[at : at + 4])[0] & ~0xFFFFFFF
    data[at : at + 4] = struct.pack("<I", flags | 16_383 | 16_383 << 14)
    return bytes(data)


def animated_webp() -> bytes:
    data = saved("WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = struct.pack("<I", SIDE - 1)[:3] * 2
    return bytes(data)


def tiff(**options) -> bytes:
    data = saved("TIFF", **options)
    start = struct.unpack("<I", data[4:8])[0]
    for entry in range(struct.unpack("<H", data[start : start + 2])[0]):
        at = start + 2 + 12 * entry
        if struct.unpack("<H", data[at : at + 2])[0] in (256, 257, 278):  # sides, rows per strip
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, SIDE)
    return bytes(data)


def packed_tiff() -> bytes:
    return tiff(compression="tiff_lzw")


def ppm() -> bytes:
    return b"P6\n%d %d\n255\n" % (SIDE, SIDE) + bytes(1000)


def pgm() -> bytes:
    return b"P5\n%d %d\n255\n" % (SIDE, SIDE) + bytes(1000)


def peak() -> int:
    """Peak memory of this process in MB.

    getrusage is unsuitable: its peak includes that of the parent before exec.
    """
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM"))


BOMBS = [
    *(png, jpeg, progressive_jpeg, bmp, gif, webp, animated_webp),
    *(tiff, packed_tiff, ppm, pgm),
]
