"""The first image file directory (IFD) of TIFF data: of a TIFF file, and of EXIF in any format.

Adobe, TIFF Revision 6.0 (1992), section 2; for BigTIFF, its 64-bit extension. Offsets and counts
come from the file, so each is checked.
"""

from collections.abc import Mapping
from typing import NamedTuple

ORIENTATION = 0x0112
BYTE, SHORT, LONG, LONG8 = 1, 3, 4, 16
SIZES = {BYTE: 1, SHORT: 2, LONG: 4, LONG8: 8}  # bytes of the unsigned types
MOST_VALUES = 16  # read of one entry; none that is needed here has more


class Broken(ValueError):
    """The directory, or the entry asked for, is not what TIFF defines."""


class Entry(NamedTuple):
    """An entry of a directory."""

    at: int  # offset of its 12 bytes; 20 of BigTIFF
    type: int
    count: int


class Directory:
    """The entries of the first IFD of TIFF data.

    Raises Broken where the header or the list of entries is damaged.
    """

    def __init__(self, data: bytes):
        self.data = data
        self.order = {b"II": "little", b"MM": "big"}.get(bytes(data[:2]))
        if self.order is None:
            raise Broken("no byte order mark")
        version = self._int(2, 2)
        if version not in (42, 43):
            raise Broken("not TIFF")
        self._big = version == 43
        # Sizes of an offset, of an entry and of the number of entries.
        self._word, self._length, head = (8, 20, 8) if self._big else (4, 12, 2)
        if self._big and (self._int(4, 2), self._int(6, 2)) != (8, 0):
            raise Broken("not BigTIFF")
        start = self._int(8 if self._big else 4, self._word)
        count = self._int(start, head)
        first = start + head
        if count > 4096 or first + count * self._length > len(data):
            raise Broken("the directory is cut short")
        self._entries: dict[int, Entry] = {}
        for at in range(first, first + count * self._length, self._length):
            entry = Entry(at, self._int(at + 2, 2), self._int(at + 4, self._word))
            self._entries.setdefault(self._int(at, 2), entry)
        end = first + count * self._length
        self.more = end + self._word <= len(data) and self._int(end, self._word) != 0  # another IFD

    def _int(self, at: int, size: int) -> int:
        if at + size > len(self.data):
            raise Broken("an offset beyond the end")
        return int.from_bytes(self.data[at : at + size], self.order)

    def __contains__(self, tag: int) -> bool:
        return tag in self._entries

    def values(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The unsigned integers of an entry. Raises Broken for another type, or too many."""
        if tag not in self._entries:
            return default
        at, kind, count = self._entries[tag]
        size = SIZES.get(kind)
        if size is None or not 0 < count <= MOST_VALUES:
            raise Broken(f"tag {tag} has type {kind} and {count} values")
        field = at + 4 + self._word
        if size * count > self._word:
            field = self._int(field, self._word)
        return tuple(self._int(field + i * size, size) for i in range(count))

    def orientation(self) -> int:
        """1 to 8, as EXIF and TIFF define it; 1 where it is absent, or 0 for "unknown".

        BYTE and LONG count as well as SHORT, since cameras and libraries write them. Raises Broken
        for anything else.
        """
        values = self.values(ORIENTATION, (1,))
        if len(values) != 1 or values[0] > 8:
            raise Broken(f"orientation {values}")
        return values[0] or 1

    def replaced(self, changes: Mapping[int, int]) -> bytearray:
        """The data with a single SHORT in place of the values of each tag; none is added."""
        data = bytearray(self.data)
        for tag, value in changes.items():
            if tag in self._entries:
                at = self._entries[tag].at
                data[at + 2 : at + 4] = SHORT.to_bytes(2, self.order)
                data[at + 4 : at + 4 + self._word] = (1).to_bytes(self._word, self.order)
                field = value.to_bytes(2, self.order).ljust(self._word, b"\0")
                data[at + 4 + self._word : at + 4 + 2 * self._word] = field
        return data


def exif_orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, with or without JPEG's `Exif` prefix. Raises Broken."""
    return Directory(exif.removeprefix(b"Exif\0\0")).orientation()
