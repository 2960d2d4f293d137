"""Messages for data folders with a wrong layout, judged by names only.

Each message says what is wrong, where, and what to do; docs/data.md lists them. Functions that look
for a mistake return an empty message if there is none. The bytes of images are not read.
"""

import os
from collections import Counter
from pathlib import Path

from cspnet.recipe.schema import DIGITS
from cspnet.shell import command_line
from cspnet.sources import roots
from cspnet.sources.downloads import known_layout
from cspnet.sources.names import count_and_names
from cspnet.sources.roots import SPLITS, VALIDATION_NAMES
from cspnet.sources.tree import (
    IMAGE_SUFFIXES,
    class_folders,
    has_own_images,
    is_image,
    list_entries,
    list_folders,
)
from cspnet.text import printable

ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
# Data sets that cspnet can prepare, and their numbers of classes.
DOWNLOADABLE = {"imagenet": 1000, "imagenette": 10, "cifar10": 10}
ROOT_LAYOUT = "A data root contains train/ and val/, each with one folder per class"
GIVE_DATA = f"Give one with --data DIR (or data.root=DIR); --data {DIGITS} needs none"
IMAGE_FOLDERS = ("image", "images", "img", "imgs", "jpegimages")  # names of folders, not of classes


def folder_listing(folder: Path) -> str:
    """A short listing of a folder for a message: "it contains: a/, b.txt"."""
    names = [printable(entry.name) + "/" * entry.is_dir() for entry in list_entries(folder)]
    shown = ", ".join(names[:6]) + " …" * (len(names) > 6) or "nothing"
    return f"it contains: {shown}"


def url_as_folder(root: str) -> str:
    """For a URL given as a data folder."""
    hub = "hf download OWNER/NAME --repo-type dataset --local-dir DIR"
    how = f"Download it first ({hub})" if root.startswith("hf://") else "Download it first"
    return (
        f"{root} is a URL, not a local folder. {how}, and give the folder with the download; "
        "`cspnet prepare` downloads well-known data sets."
    )


def not_a_folder(path: Path, give: str = GIVE_DATA) -> str:
    """For a data folder that is not a folder; `give` says how to give another one."""
    advice = f"{give}."
    if path.name in DOWNLOADABLE:
        command = command_line("cspnet", "prepare", path.name, "--output", "DIR")
        advice += f" To create it: `{command}`."
    what = "is a file"
    try:
        os.stat(path)
    except FileNotFoundError:
        what = "does not exist"
        if path.is_symlink():
            what = f"is a broken link to {os.readlink(path)}"
    except OSError as error:
        what = f"cannot be accessed: {error.strerror}"
    if what == "is a file" and path.name.lower().endswith(ARCHIVES):
        what, advice = "is an archive", "Unpack it, and give the unpacked folder."
    return f"the data folder {path} {what}. {advice}"


def no_training_folder(folder: Path) -> str:
    """For a data root without train/."""
    message = f"{folder} has no folder train/."
    if (folder / "train").is_dir():
        message = f"{folder / 'train'} is the folder of a class, not of the training set."
    return f"{message} {_alternative(folder, ('train',), ('train',))}"


def no_validation_folder(folder: Path) -> str:
    """For a data root with train/, but without validation images."""
    names = ", ".join(f"{name}/" for name in VALIDATION_NAMES)
    alternative = _alternative(folder, VALIDATION_NAMES, ("val", "test", "dev", "eval"))
    return f"{folder} has train/ but none of {names}. {alternative}"


