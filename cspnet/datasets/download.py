"""Known data sets into class folders: ImageNet from its archives, two small ones from the network.

A part, train/ or val/, is made under another name and renamed when it is whole: what has that name
is never half of one. Interrupted, the same command goes on.
"""

import contextlib
import difflib
import os
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cspnet.errors import DataError, RecipeError
from cspnet.sources import messages
from cspnet.sources.messages import DOWNLOADABLE
from cspnet.text import end_sentence

PARTS = ("train", "val")
# Bytes of ImageNet's two large archives, so that a download cut short is told before its md5 is
# computed, which takes minutes.
SIZES = {"train": 147_897_477_120, "val": 6_744_924_160}
SMALL = 1_000_000_000  # bytes that a small set takes at most: its archive, unpacked, as files
TIMEOUT = 30  # seconds without an answer from the network

Tell = Callable[[str], None]
Progress = Callable[[int, int], None]


def fetch(name: str, to: Path, archives: Path | None, tell: Tell, progress: Progress) -> bool:
    """Makes to/train and to/val of a data set; False where both are there already.

    Archives are read from the folder `archives`, by default `to`, and downloaded into it where the
    data set may be. Raises DataError: a missing or damaged archive, no network, too little room, a
    part that is there and is not whole.
    """
    if name not in DOWNLOADABLE:
        near = difflib.get_close_matches(name.lower(), DOWNLOADABLE, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else " Your own need only class folders."
        raise RecipeError(f"data set {name!r}: there are {', '.join(DOWNLOADABLE)}.{hint}")
    archives = to if archives is None else archives
    for folder in {to, archives}:
        if os.path.lexists(folder) and not folder.is_dir():
            raise DataError(f"{folder} is not a folder: name another")
    missing = [part for part in PARTS if not _is_there(to / part, DOWNLOADABLE[name])]
    if not missing:
        return False
    if name == "imagenet":
        _require_archives(missing, archives)
    made = _make_folder(to)
    try:
        if name == "imagenet":
            _imagenet(missing, to, archives, tell, progress)
        else:
            _small(name, missing, to, archives, tell, progress)
    except tarfile.TarError as error:
        raise DataError(
            f"{archives}: an archive is damaged ({error}). Remove it, and download it again."
        ) from None
    except OSError as error:
        raise DataError(
            f"{to} could not be completed: {end_sentence(error)} Put it right, and the same command "
            "goes on."
        ) from None
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something by now
                folder.rmdir()
    return True


def _is_there(part: Path, classes: int) -> bool:
    """Whether a part is there and whole. Raises DataError where it is there and is not."""
    if not os.path.lexists(part):
        return False
    found = sum(entry.is_dir() for entry in messages.entries(part)) if part.is_dir() else 0
    if found == classes:
        return True
    raise DataError(
        f"{part} is there with {found:,} class folders in place of {classes:,}: something else "
        "made it. Move it away, and run the same command again."
    )


def _make_folder(folder: Path) -> list[Path]:
    """Makes a folder; returns it and those above that were made for it, the deepest first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror}") from None
    return made


def _require_room(folder: Path, needed: int) -> None:
    """Raises DataError where the disk of a folder has less than so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: the images take {needed / 1e9:,.1f} GB beside the archives, and "
            f"{free / 1e9:,.1f} GB are free. Make room, or give another disk with --to DIR."
        )


def _damaged(archive: Path, md5: str) -> DataError:
    return DataError(
        f"{archive} is damaged or was not downloaded to its end: its md5 is not {md5}. Remove it, "
        "and download it again."
    )


def _imagenet(missing: list[str], to: Path, archives: Path, tell: Tell, progress: Progress) -> None:
    from torchvision.datasets.imagenet import ARCHIVE_META

    room = 0
    if "train" in missing:
        with tarfile.open(archives / ARCHIVE_META["train"][0]) as tar:
            half = to / "train.partial"
            room += sum(m.size for m in tar if not (half / Path(m.name).stem).is_dir())
    if "val" in missing:
        room += (archives / ARCHIVE_META["val"][0]).stat().st_size
    _require_room(to, room)
    if "val" in missing:
        tell("val: checking and unpacking 50,000 images")
        _imagenet_val(archives.absolute(), to)
    if "train" in missing:
        name, md5 = ARCHIVE_META["train"]
        _imagenet_train(archives / name, md5, to, tell, progress)


def _require_archives(missing: list[str], archives: Path) -> None:
    """Raises DataError where archives of ImageNet are missing or have not their size."""
    from torchvision.datasets.imagenet import ARCHIVE_META

    lines = []
    # The devkit holds the classes of the validation images.
    for kind in [*missing, *["devkit"] * ("val" in missing)]:
        file = archives / ARCHIVE_META[kind][0]
        size = f"{SIZES[kind]:,} bytes" if kind in SIZES else "2.5 MB"
        if not file.is_file():
            lines.append(f"{file.name} ({size}) is not there")
        elif kind in SIZES and file.stat().st_size != SIZES[kind]:
            has = f"{file.stat().st_size:,}"
            lines.append(f"{file.name} has {has} bytes, not {size}: finish its download")
    if lines:
        raise DataError(
            f"ImageNet's archives are needed in {archives}:"
            + "".join(f"\n  - {line}" for line in lines)
            + "\nGet them from https://image-net.org/download-images (ILSVRC 2012; an account is "
            "needed), and put them there, or give their folder with --archives DIR.",
            lines=True,
        )


