"""A data root: where its training and validation images are, and opening them as sources.

A root has train/ and val/, or tar or parquet files of these names (train-00000.tar …).
"""

import errno
import os
import re
from pathlib import Path

from cspnet.errors import DataError
from cspnet.recipe.schema import DIGITS
from cspnet.sources import messages, roots, tar_set
from cspnet.sources.folder import Digits, Folder
from cspnet.sources.names import NETWORK, TRAINING, class_differences
from cspnet.sources.parquet import ParquetSet, ParquetSource
from cspnet.sources.protocol import Source
from cspnet.sources.roots import SPLITS, VALIDATION_NAMES
from cspnet.sources.tar_set import TarSet, TarSource
from cspnet.sources.tree import unreadable_folder
from cspnet.text import printable

SplitLocation = Path | TarSet | ParquetSet  # of a split: a folder with class folders, or files


class DataRoot:
    """The folder of a data set. Raises DataError if it is not a folder that can be read.

    `give` completes the message with how the command at hand is given a data root.
    """

    def __init__(self, root: str, give: str = messages.GIVE_DATA):
        self.folder = require_data_folder(root, give)

    @property
    def train(self) -> SplitLocation:
        """The training images. Raises DataError."""
        if files := _files_by_name(self.folder, ("train",)):
            return files
        path = self.folder / "train"
        if "train" not in roots.split_names(self.folder) or not os.path.isdir(path):
            raise DataError(
                tar_set.split_as_root(self.folder) or messages.no_training_folder(self.folder)
            )
        return TarSet.in_folder(path) or path

    @property
    def val(self) -> SplitLocation:
        """The validation images, or the root if it is a split itself. Raises DataError."""
        if files := _files_by_name(self.folder, VALIDATION_NAMES):
            return files
        folder = self._val_folder()
        return TarSet.in_folder(folder) or folder

    @property
    def splits(self) -> dict[str, SplitLocation]:
        """The train and val locations, or the root by its name if it is a split. DataError."""
        if self.has_splits:
            return {"train": self.train, "val": self.val}
        name = Path(os.path.abspath(self.folder)).name
        return {name: TarSet.in_folder(self.folder) or self.folder}

    @property
    def has_splits(self) -> bool:
        """Whether a folder or file in the root is a split by its name. Raises DataError."""
        named = roots.split_names(self.folder)
        return bool(named) or any(_files_by_name(self.folder, (name,)) for name in SPLITS)

    def _val_folder(self) -> Path:
        """The validation folder, or the root if it is a split itself. Raises DataError."""
        folder = self.folder
        names = [name for name in roots.split_names(folder) if os.path.isdir(folder / name)]
        validation = [name for name in names if name in VALIDATION_NAMES]
        if len(validation) > 1:
            raise DataError(messages.several_validation_folders(folder, validation))
        if validation:
            return folder / validation[0]
        if "train" in names:
            raise DataError(messages.no_validation_folder(folder))
        if problem := tar_set.no_validation_tar(folder) or messages.training_as_validation(folder):
            raise DataError(problem)
        return folder


def _files_by_name(root: Path, names: tuple[str, ...]) -> TarSet | ParquetSet | None:
    """The tar or parquet files in a data root that are one of the named splits."""
    return TarSet.by_name(root, names) or ParquetSet.by_name(root, names)


def require_data_folder(root: str, give: str = messages.GIVE_DATA) -> Path:
    """The path of a data root, `~` expanded. Raises DataError if it is not a readable folder.

    `give` completes the message with how the command at hand is given a data root.
    """
    if "://" in root:
        raise DataError(messages.url_as_folder(root))
    folder = Path(_shown_root(root)).expanduser()
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise unreadable_folder(OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder)))
    if not os.path.isdir(folder):
        raise DataError(messages.not_a_folder(folder, give))
    return folder


def _shown_root(root: str) -> str:
    """A data root for a message, in which `.` and `..` would look like a full stop."""
    return os.path.abspath(root) if os.path.normpath(root).endswith(".") else root


def open_location(location: SplitLocation, allow_empty: bool = False) -> Source:
    """Open the images of a split. Raises DataError; for empty classes unless `allow_empty`."""
    if isinstance(location, TarSet):
        return TarSource(location, allow_empty)
    if isinstance(location, ParquetSet):
        return ParquetSource(location, allow_empty)
    return Folder(location, allow_empty)


def open_training(root: str) -> Source:
    """Open the training images of a data root. Writes nothing. Raises DataError."""
    return Digits(train=True) if root == DIGITS else open_location(DataRoot(root).train)


def open_parts(root: str) -> tuple[Source, Source]:
    """Open the training and the validation images of a data root. Writes nothing.

    Raises DataError if one of them is missing, or if their classes differ.
    """
    training, validation = open_training(root), _open_validation(root)
    require_classes(validation, training.classes, root, TRAINING)
    return training, validation


def open_validation(root: str, classes: list[str] | None, count: int | None = None) -> Source:
    """Open the validation images of a data root, or of a split folder, for a network.

    `classes` are the class names of the network, or None if it has only a `count` of classes.
    Raises DataError if the folder's classes do not match by name, or by count.
    """
    source = _open_validation(root)
    if classes is not None:
        require_classes(source, classes, root)
    elif len(source.classes) != count:
        raise DataError(f"{root} has {len(source.classes)} classes, but the network has {count}")
    return source


def _open_validation(root: str) -> Source:
    return Digits(train=False) if root == DIGITS else open_location(DataRoot(root).val)


def display_names(classes: list[str]) -> list[str]:
    """Class names to show to people: the first WordNet word of a synset, else the class name.

    timm contains the words of ImageNet's synsets (n01440764 is a tench). Characters that cannot be
    displayed, and line breaks, are escaped.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return list(map(printable, classes))
    from timm.data import ImageNetInfo  # takes seconds

    words = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    assert isinstance(words, dict)
    return [words.get(name, name).partition(",")[0] for name in classes]


def require_classes(source: Source, classes: list[str], root: str, owner: str = NETWORK) -> None:
    """Raise DataError unless the source has exactly these classes.

    `owner` says whose classes they are: NETWORK, or TRAINING if `source` is the validation set.
    """
    if difference := class_differences(source.classes, classes, owner):
        message = "the classes are not those of the network"
        if owner == TRAINING:
            message = "the validation classes are not those of train/"
        raise DataError(f"{_shown_root(root)}: {message} ({len(classes)}): {difference}")
