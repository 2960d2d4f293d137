import shutil

import numpy as np
import pytest

from cspnet.data.loader import EvalBatches, TrainGroups, evaluation_batches, training_groups
from cspnet.errors import DataError
from cspnet.recipe.load import load_recipe
from cspnet.recipe.schema import Evaluate
from cspnet.sources import data_root
from cspnet.sources.folder import Digits, Folder, find_images
from tests.helpers import SMALL_GROUPS


def test_folder_reads_its_images(folder):
    source = data_root.open_training(str(folder))
    assert source.classes == ["apple", "bear", "cat"]
    assert len(source) == 36 and np.bincount(source.labels).tolist() == [12, 12, 12]
    for index in (0, 11, 12, 35):
        data, label = source.read(index)
        path = folder / "train" / source.name(index)
        assert data == path.read_bytes()
        assert source.classes[label] == path.parent.name


def test_nested_folders_unusual_names_and_stray_files(folder):
    deep = folder / "train" / "bear" / "two words" / "é"
    deep.mkdir(parents=True)
    shutil.copy(folder / "train" / "apple" / "0.jpg", deep / "Ünï.JPEG")
    (folder / "train" / "bear" / "notes.txt").write_text("x")
    (folder / "train" / ".hidden").mkdir()
    source = Folder(folder / "train")
    assert source.classes == ["apple", "bear", "cat"] and len(source) == 37
    assert source.read(24)[1] == 1 and source.name(24).endswith("Ünï.JPEG")


def test_numbered_classes_sort_as_strings(folder):
    for old, new in (("apple", "10"), ("bear", "2"), ("cat", "1")):
        (folder / "train" / old).rename(folder / "train" / new)
    assert Folder(folder / "train").classes == ["1", "10", "2"]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_set_by_data_root_or_by_its_folder(folder, name):
    (folder / "val").rename(folder / name)
    classes = ["apple", "bear", "cat"]
    for root in (folder, folder / name):
        assert len(data_root.open_validation(str(root), classes)) == 9


def test_digits_splits_are_disjoint():
    train, val = Digits(train=True), Digits(train=False)
    assert len(train) == 1438 and len(val) == 359
    assert set(train._indices).isdisjoint(val._indices)
    assert train.classes == val.classes == [str(digit) for digit in range(10)]


def recipe_for(folder, *overrides):
    return load_recipe(None, [f"data.root={folder}", *SMALL_GROUPS, *overrides])


def content(batch):
    return batch.images.numpy().tobytes(), batch.labels.tolist(), batch.unreadable


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stream_starts_at_any_step_with_any_number_of_workers(folder, workers):
    """36 images in batches of 8: steps 4 and 9 cross the end of an epoch."""
    recipe = recipe_for(folder, "schedule.steps=10")
    source = data_root.open_training(str(folder))
    whole = [content(b) for b in training_groups(source, recipe, 0, 0, False)]
    assert len(whole) == 20
    late = [content(b) for b in training_groups(source, recipe, 4, workers, False)]
    assert late == whole[8:]


def test_each_sample_is_decoded_once(folder, monkeypatch):
    recipe = recipe_for(folder, "mix.probability=0.9")
    source = data_root.open_training(str(folder))
    reads = []
    monkeypatch.setattr(source, "read", lambda i, read=source.read: (reads.append(i), read(i))[1])
    groups = TrainGroups(source, recipe)
    for group in range(2):
        groups[0, group]
    assert len(reads) == 8


def test_unreadable_image_is_replaced_by_the_next(folder):
    source = data_root.open_training(str(folder))
    with open(source.name(11), "wb") as file:  # the last apple; a bear replaces it
        file.write(b"\xff\xd8 torn")
    recipe = recipe_for(folder)
    groups = TrainGroups(source, recipe)
    batches = [groups[step, group] for step in range(5) for group in range(2)]  # > one epoch
    assert {i for batch in batches for i in batch.unreadable} == {11}
    again = [groups[step, group] for step in range(5) for group in range(2)]
    assert [content(b) for b in batches] == [content(b) for b in again]
    first_epoch = [label for b in batches for label in b.labels.tolist()][:36]
    assert np.bincount(first_epoch).tolist() == [11, 13, 12]


def test_consecutive_unreadable_images_count_once_per_position(folder):
    source = data_root.open_training(str(folder))
    for index in range(10):
        with open(source.name(index), "wb"):
            pass
    groups = TrainGroups(source, recipe_for(folder))
    batches = [groups[step, group] for step in range(4) for group in range(2)]
    assert sum(b.replaced for b in batches) <= 10 and max(b.replaced for b in batches) <= 4
    assert {i for b in batches for i in b.unreadable} == set(range(10))


