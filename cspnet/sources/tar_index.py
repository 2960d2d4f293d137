"""The index of tar files: where in them each image is, and how it is saved next to them."""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cspnet.files import replace_file

INDEX_VERSION = 1
INDEX_DTYPES = {  # of the arrays of an index, each with one entry per image
    "ends": "int64",
    "shards": "int32",
    "offsets": "int64",
    "sizes": "int64",
    "labels": "int32",
}


class TarImage(NamedTuple):
    """An image in a tar file."""

    name: bytes
    shard: int  # index of the tar file
    offset: int  # of its data in the tar file, in bytes
    size: int  # in bytes
    label: str = ""  # class name, once known


class TarIndex(NamedTuple):
    """Positions of the images, sorted by class and name."""

    classes: list[str]
    block: bytes  # the concatenated names
    ends: np.ndarray  # int64 [N], of the names in the block
    shards: np.ndarray  # int32 [N]
    offsets: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int64 [N]
    labels: np.ndarray  # int32 [N]

    @classmethod
    def from_images(cls, images: list[TarImage], classes: list[str]) -> "TarIndex":
        """The index of sorted images."""
        numbers = {name: number for number, name in enumerate(classes)}
        return cls(
            classes,
            b"".join(image.name for image in images),
            np.cumsum([len(image.name) for image in images], dtype=np.int64),
            np.array([image.shard for image in images], np.int32),
            np.array([image.offset for image in images], np.int64),
            np.array([image.size for image in images], np.int64),
            np.array([numbers[image.label] for image in images], np.int32),
        )


def save_index(file: Path, stamp: dict, index: TarIndex) -> None:
    """Write the index atomically, via a temporary file. `stamp` identifies the tar files."""
    head = json.dumps({"stamp": stamp, "classes": index.classes}).encode()
    content = io.BytesIO()
    np.savez(
        content,
        head=np.frombuffer(head, np.uint8),
        block=np.frombuffer(index.block, np.uint8),
        **{name: getattr(index, name) for name in INDEX_DTYPES},
    )
    # Several processes that open the data set may save its index at the same time.
    replace_file(file, lambda path: path.write_bytes(content.getbuffer()), concurrent=True)


def load_index(file: Path, stamp: dict) -> TarIndex | None:
    """Read an index; None if it is damaged, or has another stamp.

    Raises FileNotFoundError if there is no such file.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            head = json.loads(content["head"].tobytes())
            if head["stamp"] != stamp:
                return None
            arrays = {name: content[name] for name in INDEX_DTYPES}
            index = TarIndex(head["classes"], content["block"].tobytes(), **arrays)
        return index if _is_valid(index, stamp) else None
    except FileNotFoundError:
        raise
    except Exception:  # any kind, from parsers that trust their input
        return None


def _is_valid(index: TarIndex, stamp: dict) -> bool:
    """Whether an index is consistent with itself and with the sizes of the tar files."""
    lengths = np.array([size for _, size, _ in stamp["shards"]], np.int64)
    return (
        all(getattr(index, name).dtype == dtype for name, dtype in INDEX_DTYPES.items())
        and {getattr(index, name).shape for name in INDEX_DTYPES} == {(len(index.labels),)}
        and len(index.labels) > 0
        and bool((np.diff(index.ends, prepend=0) >= 0).all())
        and index.ends[-1] == len(index.block)
        and 0 <= index.shards.min() <= index.shards.max() < len(lengths)
        and 0 <= index.labels.min() <= index.labels.max() < len(index.classes)
        and min(index.offsets.min(), index.sizes.min()) >= 0
        and bool((index.sizes <= lengths[index.shards] - index.offsets).all())
    )
