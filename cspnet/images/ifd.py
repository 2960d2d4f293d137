"""The first image file directory (IFD) of TIFF data: of a TIFF file, and of EXIF in any format.

Source: Adobe, TIFF Revision 6.0 (1992), section 2, and its 64-bit extension BigTIFF. Offsets and
counts are untrusted input, so each is checked.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

ORIENTATION = 0x0112
BYTE, SHORT, LONG, LONG8 = 1, 3, 4, 16
TYPE_SIZES = {BYTE: 1, SHORT: 2, LONG: 4, LONG8: 8}  # of the unsigned types, in bytes
MAX_VALUES = 16  # per entry; no entry used here has more


class IfdError(ValueError):
    """The directory, or the requested entry, violates the TIFF specification."""


class IfdEntry(NamedTuple):
    """An entry of a directory."""

    at: int  # offset of its 12 bytes (BigTIFF: 20)
    type: int
    values: int  # their number


class ImageFileDirectory:
    """The entries of the first IFD of TIFF data.

    Raises IfdError if the header or the list of entries is damaged.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.order: Literal["little", "big"]
        if data[:2] == b"II":
            self.order = "little"
        elif data[:2] == b"MM":
            self.order = "big"
        else:
            raise IfdError("no byte order mark")
        version = self._int(2, 2)
        if version not in (42, 43):
            raise IfdError("not TIFF")
        self._big = version == 43
        # Sizes of an offset, of an entry and of the entry count, in bytes.
        self._word, self._length, head = (8, 20, 8) if self._big else (4, 12, 2)
        if self._big and (self._int(4, 2), self._int(6, 2)) != (8, 0):
            raise IfdError("not BigTIFF")
        start = self._int(8 if self._big else 4, self._word)
        count = self._int(start, head)
        first = start + head
        if count > 4096 or first + count * self._length > len(data):
            raise IfdError("the directory is cut short")
        self._entries: dict[int, IfdEntry] = {}
        for at in range(first, first + count * self._length, self._length):
            entry = IfdEntry(at, self._int(at + 2, 2), self._int(at + 4, self._word))
            self._entries.setdefault(self._int(at, 2), entry)
        end = first + count * self._length
        self.has_next = end + self._word <= len(data) and self._int(end, self._word) != 0

    def _int(self, at: int, size: int) -> int:
        if at + size > len(self.data):
            raise IfdError("an offset points beyond the end")
        return int.from_bytes(self.data[at : at + size], self.order)

    def __contains__(self, tag: int) -> bool:
        return tag in self._entries

    def values(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The unsigned integers of an entry. Raises IfdError for other types or too many values."""
        if tag not in self._entries:
            return default
        at, kind, count = self._entries[tag]
        size = TYPE_SIZES.get(kind)
        if size is None or not 0 < count <= MAX_VALUES:
            raise IfdError(f"tag {tag} has type {kind} and {count} values")
        field = at + 4 + self._word
        if size * count > self._word:
            field = self._int(field, self._word)
        return tuple(self._int(field + i * size, size) for i in range(count))

    def orientation(self) -> int:
        """The orientation, 1 to 8, as defined by EXIF and TIFF; 1 if it is absent or 0 ("unknown").

        BYTE and LONG are accepted as well as SHORT, since cameras and libraries write them. Raises
        IfdError for anything else.
        """
        values = self.values(ORIENTATION, (1,))
        if len(values) != 1 or values[0] > 8:
            raise IfdError(f"orientation {values}")
        return values[0] or 1

    def replaced(self, changes: Mapping[int, int]) -> bytes:
        """A copy of the data in which a single SHORT replaces the values of each tag.

        Tags that the directory does not have are ignored.
        """
        data = bytearray(self.data)
        for tag, value in changes.items():
            if tag in self._entries:
                at = self._entries[tag].at
                data[at + 2 : at + 4] = SHORT.to_bytes(2, self.order)
                data[at + 4 : at + 4 + self._word] = (1).to_bytes(self._word, self.order)
                field = value.to_bytes(2, self.order).ljust(self._word, b"\0")
                data[at + 4 + self._word : at + 4 + 2 * self._word] = field
        return bytes(data)


def exif_orientation(exif: bytes | None) -> tuple[int, bool]:
    """The orientation in an EXIF block, 1 to 8, and whether the block is damaged.

    The block may have JPEG's `Exif` prefix. The orientation is 1 if it is absent or damaged.
    """
    if exif is None:
        return 1, False
    try:
        return ImageFileDirectory(exif.removeprefix(b"Exif\0\0")).orientation(), False
    except IfdError:
        return 1, True
