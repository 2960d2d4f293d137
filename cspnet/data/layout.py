"""What is wrong with a data folder, told by the names in it: one message for each mistake.

A message says what and where, and what to do; docs/data.md lists them. An empty one means that the
mistake was not made. Names of images are looked at, never their bytes.
"""

import os
import unicodedata
from collections import Counter
from pathlib import Path

from cspnet.errors import DataError
from cspnet.schema import DIGITS
from cspnet.shell import command

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
VALIDATION = ("val", "valid", "validation")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
# Data sets that `cspnet data` makes, and how many classes they have.
KNOWN = {"imagenet": 1000, "imagenette": 10, "cifar10": 10}
HOLDS = "A data root holds train/ and val/, each with one folder per class"


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image."""
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder and not hidden, by name. Raises DataError where it cannot be read."""
    try:
        found = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError as error:
        raise unreadable_folder(error) from None
    return sorted(found, key=lambda entry: entry.name)


def unreadable_folder(error: OSError) -> DataError:
    """For a folder that the system does not let us list."""
    return DataError(
        f"{error.filename} cannot be read: {error.strerror}. Give yourself the right to read it "
        "(chmod -R u+rX), or look whether the disk is mounted and well."
    )


def printable(name: str) -> str:
    """A name for people: it may hold any bytes, which a terminal should not get."""
    return name if name.isprintable() else ascii(name)


def some(names: list[str], noun: str) -> str:
    """A number of things, and the first of their names: `2 classes (bear, cat)`."""
    plural = noun if len(names) == 1 else noun + ("es" if noun.endswith("s") else "s")
    shown = ", ".join(map(printable, names[:5])) + " …" * (len(names) > 5)
    return f"{len(names):,} {plural} ({shown})"


def listing(folder: Path) -> str:
    """What is in a folder, in a few words."""
    names = [printable(entry.name) + "/" * entry.is_dir() for entry in entries(folder)]
    return ", ".join(names[:6]) + " …" * (len(names) > 6) or "nothing"


def address(root: str) -> str:
    """For an address in the network that is given as a data folder."""
    hub = "huggingface-cli download NAME --repo-type dataset --local-dir DIR"
    how = f"Download it first ({hub})" if root.startswith("hf://") else "Download it first"
    return (
        f"{root} is an address, not a folder on this machine's disks. {how}, and give the folder "
        "that it is in; `cspnet data` brings some known data sets."
    )


def no_folder(path: Path) -> str:
    """For a path that is given as a data folder and is none."""
    advice = f"Give one with --data DIR (or data.root=DIR); --data {DIGITS} needs none."
    if path.name in KNOWN:
        advice += f" `{command('cspnet', 'data', path.name, '--to', 'DIR')}` makes it."
    what = "is a file"
    try:
        os.stat(path)
    except FileNotFoundError:
        what = "does not exist"
        if path.is_symlink():
            what = f"is a link to {os.readlink(path)}, which is not there"
    except OSError as error:
        what = f"cannot be reached: {error.strerror}"
    if what == "is a file" and path.name.lower().endswith(ARCHIVES):
        what, advice = "is an archive", "Unpack it, and give the folder that comes out."
    return f"the data folder {path} {what}. {advice}"


def no_training(folder: Path) -> str:
    """For a data root without train/."""
    return f"{folder} has no folder train/. {_instead(folder, ('train',), ('train',))}"


def no_validation(folder: Path) -> str:
    """For a data root with train/ and nothing to validate on."""
    names = ", ".join(f"{name}/" for name in VALIDATION)
    hint = _instead(folder, VALIDATION, ("val", "test", "dev", "eval"))
    return f"{folder} has train/ but none of {names}. {hint}"


def _instead(folder: Path, names: tuple[str, ...], alike: tuple[str, ...]) -> str:
    """What may be meant where a data root has none of `names`, and what to do."""
    for entry in entries(folder):
        if entry.name in names and entry.is_symlink() and not os.path.exists(entry.path):
            return f"{entry.name} is a link to {os.readlink(entry.path)}, which is not there."
        if entry.name in names and entry.is_file():
            return f"{entry.name} is a file; it must be a folder with one folder per class."
    folders = [entry.name for entry in entries(folder) if entry.is_dir()]
    for name in folders:
        if (folder / name / names[0]).is_dir():
            return f"Its folder {name}/ has one: give {folder / name}."
    for name in folders:
        if name.lower().startswith(alike):
            return f"Is it {name}/? Then rename it to {names[0]}/."
    here = Path(os.path.abspath(folder))
    if here.name in ("train", *VALIDATION) and class_folders(folder):
        return f"It is a {here.name} folder itself: give the one above, {here.parent}."
    if names == ("train",) and (found := class_folders(folder)):
        return f"It has {some(found, 'class folder')} itself: move them into {folder / 'train'}."
    packed = [entry.name for entry in entries(folder) if entry.name.endswith(ARCHIVES)]
    if packed:
        how = "."
        if any(name.startswith("ILSVRC2012") for name in packed):
            how = f", with `{command('cspnet', 'data', 'imagenet', '--to', folder)}`."
        return f"It holds {some(packed, 'archive')}: unpack{how}"
    return f"{HOLDS}; found there: {listing(folder)}"


