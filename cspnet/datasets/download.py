"""Prepare known data sets: ImageNet from its archives, two small ones by download.

A split (train/ or val/) is created under a temporary name and renamed when it is complete, so a
folder of that name is never incomplete. After an interruption, the same command resumes.
"""

import contextlib
import os
import shutil
import socket
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cspnet.errors import DataError, RecipeError
from cspnet.files import move_into_place
from cspnet.sources.messages import DOWNLOADABLE
from cspnet.sources.tree import list_entries
from cspnet.text import did_you_mean, end_sentence

SPLIT_FOLDERS = ("train", "val")
# Bytes of ImageNet's two large archives. They reveal an incomplete download at once, while the md5
# takes minutes.
ARCHIVE_SIZES = {"train": 147_897_477_120, "val": 6_744_924_160}
SMALL_SET_SIZE = 1_000_000_000  # bytes that a small data set needs: archive, unpacked, as files
NETWORK_TIMEOUT = 30  # seconds without a response

ReportLine = Callable[[str], None]
Progress = Callable[[int, int], None]


def prepare_dataset(
    name: str, output: Path, archives: Path | None, report: ReportLine, progress: Progress
) -> bool:
    """Create train/ and val/ of a known data set in `output`. Returns False if both exist.

    Archives are read from the folder `archives` (default: `output`). Those of freely available data
    sets are downloaded there if they are missing. `report` receives lines about what is done,
    `progress` the number of items done and their total. Raises RecipeError for an unknown name, and
    DataError for a missing or damaged archive, without network access, for a lack of disk space and
    for an incomplete split that something else created.
    """
    if name not in DOWNLOADABLE:
        hint = did_you_mean(name.lower(), DOWNLOADABLE, cutoff=0.5)
        hint = hint or " Other data sets need class folders."
        raise RecipeError(
            f"unknown data set {name!r}: choose from {', '.join(DOWNLOADABLE)}.{hint}"
        )
    archives = output if archives is None else archives
    for folder in {output, archives}:
        if os.path.lexists(folder) and not folder.is_dir():
            raise DataError(f"{folder} is not a folder. Choose another path")
    missing = [split for split in SPLIT_FOLDERS if not _exists(output / split, DOWNLOADABLE[name])]
    if not missing:
        return False
    if name == "imagenet":
        _require_archives(missing, archives)
    created = _create_folder(output)
    try:
        if name == "imagenet":
            _prepare_imagenet(missing, output, archives, report, progress)
        else:
            _prepare_small(name, missing, output, archives, report, progress)
    except tarfile.TarError as error:
        raise DataError(
            f"an archive in {archives} is damaged ({error}). Delete it and download it again."
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot complete {output}: {end_sentence(error)} Fix the problem, then run the same "
            "command again to resume."
        ) from None
    finally:
        _remove_if_empty(created)
    return True


def _exists(split: Path, classes: int) -> bool:
    """Whether a split exists and is complete. Raises DataError if it is incomplete."""
    if not os.path.lexists(split):
        return False
    count = sum(entry.is_dir() for entry in list_entries(split)) if split.is_dir() else 0
    if count == classes:
        return True
    raise DataError(
        f"{split} exists with {count:,} class folders instead of {classes:,}, so something else "
        "created it. Move it away and run the same command again."
    )


def _create_folder(folder: Path) -> list[Path]:
    """Create a folder; return it and its parents that did not exist, deepest first."""
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder {folder}: {error.strerror}") from None
    return created


