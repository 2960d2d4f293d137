"""Classes of the images in tar files: from class folders, .cls or .json files, and classes.txt."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cspnet.errors import DataError
from cspnet.sources import messages
from cspnet.sources.names import count_and_names
from cspnet.sources.roots import SPLITS
from cspnet.sources.tar_index import TarImage
from cspnet.sources.tar_members import (
    CLASSES_FILE,
    MAX_LABEL,
    TarError,
    TarScan,
    decode_name,
    encode_name,
    split_key,
)
from cspnet.sources.tree import IMAGE_SUFFIXES
from cspnet.text import printable

MAX_JSON = 2**20  # bytes


def read_class_list(folder: Path) -> list[str] | None:
    """The lines of classes.txt in a folder, or None if there is no such file.

    An empty line reserves a number without images. Raises DataError if a name appears twice.
    """
    file = folder / CLASSES_FILE
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").rstrip().split("\n")]
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 (byte {error.start:,}): convert it, with iconv -t UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    duplicates = [line for line, count in Counter(lines).items() if line and count > 1]
    if duplicates:
        raise DataError(
            f"{file} has {count_and_names(duplicates, 'name')} more than once: one class per line"
        )
    return lines


def assign_classes(
    where: str, scans: list[TarScan], class_list: list[str] | None
) -> tuple[list[TarImage], list[str]]:
    """The images of all tar files with their class names, and the sorted names of all classes.

    For WebDataset samples, these include all names in `class_list`. Raises DataError if an image
    has no class.
    """
    if not any(scan.images for scan in scans):
        raise DataError(_no_images(where, scans))
    for scan in scans:
        _read_json_labels(scan)
    has_labels = any(scan.labels for scan in scans)
    images, problems = _samples(scans, class_list) if has_labels else _class_folders(where, scans)
    if problems:
        raise TarError(where, problems)
    names = {name for name in class_list or () if name and has_labels}
    return images, sorted(names.union(image.label for image in images))


def _no_images(where: str, scans: list[TarScan]) -> str:
    """The message for tar files without images."""
    names = count_and_names([scan.file.name for scan in scans], "tar file")
    others = [name for scan in scans for name in scan.others]
    message = f"{where}: no image in {names}"
    if any(name.endswith(messages.ARCHIVES) for name in others):
        return f"{message}, but more archives ({others[0]} …). Unpack them."
    kinds = f"; it contains: {', '.join(map(printable, others[:5]))}" if others else ""
    return f"{message}{kinds}. Supported are {', '.join(IMAGE_SUFFIXES)}."


def _read_json_labels(scan: TarScan) -> None:
    """Add the labels of .json files to samples without .cls; ignore files without a label."""
    with open(scan.file, "rb") as file:
        for name in scan.images:
            key, _ = split_key(name)
            if key in scan.labels or key not in scan.json_files:
                continue
            offset, size = scan.json_files[key]
            file.seek(offset)
            try:
                content = json.loads(file.read(min(size, MAX_JSON)))
            except (ValueError, RecursionError):
                continue
            if type(content) is not dict:
                continue
            values = [content.get(field) for field in ("class", "label")]
            values = [value for value in values if type(value) in (int, str)]
            if values:
                scan.labels[key] = _encode_label(str(values[0]))[:MAX_LABEL]


def _encode_label(label: str) -> bytes:
    """A label of a .json file as bytes of a .cls file; `\\udcff` in it represents a byte."""
    try:
        return encode_name(label)
    except UnicodeEncodeError:  # a surrogate that does not represent a byte
        return label.encode("utf-8", "surrogatepass")


def _samples(
    scans: list[TarScan], class_list: list[str] | None
) -> tuple[list[TarImage], list[str]]:
    """WebDataset samples with their class names, and their problems."""
    images: list[TarImage] = []
    problems = []
    unnamed: set[int] = set()  # class numbers without names
    known = frozenset(class_list or ())
    for shard, scan in enumerate(scans):
        for key, name, problem in _sample_images(scan):
            label = decode_name(scan.labels.get(key, b"")).strip()
            number = int(label) if re.fullmatch("-?[0-9]+", label) else None
            if class_list is None:
                if number is not None:
                    unnamed.add(number)
            elif number is not None:
                if 0 <= number < len(class_list) and class_list[number]:
                    label = class_list[number]
                else:
                    problem = (
                        problem
                        or f"has class {number}, but {CLASSES_FILE} has no such line (from 0)"
                    )
            elif label not in known:
                problem = problem or f"has class {printable(label)}, which is not in {CLASSES_FILE}"
            if problem:
                problems.append(f"{scan.file.name}: {printable(name)} {problem}")
            else:
                images.append(TarImage(encode_name(name), shard, *scan.images[name], label))
    if unnamed:
        problems.append(
            f"the classes are numbers from {min(unnamed)} to {max(unnamed)}, without names: put a "
            f"{CLASSES_FILE} next to the tar files, one name per line, starting with class 0"
        )
    return images, problems


def _sample_images(scan: TarScan) -> Iterator[tuple[str, str, str]]:
    """Key, image name and problem (or "") of each WebDataset sample."""
    chosen: dict[str, str] = {}
    further = []
    for name in scan.images:
        key, extension = split_key(name)
        if "." in extension:
            further.append((key, name))  # such as 0.seg.png next to 0.jpg
        elif key in chosen:
            yield key, name, f"and {chosen[key]} belong to one sample: which is its image?"
        else:
            chosen[key] = name
    for key, name in chosen.items():
        missing = not scan.labels.get(key, b"").strip()
        yield key, name, "has no class: add KEY.cls to each KEY.jpg" if missing else ""
    for key, name in further:
        if key not in chosen:
            yield key, name, "has a dot in its key: a sample is KEY.jpg with KEY.cls"
    for key in scan.labels.keys() - chosen.keys():
        yield key, f"{key}.cls", "has no image with the same key"


def _class_folders(where: str, scans: list[TarScan]) -> tuple[list[TarImage], list[str]]:
    """The images in class folders, and problems of single ones. Raises DataError if all fail."""
    prefix = _common_prefix(where, scans)
    images: list[TarImage] = []
    problems = []
    for shard, scan in enumerate(scans):
        for name, position in scan.images.items():
            relative = name[len(prefix) :]
            label, slash, _ = relative.partition("/")
            if slash:
                images.append(TarImage(encode_name(relative), shard, *position, label))
            else:
                problems.append(
                    f"{scan.file.name}: {printable(name)} has no class: it is not in a folder"
                )
    return images, problems


def _common_prefix(where: str, scans: list[TarScan]) -> str:
    """The folder that contains all class folders: "", or "train/". Raises DataError."""
    paths = [name.split("/") for scan in scans for name in scan.images]
    if not any(len(parts) > 1 for parts in paths):
        raise DataError(
            f"{where}: no image has a class: neither folders nor .cls in "
            f"{count_and_names([scan.file.name for scan in scans], 'tar file')}. Is each a class? "
            "Unpack each into a folder of its name."
        )
    tops = sorted({parts[0] for parts in paths})
    if len(tops) > 1 and set(tops) <= set(SPLITS):
        raise DataError(
            f"{where}: {' and '.join(f'{top}/' for top in tops)} in the same tar files. "
            "Pack each by itself: train.tar and val.tar."
        )
    if len(tops) > 1 or any(len(parts) <= 2 for parts in paths):
        return ""
    if tops[0] not in SPLITS:
        inner = sorted({parts[1] for parts in paths})
        raise DataError(
            f"{where}: the tar files contain only one folder, {printable(tops[0])}/, with "
            f"{count_and_names(inner, 'folder')} in it: one level too many. Pack those."
        )
    return f"{tops[0]}/"
