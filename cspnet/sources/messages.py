"""What is wrong with a data folder, told by the names in it: one message for each mistake.

A message says what and where, and what to do; docs/data.md lists them. An empty one means that the
mistake was not made. Names of images are looked at, never their bytes.
"""

import os
from collections import Counter
from pathlib import Path

from cspnet.recipe.schema import DIGITS
from cspnet.shell import command_line
from cspnet.sources import roots
from cspnet.sources.downloads import recognise
from cspnet.sources.names import count_and_names
from cspnet.sources.roots import SPLITS, VALIDATION_NAMES
from cspnet.sources.tree import SUFFIXES, class_folders, entries, folders, has_own_images, is_image
from cspnet.text import printable

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
# Data sets that `cspnet data` makes, and how many classes they have.
DOWNLOADABLE = {"imagenet": 1000, "imagenette": 10, "cifar10": 10}
HOLDS = "A data root holds train/ and val/, each with one folder per class"
GIVE = f"Give one with --data DIR (or data.root=DIR); --data {DIGITS} needs none"
IMAGES = ("image", "images", "img", "imgs", "jpegimages")  # names of folders, but of no class


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


def no_folder(path: Path, give: str = GIVE) -> str:
    """For a path that is given as a data folder and is none; `give` says what to give instead."""
    advice = f"{give}."
    if path.name in DOWNLOADABLE:
        advice += f" `{command_line('cspnet', 'data', path.name, '--to', 'DIR')}` makes it."
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


def no_training_folder(folder: Path) -> str:
    """For a data root without train/."""
    told = f"{folder} has no folder train/."
    if (folder / "train").is_dir():
        told = f"{folder / 'train'} is the folder of a class, not of the training set."
    return f"{told} {_instead(folder, ('train',), ('train',))}"


def no_validation(folder: Path) -> str:
    """For a data root with train/ and nothing to validate on."""
    names = ", ".join(f"{name}/" for name in VALIDATION_NAMES)
    hint = _instead(folder, VALIDATION_NAMES, ("val", "test", "dev", "eval"))
    return f"{folder} has train/ but none of {names}. {hint}"


def _instead(folder: Path, names: tuple[str, ...], alike: tuple[str, ...]) -> str:
    """What may be meant where a data root has none of `names`, and what to do."""
    for entry in entries(folder):
        if entry.name in names and entry.is_symlink() and not os.path.exists(entry.path):
            return f"{entry.name} is a link to {os.readlink(entry.path)}, which is not there."
        if entry.name in names and entry.is_file():
            return f"{entry.name} is a file; it must be a folder with one folder per class."
    if told := recognise(folder):
        return told
    inner = folders(folder)
    for name in inner:
        if set(names) & set(roots.split_names(folder / name)) and roots.is_root(folder / name):
            return f"Its folder {name}/ has one: give {folder / name}."
    for name in inner:
        part = roots.is_part(folder / name) or roots.is_split(folder / name)
        if part and name not in names and name.lower().startswith(alike):
            return f"Is it {name}/? Then rename it to {names[0]}/."
    here = Path(os.path.abspath(folder))
    if here.name in SPLITS and class_folders(folder):
        return f"It is a {here.name} folder itself: give the one above, {here.parent}."
    found = [name for name in class_folders(folder) if not roots.is_split(folder / name)]
    if found and names == ("train",) and "train" not in inner:
        return f"It has {count_and_names(found, 'class folder')} itself: move them into {folder / 'train'}."
    packed = [entry.name for entry in entries(folder) if entry.name.endswith(ARCHIVES)]
    if packed:
        how = "."
        if any(name.startswith("ILSVRC2012") for name in packed):
            how = f", with `{command_line('cspnet', 'data', 'imagenet', '--to', folder)}`."
        return f"It holds {count_and_names(packed, 'archive')}: unpack{how}"
    return f"{HOLDS}; found there: {listing(folder)}"


def two_validations(folder: Path, names: list[str]) -> str:
    """For a data root with more than one folder to validate on."""
    both = " and ".join(f"{name}/" for name in names)
    return f"{folder} has both {both}. Keep one; cspnet-eval takes either, by its own path."


def training_as_validation(folder: Path) -> str:
    """For a train folder that an evaluation is given, while there is one for validation."""
    here = Path(os.path.abspath(folder))
    for name in VALIDATION_NAMES:
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
            f"{folder} has {count_and_names(packed, 'archive')} and no class folder. Unpack each into a "
            "folder of its name; data/README.md says how for ImageNet."
        )
    if not names:
        return f"{folder} is empty. Put one folder per class into it."
    return f"{folder} has no class folder; found there: {listing(folder)}"


def nested(folder: Path, classes: list[str]) -> str:
    """For class folders that are a data root or one level too deep; else nothing."""
    named = roots.split_names(folder)
    if len(classes) > 1:
        if "train" in named and len(named) > 1:
            return (
                f"{folder} holds {' and '.join(f'{name}/' for name in named)}, not class folders: "
                "it is a whole data root. Give that one, or link its parts."
            )
        return ""
    only = folder / classes[0]
    if classes[0].lower() in IMAGES and has_own_images(only):
        return (
            f"{folder} is flat: its images are in {classes[0]}/, and it has no class folder. "
            "Sort them into one folder per class."
        )
    names = folders(only)
    if not names or has_own_images(only):
        return ""
    if roots.split_names(only):
        return f"{folder} has one folder only, with a data root in it: give {only}."
    return (
        f"{folder} has one folder only, {classes[0]}/, and {count_and_names(names, 'class folder')} in it: "
        f"a level too many. Move them up, into {folder}."
    )


def empty_classes(folder: Path, names: list[str]) -> str:
    """For class folders without an image."""
    told = f"{folder}: no image in {count_and_names(names, 'class folder')}"
    others = Counter(
        os.path.splitext(file)[1].lower() or "no suffix"
        for _, _, files in os.walk(folder / names[0])
        for file in files
    )
    if others:
        kinds = ", ".join(f"{count:,} × {kind}" for kind, count in others.most_common(3))
        return f"{told}, other files only ({kinds}). Read are {', '.join(SUFFIXES)}: convert them."
    return f"{told}. Add images ({', '.join(SUFFIXES[:3])} …) or remove the folder."
