"""Images in parquet files, in the layout of the Hugging Face Hub: `train-00000-of-00294.parquet`.

A row contains an image (its encoded bytes) and a label; the order is that of the rows. Parquet has
no access to a single row: its row group is read and decompressed as a whole, so each process caches
the last ones. The labels are a separate column, which is read once, at the start.
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
from typing import Any, NamedTuple

import numpy as np

from cspnet.errors import DataError
from cspnet.sources.names import count_and_names
from cspnet.sources.protocol import require_nonempty_classes
from cspnet.sources.tree import list_entries

FILE_SUFFIX = r"([-_]\d+(-of-\d+)?)?\.parquet"  # of a file name, after the name of a split
FOLDERS = ("", "data")  # of a data root, in which parquet files may be
CACHED_GROUPS = 2  # row groups per process


@dataclass(frozen=True)
class ParquetSet:
    """The parquet files of a split."""

    where: str  # for messages
    files: tuple[Path, ...]

    @classmethod
    def by_name(cls, root: Path, names: tuple[str, ...]) -> "ParquetSet | None":
        """The parquet files in a data root, or in its data/, that are a split by name."""
        for folder in (root / name for name in FOLDERS):
            files: list[str] = []
            with contextlib.suppress(DataError):  # a folder that does not exist or is unreadable
                files = [entry.name for entry in list_entries(folder) if not entry.is_dir()]
            for name in names:
                matching = sorted(file for file in files if re.fullmatch(name + FILE_SUFFIX, file))
                if matching:
                    _require_all(folder, matching)
                    paths = tuple(folder / file for file in matching)
                    return cls(str(folder / f"{name}*.parquet"), paths)
        return None


def _require_all(folder: Path, files: list[str]) -> None:
    """Raise DataError if the names declare more files than there are."""
    numbered = [match for file in files if (match := re.search(r"(\d+)-of-(\d+)\.parquet$", file))]
    if not numbered:
        return
    count, present = int(numbered[0][2]), {int(match[1]) for match in numbered}
    missing = [f"{number:05d}" for number in range(count) if number not in present]
    if missing:
        raise DataError(
            f"{folder} has {len(present)} of {count} files {files[0][: -len('.parquet')]} …: "
            f"number {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} is missing"
        )


class Columns(NamedTuple):
    """The columns of a parquet file that are used."""

    image: str
    label: str
    names: tuple[str, ...] | None  # class names by number; None if the labels are names


class ParquetSource:
    """The rows of parquet files, as a source.

    The class names are those of the ClassLabel in the files' metadata, or the labels themselves if
    they are strings; they are sorted like class folders. Raises DataError if a file is damaged, or
    if its columns are not an image and a label with a name; if a class has no image, unless
    `allow_empty`.
    """

    _columns: Columns

    def __init__(self, parquets: ParquetSet, allow_empty: bool = False):
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise DataError("parquet files need pyarrow: pip install pyarrow") from None
        self.parquets = parquets
        self._reset()
        group_starts, file_starts = [0], []
        labels: list[Any] = []
        self._groups: list[tuple[int, int]] = []  # file and number in it of each row group
        for number, file in enumerate(parquets.files):
            reader = self._reader(number)
            columns = _columns(reader.schema_arrow, file)
            if number and columns != self._columns:
                raise DataError(
                    f"{file}: its columns differ from those of {parquets.files[0].name}"
                )
            self._columns = columns
            file_starts.append(group_starts[-1])
            for group in range(reader.num_row_groups):
                self._groups.append((number, group))
                group_starts.append(group_starts[-1] + reader.metadata.row_group(group).num_rows)
            labels += _read_labels(reader, columns, file)
        self._group_starts, self._file_starts = np.array(group_starts), np.array(file_starts)
        self.classes, self.labels = self._sort_classes(labels)
        if not allow_empty:
            require_nonempty_classes(
                self,
                lambda names: f"{parquets.where}: no image of {count_and_names(names, 'class')}",
            )

    def _sort_classes(self, labels: list[Any]) -> tuple[list[str], np.ndarray]:
        """Sorted class names, and the class index of each row. Raises DataError."""
        if not labels:
            raise DataError(f"{self.parquets.where}: no rows")
        names = self._columns.names
        if names is not None:
            if max(labels) >= len(names):
                raise DataError(
                    f"{self.parquets.where}: a label is {max(labels)}, but the ClassLabel has only "
                    f"names for 0 to {len(names) - 1}"
                )
            labels = [names[number] for number in labels]
        classes = sorted(set(labels) if names is None else names)
        index_of = {name: index for index, name in enumerate(classes)}
        return classes, np.array([index_of[label] for label in labels], np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The path of the parquet file, a colon, and the row in the file."""
        number = int(np.searchsorted(self._file_starts, index, "right")) - 1
        return f"{self.parquets.files[number]}:{index - self._file_starts[number]}"

    def read(self, index: int) -> tuple[bytes, int]:
        group = int(np.searchsorted(self._group_starts, index, "right")) - 1
        offset = index - int(self._group_starts[group])
        value = self._images(group)[offset].as_py()
        if not value:
            raise OSError(errno.ENODATA, "the row has no image", self.name(index))
        return value, int(self.labels[index])

    def listing(self) -> Iterator[tuple[str, int]]:
        """Rows by file and number; the sizes are those of the files."""
        sizes = [os.path.getsize(file) for file in self.parquets.files]
        for index in range(len(self)):
            number = int(np.searchsorted(self._file_starts, index, "right")) - 1
            name = self.parquets.files[number].name
            yield f"{name}:{index - self._file_starts[number]}", sizes[number]

    def _images(self, group: int) -> Any:
        """The image column of a row group, an arrow array of bytes."""
        import pyarrow

        if os.getpid() != self._process:  # a fork must not share readers and locks with its parent
            self._reset()
        with self._lock:
            if group not in self._cache:
                number, group_in_file = self._groups[group]
                image = self._columns.image
                try:
                    reader = self._reader(number)
                    table = reader.read_row_group(group_in_file, [image], use_threads=False)
                except (pyarrow.ArrowException, OSError) as error:
                    raise OSError(errno.EIO, str(error), str(self.parquets.files[number])) from None
                column = table.column(0).combine_chunks()
                if pyarrow.types.is_struct(column.type):
                    column = column.field("bytes")
                self._cache[group] = column
                while len(self._cache) > CACHED_GROUPS:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(group)
            return self._cache[group]

    def _reader(self, number: int) -> Any:
        """The reader of a file. Raises DataError if it is not a parquet file, or truncated."""
        import pyarrow
        import pyarrow.parquet

        if number not in self._readers:
            file = self.parquets.files[number]
            try:
                # pyarrow accepts only UTF-8 paths; Python opens any other file.
                source = file if _is_utf8(file) else open(file, "rb")  # noqa: SIM115
                self._readers[number] = pyarrow.parquet.ParquetFile(source)
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).partition(". ")[0]
                raise DataError(f"{file} cannot be read as parquet: {reason}") from None
        return self._readers[number]

    def _reset(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._readers: dict[int, Any] = {}
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict:
        local = ("_process", "_lock", "_readers", "_cache")  # to each process
        return {key: value for key, value in self.__dict__.items() if key not in local}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()


def _read_labels(reader: Any, columns: Columns, file: Path) -> list[Any]:
    """The labels of a file: numbers or strings. Raises DataError if one is missing."""
    try:
        values = reader.read(columns=[columns.label], use_threads=False).column(0).to_pylist()
    except UnicodeDecodeError:
        raise DataError(
            f"{file}: column `{columns.label}` contains strings that are not UTF-8: write it again"
        ) from None
    missing = [v for v in values if v is None or (columns.names is not None and v < 0)]
    if missing:
        raise DataError(
            f"{file}: {len(missing):,} of {len(values):,} rows have no label, as in a test set: "
            "give the training and the validation files"
        )
    return values


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _columns(schema: Any, file: Path) -> Columns:
    """Find the image and label columns by the metadata, or by their names. Raises DataError."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})

    def column(feature_type: str, usual: str) -> str:
        names = [name for name, feature in features.items() if feature.get("_type") == feature_type]
        if usual in names or (not names and usual in schema.names):
            names = [usual]
        if len(names) != 1 or names[0] not in schema.names:
            shown = ", ".join(schema.names)
            raise DataError(f"{file} has no column `{usual}`; its columns are {shown}")
        return names[0]

    image, label = column("Image", "image"), column("ClassLabel", "label")
    names = features.get(label, {}).get("names")
    if names is not None:
        duplicates = [name for name, count in Counter(names).items() if count > 1]
        if duplicates:
            count = count_and_names(duplicates, "name")
            raise DataError(
                f"{file}: the ClassLabel of column `{label}` has {count} more "
                "than once, so these classes are ambiguous: write it with distinct names"
            )
    _check_types(schema, file, Columns(image, label, names))
    return Columns(image, label, None if names is None else tuple(names))


def _check_types(schema: Any, file: Path, columns: Columns) -> None:
    """Raise DataError if the columns do not have the types of an image and a label."""
    from pyarrow import types

    kind = schema.field(columns.image).type
    if types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(
            f"{file}: column `{columns.image}` has type {kind}, not the bytes of a JPEG or PNG"
        )
    label, names = columns.label, columns.names
    kind = schema.field(label).type
    kind = kind.value_type if types.is_dictionary(kind) else kind  # a pandas category
    if names is not None and not types.is_integer(kind):
        raise DataError(
            f"{file}: column `{label}` has type {kind}, not the numbers of its ClassLabel: write "
            "it with integers, or as strings without a ClassLabel"
        )
    if names is None and types.is_integer(kind):
        raise DataError(
            f"{file}: column `{label}` contains numbers, and the file has no names for them: write "
            "it with the features of the data set (a ClassLabel), or with names as labels"
        )
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    if names is None and not any(is_kind(kind) for is_kind in strings):
        raise DataError(f"{file}: column `{label}` has type {kind}, not class names")
