"""Parquet files like those of the Hugging Face Hub, written by pyarrow."""

import json
import os
import pickle
import shutil
import sys

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cspnet.data.loader import TrainGroups, training_groups
from cspnet.errors import DataError
from cspnet.recipe.load import load_recipe
from cspnet.sources import data_root, parquet
from tests.conftest import picture
from tests.helpers import SMALL_GROUPS

NAMES = ["dog", "ant", "cat"]  # by number; not sorted, like ImageNet's on the Hub


def jpegs(count):
    pictures = (picture(seed, 70 + seed, 90) for seed in range(count))
    return [cv2.imencode(".jpg", image)[1].tobytes() for image in pictures]


def table(images, labels, names=NAMES, **columns):
    column = pa.array(
        [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    made = pa.table({"image": column, "label": pa.array(labels), **columns})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    if names:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        made = made.replace_schema_metadata(metadata)
    return made


@pytest.fixture
def root(tmp_path):
    """36 training images in two files with row groups of 5, and 7 for validation: bytes, labels."""
    data = jpegs(43)
    labels = [i * 7 % 3 for i in range(43)]
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for number, (start, end) in enumerate([(0, 23), (23, 36)]):
        name = f"train-{number:05d}-of-00002.parquet"
        pq.write_table(table(data[start:end], labels[start:end]), folder / name, row_group_size=5)
    pq.write_table(table(data[36:], labels[36:]), folder / "validation-00000-of-00001.parquet")
    return tmp_path / "set", data, labels


def test_rows_are_images_and_classes_are_sorted_by_name(root):
    folder, data, labels = root
    source = data_root.open_training(str(folder))
    assert source.classes == ["ant", "cat", "dog"] and len(source) == 36
    assert source.labels.dtype == np.int32
    for index in (0, 35, 4, 5, 22, 23, 24, 27, 28):
        want = source.classes.index(NAMES[labels[index]])
        assert source.read(index) == (data[index], want) and source.labels[index] == want
    assert source.name(22).endswith("train-00000-of-00002.parquet:22")
    assert source.name(23).endswith("train-00001-of-00002.parquet:0")
    validation = data_root.open_validation(str(folder), source.classes)
    assert [validation.read(i)[0] for i in range(7)] == data[36:]


def test_groups_do_not_depend_on_the_number_of_workers(root):
    """After the main process has read from it: a fork inherits neither readers nor lock."""
    recipe = load_recipe(None, [f"data.root={root[0]}", *SMALL_GROUPS, "schedule.steps=10"])
    source = data_root.open_training(str(root[0]))
    source.read(0)
    source._lock.acquire()  # as a thread may hold it at the time of the fork
    loaded = [list(training_groups(source, recipe, 7, workers, False)) for workers in (2, 1)]
    source._lock.release()
    loaded.append(list(training_groups(pickle.loads(pickle.dumps(source)), recipe, 7, 0, False)))
    for one, two, three in zip(*loaded, strict=True):
        assert (one.images == two.images).all() and (one.images == three.images).all()
        assert one.labels.tolist() == two.labels.tolist() == three.labels.tolist()


def test_group_reads_only_the_row_groups_it_needs(root, monkeypatch):
    """A run that resumes in the middle of an epoch starts at once."""
    recipe = load_recipe(None, [f"data.root={root[0]}", *SMALL_GROUPS, "schedule.steps=1000"])
    source = data_root.open_training(str(root[0]))
    opened, read = source._reader, []

    class Counting:
        def __init__(self, number):
            self.number = number

        def read_row_group(self, within, *rest, **options):
            read.append((self.number, within))
            return opened(self.number).read_row_group(within, *rest, **options)

    monkeypatch.setattr(source, "_reader", Counting)
    batch = TrainGroups(source, recipe)[900, 1]
    assert len(batch.labels) == 4 and 1 <= len(read) <= 4


def write(root, name="train-00000-of-00002.parquet", **changes):
    given = {"images": jpegs(3), "labels": [0, 1, 2]} | changes
    pq.write_table(table(**given), root / "data" / name)


def cut(root):
    file = root / "data" / "train-00001-of-00002.parquet"
    os.truncate(file, 500)


def no_image(root):
    pq.write_table(pa.table({"picture": ["a"], "label": [0]}), *first(root))


def first(root):
    return [root / "data" / "train-00000-of-00002.parquet"]


MISTAKES = [
    (cut, "train-00001-of-00002.parquet cannot be read as parquet"),
    (lambda root: first(root)[0].unlink(), "has 1 of 2 files train-00001-of-00002 …: number 00000"),
    (no_image, "has no column `image`; its columns are picture, label"),
    (
        lambda root: write(root, names=None),
        "column `label` contains numbers, and the file has no names",
    ),
    (lambda root: write(root, labels=[0, -1, 1]), "1 of 3 rows have no label, as in a test set"),
    (
        lambda root: write(root, labels=[0, 3, 1]),
        "a label is 3, but the ClassLabel has only names for 0 to 2",
    ),
    (lambda root: write(root, names=["a", "b", "c"]), "its columns differ from those of"),
]


def category_of_numbers(root):
    column = pa.array([0, 1, 2]).dictionary_encode()
    write(root, labels=column, names=None)


def twice(root):
    write(root, names=["crane", "bear", "crane"], labels=[0, 1, 0])


def words_with_a_class_label(root):
    write(root, labels=["dog", "ant", "cat"])


def not_utf8(root):
    words = pa.array([b"p\xeache", b"b", b"c"]).cast(pa.string(), safe=False)
    write(root, labels=words, names=None)


MISTAKES += [
    (category_of_numbers, "column `label` contains numbers, and the file has no names"),
    (twice, "the ClassLabel of column `label` has 1 name (crane) more than once"),
    (words_with_a_class_label, "column `label` has type string, not the numbers of its ClassLabel"),
    (
        lambda root: write(root, labels=[0.0, 1.0, 2.0]),
        "has type double, not the numbers of its Class",
    ),
    (lambda root: write(root, labels=[0.0, 1.0, 2.0], names=None), "not class names"),
    (not_utf8, "column `label` contains strings that are not UTF-8"),
]


@pytest.mark.parametrize(
    "mistake, expected", MISTAKES, ids=[expected[:30] for _, expected in MISTAKES]
)
def test_each_mistake_has_a_message(root, mistake, expected):
    folder = root[0]
    mistake(folder)
    with pytest.raises(DataError) as caught:
        data_root.open_training(str(folder))
    message = str(caught.value)
    assert expected in message and ".." not in message and "\n" not in message


WORDS = pa.array(["b", "a", "b"])


@pytest.mark.parametrize(
    "words",
    [
        WORDS,
        WORDS.cast(pa.large_string()),
        WORDS.cast(pa.string_view()),
        WORDS.dictionary_encode(),  # like a pandas column of type category
        WORDS.cast(pa.large_string()).dictionary_encode(),
    ],
    ids=lambda words: str(words.type),
)
def test_dictionary_encoded_strings_are_names(tmp_path, words):
    (tmp_path / "data").mkdir()
    write(tmp_path, "train.parquet", labels=words, names=None)
    source = data_root.open_training(str(tmp_path))
    assert source.classes == ["a", "b"] and source.labels.tolist() == [1, 0, 1]


def test_paths_of_any_bytes(root):
    odd = root[0].with_name(os.fsdecode(b"donn\xe9es"))
    root[0].rename(odd)
    source = data_root.open_training(str(odd))
    index = 30
    assert source.read(index)[0] == root[1][index]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(2)[0] == root[1][2]


def test_class_without_images_and_named_labels(tmp_path):
    (tmp_path / "data").mkdir()
    images = jpegs(3)
    write(tmp_path, "train.parquet", images=images, labels=[0, 0, 2])
    with pytest.raises(DataError, match="no image of 1 class \\(ant\\)"):
        data_root.open_training(str(tmp_path))
    write(tmp_path, "train.parquet", images=images, labels=["b", "a", "b"], names=None)
    source = data_root.open_training(str(tmp_path))
    assert source.classes == ["a", "b"] and source.labels.tolist() == [1, 0, 1]


def test_row_without_an_image_is_unreadable(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path, "train.parquet", images=[jpegs(1)[0], None, b""], labels=[0, 1, 2])
    source = data_root.open_training(str(tmp_path))
    for index in (1, 2):
        with pytest.raises(OSError, match=f"the row has no image: .*:{index}"):
            source.read(index)


def test_check_pack_and_index_accept_parquet(root, tmp_path, command):
    folder = root[0]
    done = command("main", "check", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: 36 images, 3 classes" in done.stdout
    done = command("main", "index", folder)
    assert "train: parquet files, which need no index" in done.stdout
    done = command("main", "pack", folder, "--output", tmp_path / "packed", "--short-side", "96")
    assert done.returncode == 0, done.stdout + done.stderr
    packed = data_root.open_training(str(tmp_path / "packed"))
    source = data_root.open_training(str(folder))
    assert packed.classes == source.classes
    assert sorted(packed.read(i) for i in range(36)) == sorted(source.read(i) for i in range(36))


def test_missing_pyarrow_is_reported(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        data_root.open_training(str(root[0]))
    shutil.rmtree(root[0] / "data")
    assert parquet.ParquetSet.by_name(root[0], ("train",)) is None
