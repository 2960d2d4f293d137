"""Reading the headers of a tar file: its images and labels, and what is wrong with it."""

import os
import tarfile
from pathlib import Path
from typing import IO, NamedTuple

from cspnet.errors import DataError
from cspnet.sources.tree import is_ignored, is_image
from cspnet.text import end_sentence, printable

CLASSES_FILE = "classes.txt"  # next to the tar files: the names of numbered classes, one per line
MAX_LABEL = 1_000  # bytes of a .cls file
COPY_AGAIN = "copy or download it again"


class TarError(DataError):
    """Tar files that cannot be used for training; `problems` has a line for each problem."""

    def __init__(self, where: str, problems: list[str]):
        self.problems = problems
        more = len(problems) - 1
        rest = f" And {more:,} more problems: `cspnet index` lists them." if more else ""
        super().__init__(f"{where}: {end_sentence(problems[0])}{rest}")


class TarScan(NamedTuple):
    """The contents of a tar file by its headers."""

    file: Path
    images: dict[str, tuple[int, int]]  # offset and size by name
    labels: dict[str, bytes]  # contents of .cls files by sample key
    json_files: dict[str, tuple[int, int]]  # offset and size of .json files by sample key
    others: list[str]  # names of the first other files
    problems: list[str]


def decode_name(name: bytes) -> str:
    """A name in a tar file as a string; `encode_name` restores all bytes."""
    return name.decode("utf-8", "surrogateescape")


def encode_name(name: str) -> bytes:
    """The bytes of a name in a tar file."""
    return name.encode("utf-8", "surrogateescape")


def split_key(name: str) -> tuple[str, str]:
    """Key and extension of a WebDataset member; the extension starts after the first dot."""
    folder, slash, base = name.rpartition("/")
    start, _, extension = base.partition(".")
    return folder + slash + start, extension.lower()


def scan_tar(file: Path) -> TarScan:
    """Read the headers and .cls files of a tar file. Errors are listed in `problems`."""
    scan = TarScan(file, {}, {}, {}, [], [])
    last = "its first header"
    try:
        with (
            open(file, "rb") as stream,
            tarfile.open(
                fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape"
            ) as tar,
        ):
            previous_offset = -1
            while (member := tar.next()) is not None:
                # tarfile would keep all members in memory; only a private attribute prevents it.
                tar.members.clear()  # type: ignore[attr-defined]
                if member.size < 0 or member.offset <= previous_offset:
                    raise tarfile.ReadError("a header points backwards")
                previous_offset, last = member.offset, member.name
                _add_member(scan, member, stream)
            _check_end(scan, stream, tar.offset)
    except Exception as error:  # any kind, from a parser that trusts its input
        scan.problems.append(f"{file.name}: {_read_problem(file, error, last)}")
    return scan


def _read_problem(file: Path, error: Exception, last: str) -> str:
    """Why the headers of a tar file cannot be read to the end."""
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    size = os.path.getsize(file)
    if "unexpected end of data" in str(error):
        return f"truncated at byte {size:,}, in {printable(last)}: {COPY_AGAIN}"
    if not size:
        return f"empty, 0 bytes: {COPY_AGAIN}"
    with open(file, "rb") as start:
        if start.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")):
            return "compressed, so it cannot be read in place: decompress it"
    return f"not a tar file, or damaged at {printable(last)}: {COPY_AGAIN}"


def _check_end(scan: TarScan, file: IO[bytes], end: int) -> None:
    """Check that a tar file ends after its last header: tarfile takes damage for the end."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    problem = ""
    if len(block) < tarfile.BLOCKSIZE:
        problem = f"truncated at byte {end + len(block):,}, before its end mark: {COPY_AGAIN}"
    elif block.strip(b"\0"):
        problem = f"its header at byte {end:,} cannot be read: {COPY_AGAIN}"
    while not problem and (rest := file.read(2**20)):
        if rest.strip(b"\0"):
            problem = f"has data after its end mark at byte {end:,}: joined by cat? Use tar -A"
    if problem:
        scan.problems.append(f"{scan.file.name}: {problem}")


def _add_member(scan: TarScan, member: tarfile.TarInfo, file: IO[bytes]) -> None:
    """Add a member to a scan. Hidden ones are ignored, as in a folder."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    name, problem = "/".join(parts), ""
    if member.isdir() or not parts:
        return
    if member.name.startswith("/") or ".." in parts:
        problem = "points outside the tar file: pack it with a relative path"
    elif member.issym() or member.islnk():
        problem = "is a link: pack the file itself (tar --dereference --hard-dereference)"
    elif not member.isreg() or member.issparse():
        problem = "is not a regular file: leave it out"
    elif any(map(is_ignored, parts)):
        return
    position = (member.offset_data, member.size)
    key, extension = split_key(name)
    if problem:
        name = member.name
    elif is_image(parts[-1]):
        if scan.images.setdefault(name, position) != position:
            problem = "is in the tar file twice: remove one"
    elif extension == "cls":
        file.seek(member.offset_data)
        scan.labels[key] = file.read(min(member.size, MAX_LABEL))
    elif extension == "json":
        scan.json_files[key] = position
    elif len(scan.others) < 10:
        scan.others.append(name)
    if problem:
        scan.problems.append(f"{scan.file.name}: {printable(name)} {problem}")