def _alternative(folder: Path, names: tuple[str, ...], prefixes: tuple[str, ...]) -> str:
    """What to do with a data root that has none of `names`.

    A folder whose name starts with one of `prefixes` may be the missing one.
    """
    for entry in list_entries(folder):
        if entry.name in names and entry.is_symlink() and not os.path.exists(entry.path):
            return f"{entry.name} is a broken link to {os.readlink(entry.path)}."
        if entry.name in names and entry.is_file():
            return f"{entry.name} is a file; it must be a folder with one folder per class."
    if message := known_layout(folder):
        return message
    inner = list_folders(folder)
    for name in inner:
        split_names = roots.split_names(folder / name)
        if set(names) & set(split_names) and roots.is_data_root(folder / name):
            return f"Its folder {name}/ has one: give {folder / name}."
    for name in inner:
        is_split = roots.is_split(folder / name) or roots.has_split_name(folder / name)
        if is_split and name not in names and name.lower().startswith(prefixes):
            return f"Is it {name}/? Then rename it to {names[0]}/."
    absolute = Path(os.path.abspath(folder))
    if absolute.name in SPLITS and class_folders(folder):
        return f"It is a {absolute.name} folder itself: give its parent, {absolute.parent}."
    classes = [name for name in class_folders(folder) if not roots.has_split_name(folder / name)]
    if classes and names == ("train",) and "train" not in inner:
        count = count_and_names(classes, "class folder")
        return f"It has {count} itself: move them into {folder / 'train'}."
    archives = [entry.name for entry in list_entries(folder) if entry.name.endswith(ARCHIVES)]
    if archives:
        how = "."
        if any(name.startswith("ILSVRC2012") for name in archives):
            how = f", with `{command_line('cspnet', 'prepare', 'imagenet', '--output', folder)}`."
        return f"It contains {count_and_names(archives, 'archive')}: unpack{how}"
    return f"{ROOT_LAYOUT}; {folder_listing(folder)}"


def several_validation_folders(folder: Path, names: list[str]) -> str:
    """For a data root with more than one validation folder."""
    both = " and ".join(f"{name}/" for name in names)
    return f"{folder} has both {both}. Keep one; cspnet-eval accepts either by its own path."


def training_as_validation(folder: Path) -> str:
    """For a train folder given for an evaluation although its data root has a validation folder."""
    absolute = Path(os.path.abspath(folder))
    for name in VALIDATION_NAMES:
        if absolute.name == "train" and (absolute.parent / name).is_dir():
            return (
                f"{folder} contains the training images, on which scores mean little: give "
                f"{absolute.parent / name}. To evaluate them anyway, give a link with another name."
            )
    return ""


def no_class_folders(folder: Path) -> str:
    """For a folder without sub-folders."""
    names = [entry.name for entry in list_entries(folder)]
    images = [name for name in names if is_image(name)]
    archives = [name for name in names if name.lower().endswith(ARCHIVES)]
    if images:
        return (
            f"{folder} is flat: {len(images):,} images ({images[0]} …) and no class folder. "
            "Sort them into one folder per class; data/README.md says how for ImageNet's val."
        )
    if archives:
        count = count_and_names(archives, "archive")
        return (
            f"{folder} has {count} and no class folder. Unpack each into a folder of its name; "
            "data/README.md says how for ImageNet."
        )
    if not names:
        return f"{folder} is empty. Create one folder per class in it."
    return f"{folder} has no class folder; {folder_listing(folder)}"


def wrong_level(folder: Path, classes: list[str]) -> str:
    """For "class folders" that are the splits of a data root, or one level too high."""
    split_names = roots.split_names(folder)
    if len(classes) > 1:
        if "train" in split_names and len(split_names) > 1:
            return (
                f"{folder} contains {' and '.join(f'{name}/' for name in split_names)}, not class "
                "folders: it is a complete data root. Give that one, or link its folders."
            )
        return ""
    only = folder / classes[0]
    if classes[0].lower() in IMAGE_FOLDERS and has_own_images(only):
        return (
            f"{folder} is flat: its images are in {classes[0]}/, and it has no class folder. "
            "Sort them into one folder per class."
        )
    names = list_folders(only)
    if not names or has_own_images(only):
        return ""
    if roots.split_names(only):
        return f"{folder} has only one folder, which is a data root: give {only}."
    count = count_and_names(names, "class folder")
    return (
        f"{folder} has only one folder, {classes[0]}/, with {count} in it: "
        f"one level too many. Move them up, into {folder}."
    )


def empty_classes(folder: Path, names: list[str]) -> str:
    """For class folders without images."""
    message = f"{folder}: no image in {count_and_names(names, 'class folder')}"
    others = Counter(
        os.path.splitext(file)[1].lower() or "no suffix"
        for _, _, files in os.walk(folder / names[0])
        for file in files
    )
    if others:
        kinds = ", ".join(f"{count:,} × {kind}" for kind, count in others.most_common(3))
        return (
            f"{message}, only other files ({kinds}). Supported are {', '.join(IMAGE_SUFFIXES)}: "
            "convert them."
        )
    return f"{message}. Add images ({', '.join(IMAGE_SUFFIXES[:3])} …) or remove the folder."
