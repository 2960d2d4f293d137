"""Data root or class folders? The contents decide if a class is named like a split."""

import shutil
from pathlib import Path

import pytest

from cspnet.datasets.check import check_dataset
from cspnet.errors import DataError
from cspnet.sources import data_root, roots
from tests.helpers import make_flat, make_kaggle, make_tiny_imagenet


def rename_class(root, name):
    for split in ("train", "val"):
        (root / split / "bear").rename(root / split / name)
    return sorted(["apple", name, "cat"])


def deepen(root, name):
    """Move the images of a class into a subfolder."""
    for split in ("train", "val"):
        (root / split / name).rename(root / "moving")
        (root / split / name).mkdir()
        (root / "moving").rename(root / split / name / "images")


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", roots.SPLITS)
def test_class_named_like_a_split(folder, name, deep, command, tmp_path):
    classes = rename_class(folder, name)
    if deep:
        deepen(folder, name)
    for split, count in (("train", 36), ("val", 9)):
        (read,) = check_dataset(str(folder / split)).splits
        assert read.name == split and sorted(read.classes) == classes
        assert sum(read.classes.values()) == count
        assert list(data_root.DataRoot(str(folder / split)).splits) == [split]
    assert len(data_root.open_validation(str(folder / "val"), classes)) == 9
    training, validation = data_root.open_parts(str(folder))
    assert training.classes == validation.classes == classes
    assert [split.name for split in check_dataset(str(folder)).splits] == ["train", "val"]
    with pytest.raises(DataError, match="It is a train folder itself: give its parent"):
        data_root.open_training(str(folder / "train"))
    with pytest.raises(DataError, match="contains the training images"):
        data_root.open_validation(str(folder / "train"), classes)
    done = command("main", "index", folder / "val")
    assert done.returncode == 0 and "val: class folders" in done.stdout
    done = command("main", "pack", folder / "train", "--output", tmp_path / "packed")
    assert done.returncode == 2 and "give its parent" in done.stderr
    done = command("main", "pack", folder, "--output", tmp_path / "packed", "--short-side", 64)
    assert done.returncode == 0, done.stderr
    assert data_root.open_training(str(tmp_path / "packed")).classes == classes


def test_two_classes_one_named_valid(folder):
    shutil.rmtree(folder / "train" / "cat")
    shutil.rmtree(folder / "val" / "cat")
    for split in ("train", "val"):
        (folder / split / "apple").rename(folder / split / "invalid")
        (folder / split / "bear").rename(folder / split / "valid")
    away = folder.with_name("away")
    (folder / "val").rename(away)
    for path in (folder / "train", away):
        assert check_dataset(str(path)).splits[0].classes.keys() == {"invalid", "valid"}
    assert len(data_root.open_validation(str(away), ["invalid", "valid"])) == 6


@pytest.mark.parametrize("split", ["train", "val"])
def test_flat_split_beside_other_splits_is_not_a_class(folder, split):
    """Kaggle's cats and dogs: train/cat.0.jpg, test/1.jpg."""
    make_flat(folder)
    (folder / "val").rename(folder / "moving")
    shutil.rmtree(folder / "train")
    (folder / "moving").rename(folder / split)
    shutil.copytree(folder / split, folder / "test1")
    assert roots.split_names(folder) == [split]
    report = check_dataset(str(folder))
    assert f"{folder / split} is flat" in " ".join(f.message for f in report.findings)


def test_data_root_among_class_folders_is_refused(folder):
    """Even with other folders beside its splits."""
    shutil.copytree(folder, folder.with_name("again") / "train")
    (folder.with_name("again") / "train" / "docs").mkdir()
    with pytest.raises(DataError, match="contains train/ and val/, not class folders"):
        data_root.open_training(str(folder.with_name("again")))


def test_check_and_messages_find_images_at_any_depth(folder):
    for name in ("apple", "bear", "cat"):
        deepen(folder, name)
    assert check_dataset(str(folder / "train")).splits[0].classes == dict.fromkeys(
        ("apple", "bear", "cat"), 12
    )
    with pytest.raises(DataError, match="It is a train folder itself"):
        data_root.open_training(str(folder / "train"))
    for path in (folder / "train").iterdir():
        path.rename(folder / path.name)
    (folder / "train").rmdir()
    with pytest.raises(DataError, match=r"It has 3 class folders \(apple, bear, cat\) itself"):
        data_root.open_training(str(folder))


def test_kaggle_is_recognised_at_every_level_with_its_solution_table(folder):
    make_kaggle(folder)
    inner = folder / "ILSVRC" / "Data" / "CLS-LOC"
    for open_source in (
        data_root.open_training,
        check_dataset,
        lambda root: data_root.open_validation(root, ["a"]),
    ):
        for top in (folder, folder / "ILSVRC", folder / "ILSVRC" / "Data"):
            with pytest.raises(DataError) as caught:
                open_source(str(top))
            assert str(caught.value).endswith(f"give its data root, {inner}.")
    assert len(data_root.open_training(str(inner))) == 36
    assert check_dataset(str(inner)).count("error") == 0
    shutil.rmtree(inner / "val")
    (inner / "val").mkdir()
    for number in (1, 2, 3):
        (inner / "val" / f"ILSVRC2012_val_{number:08}.JPEG").touch()
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n")
    for open_source in (
        lambda: data_root.open_training(str(folder)),
        lambda: data_root.open_parts(str(inner)),
        lambda: check_dataset(str(inner / "val")),
    ):
        with pytest.raises(DataError) as caught:
            open_source()
        message = str(caught.value)
        assert "val is flat: 3 validation images" in message and "data/README.md" in message
        assert f"according to {folder / 'LOC_val_solution.csv'}, which lists them" in message
    (finding,) = (f for f in check_dataset(str(inner)).findings if f.kind == "layout")
    assert "LOC_val_solution.csv" in finding.message


