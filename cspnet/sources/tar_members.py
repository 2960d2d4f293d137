"""What a tar file holds: its images, by class, or what is wrong with it."""

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from cspnet.errors import DataError
from cspnet.sources import messages
from cspnet.sources.roots import SPLITS
from cspnet.sources.tree import is_ignored
from cspnet.text import end_sentence, printable

CLASSES_FILE = "classes.txt"  # beside the tar files: the names of numbered classes, one a line
MAX_LABEL = 1_000  # bytes of a .cls
MAX_JSON = 2**20  # bytes
AGAIN = "copy or download it again"


class TarError(DataError):
    """Tar files that cannot be trained on; `problems` has a line for each thing in them."""

    def __init__(self, where: str, problems: list[str]):
        self.problems = problems
        more = len(problems) - 1
        rest = f" And {more:,} more: `cspnet index` names them." if more else ""
        super().__init__(f"{where}: {end_sentence(problems[0])}{rest}")


class Image(NamedTuple):
    """An image in a tar file."""

    name: bytes
    shard: int  # its number
    offset: int  # of its bytes, in bytes
    size: int  # bytes
    label: str = ""  # its class, once it is known


class Scan(NamedTuple):
    """What was found in a tar file, by the names in it."""

    file: Path
    places: dict[str, tuple[int, int]]  # offset and size of each image
    labels: dict[str, bytes]  # contents of the .cls, by key
    notes: dict[str, tuple[int, int]]  # offset and size of each .json, by key
    others: list[str]  # the first files of other kinds
    problems: list[str]


def text(name: bytes) -> str:
    """A name in a tar file as a string; any bytes come back by `raw`."""
    return name.decode("utf-8", "surrogateescape")