def _imagenet_val(archives: Path, to: Path) -> None:
    """torchvision's parser sorts the flat archive into class folders by the devkit's list."""
    from torchvision.datasets import imagenet

    half = to / "val.partial"
    shutil.rmtree(half, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:  # else torchvision's meta.bin lies in the data
        for kind in ("devkit", "val"):
            file, md5 = archives / imagenet.ARCHIVE_META[kind][0], imagenet.ARCHIVE_META[kind][1]
            try:
                if kind == "devkit":
                    imagenet.parse_devkit_archive(scratch, str(file))
                    wnids = imagenet.load_meta_file(scratch)[1]
                else:
                    imagenet.parse_val_archive(to, str(file), wnids, half.name)
            except RuntimeError:  # its only one: the md5
                raise _damaged(file, md5) from None
            except ImportError:
                raise DataError("ImageNet's devkit needs scipy: pip install scipy") from None
    _settle(half, to / "val")


def _imagenet_train(archive: Path, md5: str, to: Path, tell: Tell, progress: Progress) -> None:
    """The archive holds one archive a class. A class that is whole is not unpacked again."""
    from torchvision.datasets.utils import check_integrity

    half = to / "train.partial"
    half.mkdir(exist_ok=True)
    verified = half / ".verified"
    state = f"{md5} {archive.stat().st_size} {archive.stat().st_mtime_ns}"
    if not verified.is_file() or verified.read_text() != state:
        tell("train: checking the md5 of its archive, which takes minutes")
        if not check_integrity(archive, md5):
            raise _damaged(archive, md5)
        verified.write_text(state)
    tell("train: unpacking, class by class")
    safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
    with tarfile.open(archive) as outer:
        members = outer.getmembers()
        for number, member in enumerate(members, 1):
            whole = half / Path(member.name).stem
            if not whole.is_dir():
                partial = half / f"{whole.name}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    inner.extractall(partial, **safe)
                _settle(partial, whole)
            progress(number, len(members))
    verified.unlink()
    _settle(half, to / "train")


def _settle(half: Path, whole: Path) -> None:
    """Gives a folder its name, after its files are on the disk: a power cut leaves none empty."""
    os.sync()
    half.rename(whole)


def _small(
    name: str, missing: list[str], to: Path, archives: Path, tell: Tell, progress: Progress
) -> None:
    from torchvision.datasets import CIFAR10, Imagenette
    from torchvision.datasets.utils import extract_archive

    _require_room(to, SMALL)
    url, md5 = Imagenette._ARCHIVES["320px"]
    if name == "cifar10":
        url, md5 = CIFAR10.url, CIFAR10.tgz_md5
    archive = _obtain(url, md5, archives, tell)
    scratch = to / "unpack.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    tell(f"unpacking {archive}")
    extract_archive(str(archive), str(scratch))
    if name == "cifar10":
        for part in missing:
            _cifar10(scratch, part, to, progress)
    else:
        for part in missing:
            _settle(scratch / archive.stem / part, to / part)
    shutil.rmtree(scratch)


def _cifar10(source: Path, part: str, to: Path, progress: Progress) -> None:
    """CIFAR-10's pickled arrays as PNG files in class folders, named by their place in them."""
    from torchvision.datasets import CIFAR10

    half = to / f"{part}.partial"
    shutil.rmtree(half, ignore_errors=True)
    pictures = CIFAR10(source, train=part == "train")
    for label in pictures.classes:
        (half / label).mkdir(parents=True)
    for i, (image, label) in enumerate(pictures):
        image.save(half / pictures.classes[label] / f"{i:05}.png")
        progress(i + 1, len(pictures))
    _settle(half, to / part)


def _obtain(url: str, md5: str, folder: Path, tell: Tell) -> Path:
    """The archive of that address, downloaded into the folder where it is not there yet."""
    from torchvision.datasets.utils import check_integrity, download_url

    archive = folder / url.rpartition("/")[2]
    if archive.exists():
        if not check_integrity(archive, md5):
            raise _damaged(archive, md5)
        return archive
    made = _make_folder(folder)
    scratch = folder / "download.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    tell(f"downloading {url}")
    try:
        with _patience():
            download_url(url, scratch, archive.name, md5)
        (scratch / archive.name).replace(archive)
    except (OSError, RuntimeError) as error:
        reason = end_sentence(getattr(error, "reason", error))
        raise DataError(
            f"{url} cannot be downloaded: {reason} Download it elsewhere (its md5 is {md5}), put "
            f"it into {folder} as {archive.name}, and run the same command again: it goes on from "
            "there, without the network."
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
    return archive


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """A network that does not answer is given up: torchvision itself would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
