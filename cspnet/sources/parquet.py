"""Images in parquet files, as data sets of the Hugging Face Hub are stored: `train-00000-of-00294`.

A row is an image (its encoded bytes) and a label. The order is that of the rows. There is no way to
a row but through its row group, which is read and decompressed whole: each process keeps the last
ones. The labels are a column of their own, which is read once, at the start.
"""

import contextlib
import errno
import json
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cspnet.errors import DataError
from cspnet.sources import messages
from cspnet.sources.names import count_and_names

NUMBERED = r"([-_]\d+(-of-\d+)?)?\.parquet"  # what follows on the name of a part
FOLDERS = ("", "data")  # of a data root, in which such files lie
KEPT = 2  # row groups, in each process


@dataclass(frozen=True)
class ParquetSet:
    """Parquet files that are one part of a data set."""

    where: str  # what to call them in a message
    files: tuple[Path, ...]


def beside(root: Path, names: tuple[str, ...]) -> ParquetSet | None:
    """Parquet files in a data root, or in its data/, that are a part of it by name."""
    for folder in (root / name for name in FOLDERS):
        files = []
        with contextlib.suppress(DataError):  # what is not there, or cannot be listed
            files = [entry.name for entry in messages.entries(folder) if not entry.is_dir()]
        for name in names:
            if found := sorted(file for file in files if re.fullmatch(name + NUMBERED, file)):
                _require_all(folder, found)
                return ParquetSet(
                    str(folder / f"{name}*.parquet"), tuple(folder / f for f in found)
                )
    return None


def _require_all(folder: Path, files: list[str]) -> None:
    """Raises DataError where the names tell of more files than there are."""
    told = [match for file in files if (match := re.search(r"(\d+)-of-(\d+)\.parquet$", file))]
    if not told:
        return
    count, have = int(told[0][2]), {int(match[1]) for match in told}
    missing = [f"{number:05d}" for number in range(count) if number not in have]
    if missing:
        raise DataError(
            f"{folder} has {len(have)} of {count} files {files[0][: -len('.parquet')]} …: "
            f"number {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} is not there"
        )