def test_tiny_imagenet_is_recognised_in_check_and_training(folder):
    make_tiny_imagenet(folder)
    for name in ("apple", "bear", "cat"):
        (folder / "train" / name).rename(folder / "moving")
        (folder / "train" / name).mkdir()
        (folder / "moving").rename(folder / "train" / name / "images")
        (folder / "train" / name / f"{name}_boxes.txt").touch()
    (folder / "wnids.txt").touch()
    report = check_dataset(str(folder))
    assert report.splits[0].classes == dict.fromkeys(("apple", "bear", "cat"), 12)
    (finding,) = (f for f in report.findings if f.kind == "layout")
    assert "Tiny-ImageNet" in finding.message
    with pytest.raises(DataError, match=r"val_annotations\.txt lists their classes"):
        data_root.open_parts(str(folder))


def test_commands_of_data_readme_sort_the_recognised_layouts(folder, tmp_path):
    """Run the shell blocks of data/README.md on Tiny-ImageNet's and Kaggle's flat val/."""
    import subprocess

    from tests.conftest import ROOT

    text = (ROOT / "data" / "README.md").read_text()
    blocks = {head: body for head, body in _blocks(text)}
    make_tiny_imagenet(folder)
    (folder / "val" / "val_annotations.txt").write_text(
        "".join(
            f"{p.name}\t{p.name.partition('_')[0]}\t0\t0\t9\t9\n"
            for p in sorted((folder / "val" / "images").iterdir())
        )
    )
    subprocess.run(["bash", "-ec", blocks["tiny"]], cwd=folder, check=True)
    assert len(data_root.open_validation(str(folder), ["apple", "bear", "cat"])) == 9

    inner = tmp_path / "kaggle" / "ILSVRC" / "Data" / "CLS-LOC"
    (inner / "val").mkdir(parents=True)
    shutil.copytree(folder / "train", inner / "train")
    lines = ["ImageId,PredictionString"]
    for number, image in enumerate(sorted((folder / "val").rglob("*.jpg")), 1):
        name = f"ILSVRC2012_val_{number:08}"
        shutil.copy(image, inner / "val" / f"{name}.JPEG")
        lines.append(f"{name},{image.parent.name} 1 2 3 4 {image.parent.name} 5 6 7 8 ")
    (tmp_path / "kaggle" / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    subprocess.run(["bash", "-ec", blocks["kaggle"]], cwd=tmp_path / "kaggle", check=True)
    training, validation = data_root.open_parts(str(inner))
    assert len(validation) == 9 and training.classes == ["apple", "bear", "cat"]


def _blocks(text):
    """The indented shell blocks of the two layouts, by layout."""
    for kind, mark in (("tiny", "val_annotations.txt"), ("kaggle", "LOC_val_solution.csv")):
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("    ") and mark in line)
        first = at
        while lines[first - 1].startswith("    "):
            first -= 1
        last = at
        while last + 1 < len(lines) and lines[last + 1].startswith("    "):
            last += 1
        yield kind, "\n".join(line[4:] for line in lines[first : last + 1])


def test_data_root_inside_the_given_folder_is_suggested(folder):
    assert roots.is_misplaced(folder.parent) and not roots.is_misplaced(folder / "train")
    with pytest.raises(DataError, match=r"Its folder data/ has one: give"):
        data_root.open_training(str(Path(folder.parent)))


@pytest.mark.parametrize("inside", [False, True])
def test_misnamed_split_is_suggested_even_if_flat(folder, inside):
    make_flat(folder)
    (folder / "val").rename(folder / "Val")
    if inside:
        (folder / "Val").rename(folder / "images")
        (folder / "Val").mkdir()
        (folder / "images").rename(folder / "Val" / "images")
    with pytest.raises(DataError, match="Is it Val/\\? Then rename it to val/"):
        data_root.open_parts(str(folder))


def test_class_whose_name_starts_like_a_split(folder):
    for split in ("train", "val"):
        (folder / split / "bear").rename(folder / split / "train_station")
        (folder / split / "cat").rename(folder / split / "valve")
    classes = ["apple", "train_station", "valve"]
    with pytest.raises(DataError, match="It is a train folder itself"):
        data_root.open_training(str(folder / "train"))
    (read,) = check_dataset(str(folder / "val")).splits
    assert sorted(read.classes) == classes
    (folder / "train").rename(folder.with_name("set"))
    with pytest.raises(DataError, match=r"It has 3 class folders \(apple, train_station, valve\)"):
        data_root.open_training(str(folder.with_name("set")))
