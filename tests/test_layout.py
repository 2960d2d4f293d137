"""A fixture for each mistake with a data folder. Each has its own message in docs/data.md."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from cspnet.datasets.check import check_dataset
from cspnet.errors import DataError
from cspnet.sources import data_root, names
from cspnet.sources.folder import find_images
from tests.conftest import ROOT
from tests.helpers import (
    CLASSES,
    make_flat,
    make_flat_in_one_folder,
    make_kaggle,
    make_tiny_imagenet,
)

ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


def train(root):
    return data_root.open_training(str(root))


def val(root, classes=CLASSES):
    return data_root.open_validation(str(root), classes)


def gone(root):
    shutil.rmtree(root)
    return train


def root_linked_to_nowhere(root):
    gone(root)
    root.symlink_to("gone")
    return train


def address(root):
    return lambda root: train("s3://bucket/imagenet")


def root_is_a_file(root):
    gone(root)
    root.write_text("x")
    return val


def zipped(root):
    shutil.make_archive(str(root), "zip", root)
    return lambda root: train(root.with_suffix(".zip"))


def closed_above(root):
    root.parent.chmod(0o600)
    return train


def closed(root):
    (root / "train" / "bear").chmod(0o000)
    return train


def another_folder(root):
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "val")
    (root / "notes").mkdir()
    return train


def nested_twice(root):
    return lambda root: train(root.parent)


def nested_twice_for_eval(root):
    return lambda root: val(root.parent)


def train_given_to_training(root):
    return lambda root: train(root / "train")


def classes_in_the_root(root):
    for name in CLASSES:
        (root / "train" / name).rename(root / name)
    shutil.rmtree(root / "train")
    return train


def train_given_to_eval(root):
    return lambda root: val(root / "train")


def train_named_otherwise(root):
    (root / "train").rename(root / "training")
    return train


def train_linked_to_nowhere(root):
    shutil.rmtree(root / "train")
    (root / "train").symlink_to("gone")
    return train


def train_is_a_file(root):
    shutil.rmtree(root / "train")
    (root / "train").write_text("train/apple/0.jpg 0\n")
    return train


def train_packed(root):
    shutil.rmtree(root / "train")
    (root / "ILSVRC2012_img_train.tar").touch()
    return train


def classes_packed(root):
    for name in CLASSES:
        shutil.rmtree(root / "train" / name)
        (root / "train" / f"{name}.tar").touch()
    return train


def move_down(root, split, name):
    (root / split).rename(root / "moving")
    (root / split).mkdir()
    (root / "moving").rename(root / split / name)


def train_in_train(root):
    move_down(root, "train", "train")
    return train


def root_in_train(root):
    move_down(root, "train", "train")
    shutil.copytree(root / "val", root / "train" / "val")
    return train


def no_val(root):
    shutil.rmtree(root / "val")
    return val


def val_named_otherwise(root):
    (root / "val").rename(root / "Val")
    return val


def two_vals(root):
    shutil.copytree(root / "val", root / "valid")
    return val


def flat(root):
    make_flat(root)
    return val


def empty_val(root):
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    return val


def labels_in_a_table(root):
    empty_val(root)
    (root / "val" / "labels.csv").touch()
    return val


def between(root):
    move_down(root, "val", "images")
    return val


def missing(root):
    shutil.rmtree(root / "val" / "bear")
    return val


def extra(root):
    shutil.copytree(root / "val" / "bear", root / "val" / "dog")
    return val


def empty_class(root):
    for file in (root / "val" / "bear").iterdir():
        file.unlink()
    return val


def other_files(root):
    for file in list((root / "val" / "bear").iterdir()):
        file.rename(file.with_suffix(".gif"))
    return val


def other_case(root):
    (root / "val" / "bear").rename(root / "val" / "Bear")
    return val


def numbers(root):
    for number, name in enumerate(CLASSES, 1):
        (root / "val" / name).rename(root / "val" / str(number))
    return val


def numbers_from_one(root):
    numbers(root)
    return lambda root: val(root, ["0", "1", "2"])


def another_data_set(root):
    return lambda root: val(root, ["plane", "ship"])


def other_normalization(root):
    for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):
        (root / split / "bear").rename(root / split / name)
    return lambda root: val(root, ["apple", "caf\u00e9", "cat"])


def no_train_but_a_class_of_that_name(root):
    for split in ("train", "val"):
        (root / split / "bear").rename(root / split / "train")
    return lambda root: train(root / "train")


def in_one_folder(root):
    make_flat_in_one_folder(root)
    return val


def tiny_imagenet(root):
    make_tiny_imagenet(root)
    return val


def kaggle(root):
    make_kaggle(root)
    return train


def flat_imagenet(root):
    empty_val(root)
    for number in (1, 2):
        (root / "val" / f"ILSVRC2012_val_{number:08}.JPEG").touch()
    return val


def another_number(root):
    return lambda root: data_root.open_validation(str(root), None, 5)


# A phrase of each message that no other message contains.
MISTAKES = {
    gone: "does not exist. Give one with --data DIR",
    root_linked_to_nowhere: "is a broken link to gone. Give one with --data DIR",
    address: "is a URL, not a local folder.",
    root_is_a_file: "is a file. Give one with --data DIR",
    zipped: "is an archive. Unpack it, and give the unpacked folder.",
    closed_above: "cannot be accessed: Permission denied",
    closed: "cannot be read: Permission denied. Check its permissions",
    another_folder: "has no folder train/. A data root contains train/ and val/",
    nested_twice: "has no folder train/. Its folder data/ has one: give",
    nested_twice_for_eval: "has only one folder, which is a data root: give",
    train_given_to_training: "has no folder train/. It is a train folder itself: give its parent",
    classes_in_the_root: "has no folder train/. It has 3 class folders (apple, bear, cat) itself: "
    "move them into",
    train_given_to_eval: "contains the training images, on which scores mean little",
    train_named_otherwise: "has no folder train/. Is it training/? Then rename it to train/.",
    train_linked_to_nowhere: "has no folder train/. train is a broken link to gone.",
    train_is_a_file: "has no folder train/. train is a file; it must be a folder with "
    "one folder per class.",
    train_packed: "has no folder train/. It contains 1 archive (ILSVRC2012_img_train.tar): unpack",
    classes_packed: "has 3 archives (apple.tar, bear.tar, cat.tar) and no class folder. "
    "Unpack each into a folder",
    train_in_train: "has only one folder, train/, with 3 class folders (apple, bear, cat) in it: "
    "one level too many.",
    root_in_train: "contains train/ and val/, not class folders: it is a complete data root.",
    no_val: "has train/ but none of val/, valid/, validation/. A data root contains",
    val_named_otherwise: "has train/ but none of val/, valid/, validation/. Is it Val/? "
    "Then rename it to val/.",
    two_vals: "has both val/ and valid/. Keep one",
    flat: "is flat: 9 images",
    empty_val: "is empty. Create one folder per class in it.",
    labels_in_a_table: "has no class folder; it contains: labels.csv",
    between: "has only one folder, images/, with 3 class folders (apple, bear, cat) in it: "
    "one level too many.",
    missing: "it lacks 1 class (bear). Folder names must be the class names of the training set.",
    extra: "it has 1 class (dog) that the network was not trained on. Folder names must be",
    empty_class: "no image in 1 class folder (bear). Add images",
    other_files: "no image in 1 class folder (bear), only other files (3 × .gif).",
    other_case: "Only case, spaces or leading zeros differ: 'Bear' instead of 'bear'.",
    numbers: "Numbers are not class names, and ImageNet's numbers do not follow the synset order",
    numbers_from_one: "One is numbered from 0, the other from 1: rename the folders.",
    another_data_set: "They have no class in common: do they belong to the same data set?",
    other_normalization: "Names that look the same differ in their Unicode normalization: "
    "cafe\\u0301 (NFD) instead of caf\\xe9 (NFC). Rename the folders: convmv",
    no_train_but_a_class_of_that_name: "train is the folder of a class, not of the training "
    "set. It is a train folder itself: give its parent",
    in_one_folder: "is flat: its images are in images/, and it has no class folder.",
    tiny_imagenet: "is the validation set of Tiny-ImageNet as in its archive: "
    "all images are in images/, and val_annotations.txt lists their classes.",
    kaggle: "is ImageNet from Kaggle: give its data root, ",
    flat_imagenet: "is flat: 2 validation images of ImageNet and no class folder.",
    another_number: "has 3 classes, but the network has 5",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_each_mistake_has_its_own_documented_message(folder, mistake):
    if mistake in (closed, closed_above) and ROOT_USER:
        pytest.skip("root may read everything")
    expected = MISTAKES[mistake]
    assert f"`{expected}" in (ROOT / "docs" / "data.md").read_text()
    open_source = mistake(folder)
    try:
        with pytest.raises(DataError) as caught:
            open_source(folder)
    finally:
        if mistake in (closed, closed_above):  # else pytest cannot remove the folder
            folder.parent.chmod(0o700)
            (folder / "train" / "bear").chmod(0o700)
    message = str(caught.value)
    assert expected in message and "\n" not in message
    assert not [other for other in MISTAKES.values() if other != expected and other in message]


def test_unreadable_folder_is_reported_and_not_treated_as_empty(folder, monkeypatch):
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "bear":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError) as caught:
        train(folder)
    assert MISTAKES[closed] in str(caught.value) and str(folder / "train/bear") in str(caught.value)


def test_links_to_a_parent_folder_terminate(folder):
    (folder / "train" / "apple" / "again").symlink_to("..")
    (folder / "train" / "bear" / "all").symlink_to(folder)
    (folder / "train" / "cat" / "more").symlink_to(folder / "val" / "cat")
    assert len(train(folder)) == 36 + 3


def test_fold_name_equates_similar_names():
    for one, other in (("Bear", "bear"), ("bear ", "bear"), ("01", "1"), ("é", "e\u0301")):
        assert names.fold_name(one) == names.fold_name(other)
    for one, other in (("c", "c++"), ("10", "1"), ("bear", "beer"), ("_", "-")):
        assert names.fold_name(one) != names.fold_name(other)


def test_names_of_any_bytes_are_printable():
    assert names.count_and_names(["é", "a\x1b[31m", "b\udcff"], "class").isprintable()


def test_nested_folders_in_classes_are_not_an_extra_level(folder):
    """A class folder may contain folders; only a single one without own images is suspicious."""
    (folder / "train" / "apple").rename(folder / "moving")
    (folder / "train" / "apple").mkdir()
    (folder / "moving").rename(folder / "train" / "apple" / "red")
    assert len(train(folder)) == 36


def test_data_commands_mention_neither_networks_nor_options(folder, command, tmp_path):
    """check, index and pack take their data as an argument and have no network."""
    shutil.copytree(folder / "val" / "bear", folder / "val" / "dog")
    shutil.rmtree(folder / "val" / "cat")
    shutil.make_archive(str(folder), "zip", folder)
    outputs = []
    for path in (folder, folder / "gone", folder.with_suffix(".zip"), folder.parent, "digit"):
        for line in (["check", path], ["index", path], ["pack", path, "--output", tmp_path / "to"]):
            done = command("main", *line)
            assert done.returncode in (1, 2) or line[0] == "index"
            outputs.append(done.stdout + done.stderr)
    every = "".join(outputs)
    assert "it has 1 class (dog) that train/ lacks" in every and "gone does not exist" in every
    for word in ("network", "--data", "data.root"):
        assert word not in every
    assert ".." not in every and ".:" not in every


def test_training_compares_the_splits_not_a_network(folder):
    shutil.copytree(folder / "val" / "bear", folder / "val" / "dog")
    with pytest.raises(DataError) as caught:
        data_root.open_parts(str(folder))
    assert "the validation classes are not those of train/ (3): it has 1 class (dog)" in str(
        caught.value
    )
    shutil.rmtree(folder / "val" / "dog")
    training, validation = data_root.open_parts(str(folder))
    assert training.classes == validation.classes == CLASSES


def test_names_that_differ_in_normalization_are_distinguishable():
    composed, combined = "caf\u00e9", "cafe\u0301"
    assert (
        names.count_and_names([combined, composed], "class") == "2 classes (cafe\\u0301, caf\\xe9)"
    )
    assert (
        names.count_and_names([composed, "b\u00e4r"], "class") == "2 classes (caf\u00e9, b\u00e4r)"
    )
    difference = names.class_differences([combined, "x"], [composed, "x"], names.TRAINING)
    assert (
        "lacks 1 class (caf\\xe9)" in difference
        and "has 1 class (cafe\\u0301) that train/" in difference
    )
    assert "--nfc" in difference
    assert "--nfd" in names.class_differences([composed], [combined], names.NETWORK)


def test_messages_contain_no_raw_control_characters(folder, capsys):
    """Whatever a path or name contains, the message escapes it and has one line."""
    odd = "b\x1b[31m\nr\udcff"
    (folder / "val" / "bear").rename(folder / "val" / odd)
    for open_source in (
        lambda: val(folder),
        lambda: train(folder / odd),
        lambda: find_images([str(folder / odd)]),
        lambda: val(folder / "val" / odd),
    ):
        with pytest.raises(DataError) as caught:
            open_source()
        message = str(caught.value)
        assert message.isprintable() and "b\\x1b[31m\\nr\\udcff" in message


@pytest.mark.parametrize(
    "mistake", [nested_twice, another_folder, missing, train_in_train, two_vals]
)
def test_message_about_the_current_folder_gives_its_path(folder, mistake, monkeypatch):
    """A bare `.` would give `..` at the end of a sentence and `.: ` at its start."""
    open_source = mistake(folder)
    monkeypatch.chdir(folder)
    if mistake == nested_twice:
        monkeypatch.chdir(folder.parent)
    for root in (".", "./", "train/.."):
        with pytest.raises(DataError) as caught:
            (train if mistake == nested_twice else open_source)(root)
        message = str(caught.value)
        assert str(folder.parent) in message and ".." not in message and ".:" not in message


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_check_mentions_neither_options_nor_networks(folder, mistake):
    if mistake in (closed, closed_above):
        pytest.skip("the folder would stay for ever")
    mistake(folder)
    lines = []
    for path in (folder, folder / "train", folder / "val", folder.parent):
        try:
            lines += [line for _, line in check_dataset(str(path)).lines()]
        except DataError as error:
            lines.append(str(error))
    for word in ("network", "--data", "data.root", "cspnet-eval", "score means"):
        allowed = mistake == two_vals and word == "cspnet-eval"  # it accepts either
        assert allowed or word not in "".join(lines).replace(str(folder), "")