def _remove_if_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def _require_space(folder: Path, needed: int) -> None:
    """Raise DataError if fewer than `needed` bytes are free on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: the images need {needed / 1e9:,.1f} GB in addition to the archives, but "
            f"only {free / 1e9:,.1f} GB are free. Free disk space or choose another disk with "
            "--output DIR."
        )


def _damaged(archive: Path, md5: str) -> DataError:
    return DataError(
        f"{archive} is damaged or incomplete: its md5 is not {md5}. Delete it and download it "
        "again."
    )


def _prepare_imagenet(
    missing: list[str], output: Path, archives: Path, report: ReportLine, progress: Progress
) -> None:
    from torchvision.datasets.imagenet import ARCHIVE_META

    needed = 0
    if "train" in missing:
        with tarfile.open(archives / ARCHIVE_META["train"][0]) as tar:
            partial = output / "train.partial"
            needed += sum(m.size for m in tar if not (partial / Path(m.name).stem).is_dir())
    if "val" in missing:
        needed += (archives / ARCHIVE_META["val"][0]).stat().st_size
    _require_space(output, needed)
    if "val" in missing:
        report("val: checking and unpacking 50,000 images")
        _unpack_imagenet_val(archives.absolute(), output)
    if "train" in missing:
        name, md5 = ARCHIVE_META["train"]
        _unpack_imagenet_train(archives / name, md5, output, report, progress)


def _require_archives(missing: list[str], archives: Path) -> None:
    """Raise DataError if archives of ImageNet are missing or have the wrong size."""
    from torchvision.datasets.imagenet import ARCHIVE_META

    problems = []
    # The devkit contains the classes of the validation images.
    for kind in [*missing, *["devkit"] * ("val" in missing)]:
        file = archives / ARCHIVE_META[kind][0]
        size = f"{ARCHIVE_SIZES[kind]:,} bytes" if kind in ARCHIVE_SIZES else "2.5 MB"
        if not file.is_file():
            problems.append(f"{file.name} ({size}) is missing")
        elif kind in ARCHIVE_SIZES and file.stat().st_size != ARCHIVE_SIZES[kind]:
            actual = f"{file.stat().st_size:,}"
            problems.append(f"{file.name} has {actual} bytes, not {size}: finish its download")
    if problems:
        raise DataError(
            f"ImageNet's archives are required in {archives}:"
            + "".join(f"\n  - {problem}" for problem in problems)
            + "\nDownload them from https://image-net.org/download-images (ILSVRC 2012; requires "
            "an account) to this folder, or give their folder with --archives DIR.",
            lines=True,
        )


def _unpack_imagenet_val(archives: Path, output: Path) -> None:
    """Sort the flat archive into class folders with torchvision's parser and the devkit's list."""
    from torchvision.datasets import imagenet

    partial = output / "val.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:  # for torchvision's meta.bin
        for kind in ("devkit", "val"):
            file, md5 = archives / imagenet.ARCHIVE_META[kind][0], imagenet.ARCHIVE_META[kind][1]
            try:
                if kind == "devkit":
                    imagenet.parse_devkit_archive(scratch, str(file))
                    wnids = imagenet.load_meta_file(scratch)[1]
                else:
                    imagenet.parse_val_archive(output, str(file), wnids, partial.name)
            except RuntimeError:  # torchvision raises it only for a wrong md5
                raise _damaged(file, md5) from None
            except ImportError:
                raise DataError("ImageNet's devkit needs scipy: pip install scipy") from None
    _finish(partial, output / "val")


def _unpack_imagenet_train(
    archive: Path, md5: str, output: Path, report: ReportLine, progress: Progress
) -> None:
    """Unpack an archive that contains one archive per class. Complete classes are skipped."""
    from torchvision.datasets.utils import check_integrity

    partial = output / "train.partial"
    partial.mkdir(exist_ok=True)
    verified = partial / ".verified"
    state = f"{md5} {archive.stat().st_size} {archive.stat().st_mtime_ns}"
    if not verified.is_file() or verified.read_text() != state:
        report("train: checking the md5 of the archive, which takes minutes")
        if not check_integrity(archive, md5):
            raise _damaged(archive, md5)
        verified.write_text(state)
    report("train: unpacking class by class")
    with tarfile.open(archive) as outer:
        members = outer.getmembers()
        for number, member in enumerate(members, 1):
            folder = partial / Path(member.name).stem
            if not folder.is_dir():
                unfinished = partial / f"{folder.name}.partial"
                shutil.rmtree(unfinished, ignore_errors=True)
                with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                    _extract(inner, unfinished)
                _finish(unfinished, folder)
            progress(number, len(members))
    verified.unlink()
    _finish(partial, output / "train")


def _extract(tar: tarfile.TarFile, folder: Path) -> None:
    if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
        tar.extractall(folder, filter="data")
    else:
        tar.extractall(folder)


def _finish(partial: Path, final: Path) -> None:
    """Rename a complete folder once its files are on disk: a power loss must not empty it."""
    os.sync()
    move_into_place(partial, final)


def _prepare_small(
    name: str,
    missing: list[str],
    output: Path,
    archives: Path,
    report: ReportLine,
    progress: Progress,
) -> None:
    from torchvision.datasets import CIFAR10, Imagenette
    from torchvision.datasets.utils import extract_archive

    _require_space(output, SMALL_SET_SIZE)
    url, md5 = Imagenette._ARCHIVES["320px"]
    if name == "cifar10":
        url, md5 = CIFAR10.url, CIFAR10.tgz_md5
    archive = _obtain_archive(url, md5, archives, report)
    scratch = output / "unpack.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    report(f"unpacking {archive}")
    extract_archive(str(archive), str(scratch))
    for split in missing:
        if name == "cifar10":
            _write_cifar10(scratch, split, output, progress)
        else:
            _finish(scratch / archive.stem / split, output / split)
    shutil.rmtree(scratch)


def _write_cifar10(unpacked: Path, split: str, output: Path, progress: Progress) -> None:
    """Write CIFAR-10's pickled arrays as PNG files in class folders, named by their index."""
    from torchvision.datasets import CIFAR10

    partial = output / f"{split}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    images = CIFAR10(unpacked, train=split == "train")
    for label in images.classes:
        (partial / label).mkdir(parents=True)
    for index, (image, label) in enumerate(images):
        image.save(partial / images.classes[label] / f"{index:05}.png")
        progress(index + 1, len(images))
    _finish(partial, output / split)


def _obtain_archive(url: str, md5: str, folder: Path, report: ReportLine) -> Path:
    """The archive at a URL; downloaded to the folder unless it is there already."""
    from torchvision.datasets.utils import check_integrity, download_url

    archive = folder / url.rpartition("/")[2]
    if archive.exists():
        if not check_integrity(archive, md5):
            raise _damaged(archive, md5)
        return archive
    created = _create_folder(folder)
    scratch = folder / "download.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    report(f"downloading {url}")
    try:
        with _network_timeout():
            download_url(url, scratch, archive.name, md5)
        move_into_place(scratch / archive.name, archive)
    except (OSError, RuntimeError) as error:
        reason = end_sentence(getattr(error, "reason", error))
        raise DataError(
            f"{url} cannot be downloaded: {reason} Download it on another machine (md5 {md5}), "
            f"copy it to {folder} as {archive.name}, and run the same command again. It then works "
            "without network access."
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        _remove_if_empty(created)
    return archive


@contextlib.contextmanager
def _network_timeout() -> Iterator[None]:
    """Limit the wait for the network, for which torchvision sets no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