class ParquetSource:
    """The rows of parquet files, as a source.

    The classes are the names that the file's metadata gives the numbers, or the labels themselves
    where these are words; sorted, as those of a folder are. Raises DataError where a file is
    damaged, or its columns are not an image and a label with a name; where a class has no image, if
    not `empty`.
    """

    def __init__(self, parquets: ParquetSet, empty: bool = False):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise DataError("parquet files need pyarrow: pip install pyarrow") from None
        self.parquets = parquets
        self._forget()
        starts, firsts, numbers, places = [0], [], [], []
        for number, file in enumerate(parquets.files):
            opened = self._open(number)
            image, label, named = _columns(opened.schema_arrow, file)
            if number and (image, label, named) != self._columns:
                raise DataError(f"{file}: its columns are not those of {parquets.files[0].name}")
            self._columns = image, label, named
            firsts.append(starts[-1])
            for group in range(opened.num_row_groups):
                places.append((number, group))
                starts.append(starts[-1] + opened.metadata.row_group(group).num_rows)
            numbers += self._labels(opened, file)
        words = named if named is not None else sorted(set(numbers))
        self.classes = sorted(words)
        rank = {word: place for place, word in enumerate(self.classes)}
        by_number = [rank[word] for word in words]
        try:
            labels = (
                [rank[n] for n in numbers] if named is None else [by_number[n] for n in numbers]
            )
        except IndexError:
            raise DataError(
                f"{parquets.where}: a label is {max(numbers)}, but the ClassLabel names 0 to "
                f"{len(words) - 1} only"
            ) from None
        if not labels:
            raise DataError(f"{parquets.where}: no rows")
        self.labels = np.array(labels, np.int32)
        self._starts, self._firsts, self._places = np.array(starts), np.array(firsts), places
        counts = np.bincount(self.labels, minlength=len(self.classes))
        without = [self.classes[k] for k in np.flatnonzero(counts == 0)]
        if without and not empty:
            raise DataError(f"{parquets.where}: no image of {count_and_names(without, 'class')}")

    def _labels(self, opened: Any, file: Path) -> list:
        """The labels of a file: numbers or words. Raises DataError where one is missing."""
        _, label, named = self._columns
        try:
            values = opened.read(columns=[label], use_threads=False).column(0).to_pylist()
        except UnicodeDecodeError:
            raise DataError(
                f"{file}: column `{label}` holds strings that are not UTF-8: write it again"
            ) from None
        unknown = [v for v in values if v is None or (named is not None and v < 0)]
        if unknown:
            raise DataError(
                f"{file}: {len(unknown):,} of {len(values):,} rows have no label, as test sets "
                "have none: give the training and the validation files"
            )
        return values

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path of the parquet file, a colon, and the row in it."""
        number = int(np.searchsorted(self._firsts, index, "right")) - 1
        return f"{self.parquets.files[number]}:{index - self._firsts[number]}"

    def read(self, index: int) -> tuple[bytes, int]:
        group = int(np.searchsorted(self._starts, index, "right")) - 1
        value = self._group(group)[index - int(self._starts[group])].as_py()
        if not value:
            raise OSError(errno.ENODATA, "the row has no image", self.name(index))
        return value, int(self.labels[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        """Rows by file and number, each with the size of the file: that of a row is not listed."""
        sizes = [os.path.getsize(file) for file in self.parquets.files]
        for index in range(len(self)):
            number = int(np.searchsorted(self._firsts, index, "right")) - 1
            name = self.parquets.files[number].name
            yield f"{name}:{index - self._firsts[number]}", sizes[number]

    def _group(self, group: int) -> Any:
        """The column of images of a row group, an arrow array of bytes."""
        import pyarrow

        if os.getpid() != self._process:  # a fork shares no reader and no lock with its parent
            self._forget()
        with self._lock:
            if group not in self._kept:
                number, within = self._places[group]
                image = self._columns[0]
                try:
                    table = self._open(number).read_row_group(within, [image], use_threads=False)
                except (pyarrow.ArrowException, OSError) as error:
                    raise OSError(errno.EIO, str(error), str(self.parquets.files[number])) from None
                column = table.column(0).combine_chunks()
                if pyarrow.types.is_struct(column.type):
                    column = column.field("bytes")
                self._kept[group] = column
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]

    def _open(self, number: int) -> Any:
        """A reader of a file. Raises DataError where it is no parquet file, or cut short."""
        import pyarrow
        import pyarrow.parquet

        if number not in self._readers:
            file = self.parquets.files[number]
            try:
                # pyarrow takes paths of UTF-8 only; any other file is opened by Python.
                source = file if _is_utf8(file) else open(file, "rb")  # noqa: SIM115
                self._readers[number] = pyarrow.parquet.ParquetFile(source)
            except (pyarrow.ArrowException, OSError) as error:
                told = str(error).partition(". ")[0]
                raise DataError(f"{file} cannot be read as parquet: {told}") from None
        return self._readers[number]

    def _forget(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._readers: dict[int, Any] = {}
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict:
        own = ("_process", "_lock", "_readers", "_kept")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _columns(schema: Any, file: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """Names of the image's and the label's column, and the classes by number; None for words."""
    import pyarrow

    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = told.get("info", {}).get("features", {})

    def one(kind: str, usual: str) -> str:
        found = [name for name, what in features.items() if what.get("_type") == kind]
        found = found if usual not in found else [usual]
        if not found and usual in schema.names:
            found = [usual]
        if len(found) != 1 or found[0] not in schema.names:
            shown = ", ".join(schema.names)
            raise DataError(f"{file} has no column `{usual}`; its columns are {shown}")
        return found[0]

    image, label = one("Image", "image"), one("ClassLabel", "label")
    names = features.get(label, {}).get("names")
    if names is not None:
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise DataError(
                f"{file}: the ClassLabel of column `{label}` has {count_and_names(twice, 'name')} more than "
                "once, so that their classes cannot be told apart: write it with distinct names"
            )
    types = pyarrow.types
    kind = schema.field(image).type
    if types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(f"{file}: column `{image}` is {kind}, not the bytes of a JPEG or PNG")
    kind = schema.field(label).type
    kind = kind.value_type if types.is_dictionary(kind) else kind  # a pandas category
    if names is not None and not types.is_integer(kind):
        raise DataError(
            f"{file}: column `{label}` is {kind}, not the numbers of its ClassLabel: write it with "
            "integers, or as strings without a ClassLabel"
        )
    words = (types.is_string, types.is_large_string, types.is_string_view)
    if names is None and types.is_integer(kind):
        raise DataError(
            f"{file}: column `{label}` holds numbers, and the file does not tell their names: "
            "write it with the features of the data set (a ClassLabel), or with names as labels"
        )
    if names is None and not any(is_kind(kind) for is_kind in words):
        raise DataError(f"{file}: column `{label}` is {kind}, not the names of classes")
    return image, label, None if names is None else tuple(names)