def test_image_too_large_for_the_warp_is_unreadable(folder):
    import cv2
    import numpy

    source = data_root.open_training(str(folder))
    cv2.imwrite(source.name(0), numpy.zeros((2, 33_000, 3), numpy.uint8))
    batches = [TrainGroups(source, recipe_for(folder))[step, 0] for step in range(9)]
    assert {i for b in batches for i in b.unreadable} == {0}


def test_evaluation_yields_every_image_once(folder):
    source = data_root.open_validation(str(folder), ["apple", "bear", "cat"])
    batches = list(evaluation_batches(source, 4, 32, Evaluate(), workers=0, pin=False))
    assert [int(b.mask.sum()) for b in batches] == [4, 4, 1]
    labels = [int(label) for b in batches for label in b.labels[b.mask]]
    assert labels == source.labels.tolist()
    assert all(b.images.shape == (4, 32, 32, 3) for b in batches)


def test_unreadable_validation_image_is_counted_not_omitted(folder):
    source = data_root.open_validation(str(folder), ["apple", "bear", "cat"])
    with open(source.name(2), "wb"):
        pass
    batch = EvalBatches(source, 9, 32, Evaluate())[0]
    assert batch.unreadable == [2] and batch.mask.all() and batch.images[2].max() == 0


def test_image_deleted_during_training_is_unreadable(folder):
    source = data_root.open_training(str(folder))
    shutil.rmtree(folder / "train" / "cat")
    groups = TrainGroups(source, recipe_for(folder))
    batches = [groups[step, group] for step in range(5) for group in range(groups.recipe.groups)]
    assert {index for batch in batches for index in batch.unreadable} == set(range(24, 36))


SYSTEM = [
    *("@eaDir", "#recycle", "lost+found", "__MACOSX", "$RECYCLE.BIN", "@Recycle"),
    *("System Volume Information", ".ipynb_checkpoints", ".Trash-1000", "@eadir"),
]


@pytest.mark.parametrize("name", SYSTEM)
def test_system_folders_are_neither_classes_nor_read(folder, name, command):
    """Beside the class folders and inside them. `check` counts them."""
    for subfolder in ("train", "train/bear", "val/cat"):
        (folder / subfolder / name / "deeper").mkdir(parents=True)
        shutil.copy(
            folder / "val" / "cat" / "0.jpg", folder / subfolder / name / "deeper" / "x.jpg"
        )
        shutil.copy(folder / "val" / "cat" / "0.jpg", folder / subfolder / name / "y.jpg")
    (folder / name).mkdir()
    training, validation = data_root.open_parts(str(folder))
    assert training.classes == validation.classes == ["apple", "bear", "cat"]
    assert len(training) == 36 and len(validation) == 9
    assert len(find_images([str(folder / "val")])) == 9
    done = command("main", "check", folder, "-j", 0)
    assert done.returncode == 0, done.stdout
    ignored = [line for line in done.stdout.splitlines() if "operating system" in line]
    assert [line.rpartition(": ")[2] for line in ignored] == [f"2 × {name}", f"1 × {name}"]
    assert "train, 2 files or folders: " in ignored[0] and "val, 1 file or folder: " in ignored[1]


def test_system_files_are_counted_separately(folder):
    from cspnet.datasets.check import check_dataset

    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "notes.txt"):
        (folder / "train" / "bear" / name).touch()
    (folder / "train" / "Thumbs.db").touch()
    messages = [finding.message for finding in check_dataset(str(folder)).findings]
    (system,) = (text for text in messages if "operating system" in text)
    assert system.endswith("2 × Thumbs.db, 1 × .DS_Store, 1 × desktop.ini")
    (others,) = (text for text in messages if "no image suffix" in text)
    assert others.endswith("1 file: no image suffix; ignored: 1 × .txt")


def test_system_folders_in_a_tar_file_are_not_classes(folder):
    import io
    import tarfile

    shutil.rmtree(folder / "train")
    with tarfile.open(folder / "train.tar", "w") as tar:
        for name in ("apple/0.jpg", "@eaDir/apple/0.jpg", "bear/@eaDir/1.jpg", "bear/0.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    source = data_root.open_training(str(folder))
    assert source.classes == ["apple", "bear"] and len(source) == 2


def test_system_folder_is_not_reported_as_an_extra_level(folder):
    """A single class is still reported; a split with only a system folder is empty."""
    shutil.rmtree(folder / "val")
    (folder / "val" / "lost+found").mkdir(parents=True)
    with pytest.raises(DataError, match="is empty"):
        data_root.open_parts(str(folder))