def raw(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def listed(folder: Path) -> list[str] | None:
    """The lines of classes.txt in a folder, or None. Raises DataError where a name is twice there.

    An empty line keeps a number that no image has.
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
    twice = [line for line, count in Counter(lines).items() if line and count > 1]
    if twice:
        raise DataError(
            f"{file} has {messages.count_and_names(twice, 'name')} more than once: one class a line"
        )
    return lines


def scan(file: Path) -> Scan:
    """Reads the headers of a tar file, and its .cls. What is wrong is among the problems."""
    found = Scan(file, {}, {}, {}, [], [])
    last = "its first header"
    try:
        with tarfile.open(file, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            before = -1
            while (member := tar.next()) is not None:
                tar.members.clear()  # or it keeps them all
                if member.size < 0 or member.offset <= before:
                    raise tarfile.ReadError("a header leads backward")
                before, last = member.offset, member.name
                _add(found, member, tar.fileobj)
            _look_behind(found, tar.fileobj, tar.offset)
    except Exception as error:  # of any kind, from a parser that trusts the file
        found.problems.append(f"{file.name}: {_reason(file, error, last)}")
    return found


def _reason(file: Path, error: Exception, last: str) -> str:
    """Why the headers of a tar file cannot be read to the end."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    size = os.path.getsize(file)
    if "unexpected end of data" in str(error):
        return f"cut short at byte {size:,}, in {printable(last)}: {AGAIN}"
    if not size:
        return f"empty, 0 bytes: {AGAIN}"
    with open(file, "rb") as start:
        if start.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
            return "compressed, so there is no reading in it: decompress it"
    return f"no tar file, or damaged at {printable(last)}: {AGAIN}"


def _look_behind(found: Scan, file: IO[bytes], end: int) -> None:
    """Whether a tar file is over where its headers are: tarfile takes damage for the end."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    told = ""
    if len(block) < tarfile.BLOCKSIZE:
        told = f"cut short at byte {end + len(block):,}, before its end mark: {AGAIN}"
    elif block.strip(b"\0"):
        told = f"its header at byte {end:,} cannot be read: {AGAIN}"
    while not told and (rest := file.read(2**20)):
        if rest.strip(b"\0"):
            told = f"goes on behind its end mark at byte {end:,}: joined by cat? Use tar -A"
    if told:
        found.problems.append(f"{found.file.name}: {told}")


def _add(found: Scan, member: tarfile.TarInfo, file: IO[bytes]) -> None:
    """Takes a member in; hidden ones are left alone, as in a folder."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    name, problem = "/".join(parts), ""
    if member.isdir() or not parts:
        return
    if member.name.startswith("/") or ".." in parts:
        problem = "leads out of the tar file: pack it by a path below the folder"
    elif member.issym() or member.islnk():
        problem = "is a link: pack the file itself (tar --dereference --hard-dereference)"
    elif not member.isreg() or member.issparse():
        problem = "is no ordinary file: pack it without"
    elif any(map(is_ignored, parts)):
        return
    place = (member.offset_data, member.size)
    key, field = split(name)
    if problem:
        name = member.name
    elif messages.is_image(parts[-1]):
        if found.places.setdefault(name, place) != place:
            problem = "is there twice: which one counts?"
    elif field == "cls":
        file.seek(member.offset_data)
        found.labels[key] = file.read(min(member.size, MAX_LABEL))
    elif field == "json":
        found.notes[key] = place
    elif len(found.others) < 10:
        found.others.append(name)
    if problem:
        found.problems.append(f"{found.file.name}: {printable(name)} {problem}")


def split(name: str) -> tuple[str, str]:
    """Key and field of a name in a WebDataset: the field begins after the first dot of the file."""
    folder, slash, base = name.rpartition("/")
    start, _, field = base.partition(".")
    return folder + slash + start, field.lower()


def classify(
    where: str, scans: list[Scan], listed: list[str] | None
) -> tuple[list[Image], list[str]]:
    """The images of all tar files with their classes, and all classes by name.

    Those of samples are all that classes.txt lists. Raises DataError where an image has none.
    """
    if not any(scan.places for scan in scans):
        raise DataError(_no_images(where, scans))
    for scan in scans:
        _take_notes(scan)
    samples = any(scan.labels for scan in scans)
    images, problems = _samples(scans, listed) if samples else _class_folders(where, scans)
    if problems:
        raise TarError(where, problems)
    names = {name for name in listed or () if name and samples}
    return images, sorted(names.union(image.label for image in images))


def _no_images(where: str, scans: list[Scan]) -> str:
    names = messages.count_and_names([scan.file.name for scan in scans], "tar file")
    others = [name for scan in scans for name in scan.others]
    told = f"{where}: no image in {names}"
    if any(name.endswith(messages.ARCHIVES) for name in others):
        return f"{told}, but further archives ({others[0]} …). Unpack them."
    kinds = f"; found there: {', '.join(map(printable, others[:5]))}" if others else ""
    return f"{told}{kinds}. Read are {', '.join(messages.SUFFIXES)}."


def _take_notes(scan: Scan) -> None:
    """Adds the labels of the .json where there is no .cls; one without a label is no label."""
    with open(scan.file, "rb") as file:
        for name in scan.places:
            key, _ = split(name)
            if key in scan.labels or key not in scan.notes:
                continue
            offset, size = scan.notes[key]
            file.seek(offset)
            try:
                note = json.loads(file.read(min(size, MAX_JSON)))
            except (ValueError, RecursionError):
                continue
            values = [note.get(field) for field in ("class", "label")] if type(note) is dict else []
            values = [value for value in values if type(value) in (int, str)]
            if values:
                scan.labels[key] = _label_bytes(str(values[0]))[:MAX_LABEL]


def _label_bytes(label: str) -> bytes:
    """A label of a .json as the .cls of the same class has it; `\\udcff` in it is a byte."""
    try:
        return raw(label)
    except UnicodeEncodeError:  # another surrogate, which no file's name gave
        return label.encode("utf-8", "surrogatepass")


def _samples(scans: list[Scan], listed: list[str] | None) -> tuple[list[Image], list[str]]:
    """WebDataset's samples with their classes, and what is wrong with them."""
    images: list[Image] = []
    problems = []
    unnamed: set[int] = set()  # numbers of classes, where there are no names for them
    known = frozenset(listed or ())
    for shard, scan in enumerate(scans):
        for key, name, problem in _pairs(scan):
            label = text(scan.labels.get(key, b"")).strip()
            number = int(label) if re.fullmatch("-?[0-9]+", label) else None
            if number is not None and listed is None:
                unnamed.add(number)
            elif number is not None and not (0 <= number < len(listed) and listed[number]):
                problem = (
                    problem or f"is of class {number}: {CLASSES_FILE}, from 0 on, has no such line"
                )
            elif number is not None:
                label = listed[number]
            elif listed is not None and label not in known:
                problem = problem or f"is of class {printable(label)}, which {CLASSES_FILE} lacks"
            if problem:
                problems.append(f"{scan.file.name}: {printable(name)} {problem}")
            else:
                images.append(Image(raw(name), shard, *scan.places[name], label))
    if unnamed:
        problems.append(
            f"the classes are numbers from {min(unnamed)} to {max(unnamed)}, without names: put a "
            f"{CLASSES_FILE} beside the tar files, one name a line, that of class 0 first"
        )
    return images, problems


def _pairs(scan: Scan) -> Iterator[tuple[str, str, str]]:
    """Key of each sample, name of its image, what is wrong with it."""
    chosen: dict[str, str] = {}
    further = []
    for name in scan.places:
        key, field = split(name)
        if "." in field:
            further.append((key, name))  # such as 0.seg.png beside 0.jpg
        elif key in chosen:
            yield key, name, f"and {chosen[key]} are one sample: which is its image?"
        else:
            chosen[key] = name
    for key, name in chosen.items():
        missing = not scan.labels.get(key, b"").strip()
        yield key, name, "has no class: add KEY.cls to each KEY.jpg" if missing else ""
    for key, name in further:
        if key not in chosen:
            yield key, name, "has a dot in its key: a sample is KEY.jpg with KEY.cls"
    for key in scan.labels.keys() - chosen.keys():
        yield key, f"{key}.cls", "has no image of its name"


def _class_folders(where: str, scans: list[Scan]) -> tuple[list[Image], list[str]]:
    """The images in class folders, and what is wrong with some. Raises DataError if all is."""
    every = [name.split("/") for scan in scans for name in scan.places]
    if not any(len(parts) > 1 for parts in every):
        raise DataError(
            f"{where}: no image has a class: neither folders nor .cls in "
            f"{messages.count_and_names([scan.file.name for scan in scans], 'tar file')}. Is each a class? "
            "Unpack each into a folder of its name."
        )
    tops = sorted({parts[0] for parts in every})
    cut = 0
    if len(tops) > 1 and set(tops) <= set(SPLITS):
        raise DataError(
            f"{where}: {' and '.join(f'{top}/' for top in tops)} in the same tar files. "
            "Pack each by itself: train.tar and val.tar."
        )
    if len(tops) == 1 and all(len(parts) > 2 for parts in every):
        if tops[0] not in SPLITS:
            inner = sorted({parts[1] for parts in every})
            raise DataError(
                f"{where}: one folder only in the tar files, {printable(tops[0])}/, and "
                f"{messages.count_and_names(inner, 'folder')} in it: a level too many. Pack those."
            )
        cut = len(tops[0]) + 1
    images: list[Image] = []
    problems = []
    for shard, scan in enumerate(scans):
        for name, place in scan.places.items():
            label, slash, _ = name[cut:].partition("/")
            if slash:
                images.append(Image(raw(name[cut:]), shard, *place, label))
            else:
                shown = printable(name)
                problems.append(f"{scan.file.name}: {shown} has no class: it is in no folder")
    return images, problems