def class_folders(folder: Path) -> list[str]:
    """Names of the sub-folders with an image directly in them."""
    return [
        entry.name
        for entry in entries(folder)
        if entry.is_dir() and any(is_image(inner.name) for inner in entries(Path(entry.path)))
    ]


def two_validations(folder: Path, names: list[str]) -> str:
    """For a data root with more than one folder to validate on."""
    both = " and ".join(f"{name}/" for name in names)
    return f"{folder} has both {both}. Keep one; cspnet-eval takes either, by its own path."


def training_as_validation(folder: Path) -> str:
    """For a train folder that an evaluation is given, while there is one for validation."""
    here = Path(os.path.abspath(folder))
    for name in VALIDATION:
        if here.name == "train" and (here.parent / name).is_dir():
            return (
                f"{folder} holds the training images, on which a score means little: give "
                f"{here.parent / name}. To score them all the same, give a link of another name."
            )
    return ""


def no_classes(folder: Path) -> str:
    """For a folder that has no sub-folder."""
    names = [entry.name for entry in entries(folder)]
    flat = [name for name in names if is_image(name)]
    packed = [name for name in names if name.lower().endswith(ARCHIVES)]
    if flat:
        return (
            f"{folder} is flat: {len(flat):,} images ({flat[0]} …) and no class folder. "
            "Sort them into one folder per class; data/README.md says how for ImageNet's val."
        )
    if packed:
        return (
            f"{folder} has {some(packed, 'archive')} and no class folder. Unpack each into a "
            "folder of its name; data/README.md says how for ImageNet."
        )
    if not names:
        return f"{folder} is empty. Put one folder per class into it."
    return f"{folder} has no class folder; found there: {listing(folder)}"


def nested(folder: Path, classes: list[str]) -> str:
    """For a folder with one sub-folder, and the class folders in that one: a level too many."""
    if len(classes) > 1 and not set(classes) <= {"train", *VALIDATION}:
        return ""
    if len(classes) > 1:
        return (
            f"{folder} holds {' and '.join(f'{name}/' for name in classes)}, not class folders: "
            "it is a whole data root. Give that one, or link its parts."
        )
    only = folder / classes[0]
    names = [entry.name for entry in entries(only) if entry.is_dir()]
    if not names or any(is_image(entry.name) for entry in entries(only)):
        return ""
    if set(names) & {"train", *VALIDATION}:
        return f"{folder} has one folder only, with a data root in it: give {only}."
    return (
        f"{folder} has one folder only, {classes[0]}/, and {some(names, 'class folder')} in it: "
        f"a level too many. Move them up, into {folder}."
    )


def empty(folder: Path, names: list[str]) -> str:
    """For class folders without an image."""
    told = f"{folder}: no image in {some(names, 'class folder')}"
    if "__MACOSX" in names:
        return f"{told}. __MACOSX is left over from an archive: remove it."
    others = Counter(
        os.path.splitext(file)[1].lower() or "no suffix"
        for _, _, files in os.walk(folder / names[0])
        for file in files
    )
    if others:
        kinds = ", ".join(f"{count:,} × {kind}" for kind, count in others.most_common(3))
        return f"{told}, other files only ({kinds}). Read are {', '.join(SUFFIXES)}: convert them."
    return f"{told}. Add images ({', '.join(SUFFIXES[:3])} …) or remove the folder."


def differing(have: list[str], want: list[str]) -> str:
    """How class folders differ from the classes that they must be, and what to do; or nothing."""
    missing = [name for name in want if name not in set(have)]
    extra = [name for name in have if name not in set(want)]
    if not missing and not extra:
        return ""
    parts = []
    if missing:
        parts.append(f"it lacks {some(missing, 'class')}")
    if extra:
        parts.append(f"it has {some(extra, 'class')} that the network was not trained for")
    return f"{'; '.join(parts)}. {_cure(missing, extra, len(want))}"


def _cure(missing: list[str], extra: list[str], count: int) -> str:
    folded = {alike(name): name for name in missing}
    pairs = [(name, folded[alike(name)]) for name in extra if alike(name) in folded]
    if pairs:
        shown = ", ".join(f"{name!r} for {meant!r}" for name, meant in pairs[:3])
        return f"Only case, blanks or zeros differ: {shown}. Rename the folders."
    numbers = [int(name) for name in (*missing, *extra) if name.isdecimal()]
    if (
        len(missing) == len(extra) == 1
        and len(numbers) == 2
        and count == abs(numbers[0] - numbers[1])
    ):
        return (
            f"One is counted from {min(numbers)}, one from {min(numbers) + 1}: rename the folders."
        )
    if extra and all(name.isdecimal() for name in extra) and len(numbers) == len(extra):
        return (
            "Numbers are not names, and ImageNet's do not follow the order of the synsets: "
            "rename each folder to its class; data/README.md says how for ImageNet's val."
        )
    if len(missing) == count and extra:
        return "No class is in both: are these two parts of one data set?"
    return "Folder names must be the class names of the training set."


def alike(name: str) -> str:
    """Equal for names that a person may take for the same."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    folded = "".join(sign for sign in folded if not sign.isspace() and sign not in "_-")
    return str(int(folded)) if folded.isdecimal() else folded or name
