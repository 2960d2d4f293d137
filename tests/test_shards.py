"""Images in tar files: the same stream as from folders, and a message for each mistake."""

import io
import json
import os
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cspnet.data.loader import TrainGroups, evaluation_batches, training_groups
from cspnet.datasets.check import check_dataset
from cspnet.errors import DataError
from cspnet.recipe.load import load_recipe
from cspnet.recipe.schema import Evaluate
from cspnet.runtime.options import RunOptions
from cspnet.sources import data_root, tar_index, tar_members, tar_set
from cspnet.sources.folder import Folder
from cspnet.train import loop
from tests.conftest import ROOT
from tests.helpers import CLASSES, SMALL_GROUPS


def put(tar, name, data=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write_tar(file, *entries):
    with tarfile.open(file, "w") as tar:
        for name, data in entries:
            put(tar, name, data)
    return file


def images(split_folder):
    """Paths of the images of a split, in the order of class folders."""
    source = Folder(split_folder)
    return [Path(source.name(index)) for index in range(len(source))]


def save_index(root):
    """Build and save the index, as `cspnet index` does."""
    for location in data_root.DataRoot(str(root)).splits.values():
        if isinstance(location, tar_set.TarSet):
            tar_set.TarSource(location, save=True)


def in_shards(paths, target, entries, count=3, prefix=""):
    """Distribute images over tar files in a shuffled order."""
    target.mkdir(exist_ok=True)
    numbered = list(enumerate(paths))
    random.Random(0).shuffle(numbered)
    for number in range(count):
        with tarfile.open(target / f"{prefix}{number:06d}.tar", "w") as tar:
            for index, path in numbered[number::count]:
                for name, data in entries(index, path):
                    put(tar, name, data)


def as_class_folders(index, path):
    yield f"./{path.parent.name}/{path.name}", path.read_bytes()


def as_train_below_train(index, path):
    yield f"train/{path.parent.name}/{path.name}", path.read_bytes()


def as_named_samples(index, path):
    yield f"{index:04d}.cls", f"{path.parent.name}\n".encode()
    yield f"{index:04d}.jpg", path.read_bytes()
    yield f"{index:04d}.seg.png", b"a further field"


def as_numbered_samples(index, path):
    yield f"{index:04d}.jpg", path.read_bytes()
    yield f"{index:04d}.cls", b"%d" % ["cat", "apple", "bear"].index(path.parent.name)


def as_samples_with_json(index, path):
    label = ["cat", "apple", "bear"].index(path.parent.name)
    note = {"label": label} if index % 2 else {"class": path.parent.name, "label": "x"}
    yield f"a/{index:04d}.json", json.dumps(note).encode()
    yield f"a/{index:04d}.JPEG", path.read_bytes()


LAYOUTS = [
    *(as_class_folders, as_train_below_train, as_named_samples),
    *(as_numbered_samples, as_samples_with_json),
]


def sharded(folder, entries, listed="cat\napple\nbear\n"):
    """A data root whose training images are those of another root, in tar files."""
    root = folder.parent / f"sharded-{entries.__name__}"
    in_shards(images(folder / "train"), root.parent / "shards", entries)
    root.mkdir()
    (root.parent / "shards").rename(root / "train")
    if entries in (as_numbered_samples, as_samples_with_json):
        (root / "train" / "classes.txt").write_text(listed)
    (root / "val").symlink_to(folder / "val")
    return root


def recipe_for(root):
    return load_recipe(None, [f"data.root={root}", *SMALL_GROUPS, "schedule.steps=10"])


def content(batch):
    return batch.images.numpy().tobytes(), batch.labels.tolist(), batch.unreadable


@pytest.mark.parametrize("entries", LAYOUTS)
def test_tar_stream_equals_folder_stream(folder, entries):
    root = sharded(folder, entries)
    plain, source = data_root.open_training(str(folder)), data_root.open_training(str(root))
    assert isinstance(source, tar_set.TarSource) and len(source) == 36
    assert source.classes == plain.classes == CLASSES
    assert source.labels.dtype == np.int32 and source.labels.tolist() == plain.labels.tolist()
    assert all(source.read(index) == plain.read(index) for index in range(36))
    recipe = recipe_for(root)
    one, other = TrainGroups(plain, recipe), TrainGroups(source, recipe)
    for step in range(9):  # two epochs
        assert content(one[step, step % 2]) == content(other[step, step % 2])


def test_resuming_reads_only_the_images_of_the_step(folder, monkeypatch):
    """A run that resumes within a shard starts at once, however large the data set is."""
    root = sharded(folder, as_named_samples)
    save_index(root)
    recipe, read, pread = recipe_for(root), [], os.pread
    monkeypatch.setattr(os, "pread", lambda *given: (read.append(given[1]), pread(*given))[1])
    source = data_root.open_training(str(root))
    assert read == [], "with a saved index no header is read"
    images = TrainGroups(source, recipe)[900, 1].labels
    assert len(read) == len(images) == 4
    assert set(read) <= set(source._index.sizes.tolist())


def test_workers_share_the_open_files_of_the_main_process(folder):
    source = data_root.open_training(str(sharded(folder, as_named_samples)))
    recipe = recipe_for(folder)
    source.read(0)
    want = [content(b) for b in training_groups(source, recipe, 0, 0, False)]
    assert want == [content(b) for b in training_groups(source, recipe, 0, 2, False)]
    again = pickle.loads(pickle.dumps(source))
    assert again.read(35) == source.read(35) and again.name(35) == source.name(35)


def test_run_on_tar_files_has_the_losses_of_the_folder(tiny, folder, tmp_path):
    losses = []
    for root in (folder, sharded(folder, as_class_folders), sharded(folder, as_named_samples)):
        short = ("schedule.steps=4", "save_every=100", "data.normalize=imagenet")
        recipe = tiny(f"data.root={root}", "model.classes=3", *short)
        output = tmp_path / f"run-{len(losses)}"
        loop.train(recipe, RunOptions(output, device="cpu", workers=0), Console(quiet=True))
        lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        losses.append([(line["step"], line.get("loss")) for line in lines])
    assert len(losses[0]) > 4 and losses[0] == losses[1] == losses[2]


def test_order_equals_folder_order_for_any_names(folder):
    names = ("x.jpg", "X.JPEG", "x-1.png", "x/1.jpg", "x.y/é.jpg", "y.v2.jpg", "b\udcff.jpg")
    for name in ("Bear", "a-b", "a", "a b", "é", "10", "9"):
        for path in names:
            file = folder / "train" / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f"{name}/{path}".encode("utf-8", "replace"))
    root = folder.parent / "packed"
    root.mkdir()
    with tarfile.open(root / "train.tar", "w") as tar:
        tar.add(folder / "train", "train")
    plain, source = data_root.open_training(str(folder)), data_root.open_training(str(root))
    assert source.classes == plain.classes and source.labels.tolist() == plain.labels.tolist()
    assert len(source) == 36 + 49
    for index in range(len(plain)):
        assert source.read(index) == plain.read(index)
        below = os.path.relpath(plain.name(index), folder / "train")
        assert source.name(index) == f"{root}/train.tar:{below}"


def test_split_tar_files_in_the_root_and_val_in_any_form(folder, capsys):
    root = folder.parent / "flat"
    in_shards(images(folder / "train"), root, as_class_folders, 2, "train-")
    in_shards(images(folder / "val"), root, as_named_samples, 1, "valid_")
    val = data_root.open_validation(str(root), CLASSES)
    assert len(data_root.open_training(str(root))) == 36 and len(val) == 9
    assert not list(root.glob("*.cspnet"))  # a run writes nothing next to its data
    save_index(root)
    assert {file.name for file in root.glob("*.cspnet")} == {
        "train.index.cspnet",
        "valid.index.cspnet",
    }
    in_shards(images(folder / "val"), root / "validation", as_class_folders, 1)
    assert len(data_root.open_validation(str(root / "validation"), CLASSES)) == 9
    batches = evaluation_batches(val, 4, 32, Evaluate(), 0, False)
    assert sum(int(batch.mask.sum()) for batch in batches) == 9


def test_unpacked_folder_takes_precedence_over_its_tar_file(folder):
    for name in ("train.tar", "val.tar", "train/apple.tar", "train/bear.tar"):
        (folder / name).write_bytes(b"x")
    assert isinstance(data_root.open_training(str(folder)), Folder)
    assert isinstance(data_root.open_validation(str(folder), CLASSES), Folder)


def test_hidden_and_non_image_members_are_ignored(folder):
    root = folder.parent / "one"
    image = images(folder / "train")[0].read_bytes()
    (root / "train").mkdir(parents=True)
    write_tar(
        root / "train" / "a.tar",
        *(("apple/1.jpg", image), ("apple/._1.jpg", b"x"), (".hidden/1.jpg", b"x")),
        *(("bear/1.jpg", image), ("bear/notes.txt", b"x"), ("bear/1.json", b'{"x": [1]}')),
        *(("apple/2.json", b'{"label": '), ("apple/2.jpg", image)),
    )
    source = data_root.open_training(str(root))
    assert source.classes == ["apple", "bear"] and len(source) == 3


# The index.


def scans(monkeypatch):
    """Count the tar files whose headers are read."""
    done, scan = [], tar_members.scan_tar
    monkeypatch.setattr(
        tar_members, "scan_tar", lambda file: (done.append(file.name), scan(file))[1]
    )
    return done


def test_index_is_rebuilt_when_a_tar_file_changes(folder, monkeypatch, capsys):
    root = sharded(folder, as_named_samples)
    done = scans(monkeypatch)
    first = data_root.open_training(str(root))
    assert len(done) == 3 and "headers of its tar files (3)" in capsys.readouterr().err
    save_index(root)
    done.clear(), capsys.readouterr()
    again = data_root.open_training(str(root))
    assert not done and capsys.readouterr().err == ""
    assert [first.name(i) for i in range(36)] == [again.name(i) for i in range(36)]
    os.utime(root / "train" / "000001.tar", ns=(1, 1))
    data_root.open_training(str(root))
    assert len(done) == 3 and "does not match the tar files" in capsys.readouterr().err
    (root / "train" / "000001.tar").unlink()
    save_index(root)
    assert len(data_root.open_training(str(root))) == 24 and len(done) == 5
    (root / "train" / "classes.txt").write_text("\n".join(CLASSES))
    save_index(root)
    assert len(data_root.open_training(str(root))) == 24 and len(done) == 7


def spoil(file, **arrays):
    with np.load(file) as content:
        arrays = {**content, **arrays}
    with open(file, "wb") as stream:
        np.savez(stream, **arrays)


def test_invalid_index_is_rebuilt(folder, monkeypatch, tmp_path, capsys):
    root = sharded(folder, as_named_samples)
    want = data_root.open_training(str(root)).labels.tolist()
    save_index(root)
    file = root / "train" / "index.cspnet"
    whole, done = file.read_bytes(), scans(monkeypatch)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    spoilers = [
        lambda: file.write_bytes(b""),
        lambda: file.write_bytes(whole[:-100]),
        lambda: file.write_bytes(whole[:200] + bytes(50) + whole[250:]),
        lambda: file.write_bytes(pickle.dumps(Evil())),
        lambda: np.save(file.open("wb"), np.arange(3)),
        lambda: spoil(file, head=np.array([Evil()], dtype=object)),
        lambda: spoil(file, labels=np.full(36, 3, np.int32)),
        lambda: spoil(file, labels=np.zeros(36, np.float32)),
        lambda: spoil(file, shards=np.full(36, -1, np.int32)),
        lambda: spoil(file, offsets=np.full(36, 2**62)),
        lambda: spoil(file, sizes=np.full(36, -1)),
        lambda: spoil(file, sizes=np.full(35, 1)),
        lambda: spoil(file, ends=np.arange(36)),
    ]
    for number, make in enumerate(spoilers, 1):
        file.write_bytes(whole)
        make()
        assert data_root.open_training(str(root)).labels.tolist() == want
        assert len(done) == 3 * number and "building it again" in capsys.readouterr().err
    assert not (tmp_path / "evil").exists()
    assert not [name for name in os.listdir(root / "train") if name.startswith(".")]


def test_index_that_cannot_be_saved_is_kept_in_memory(folder, monkeypatch, capsys):
    root = sharded(folder, as_named_samples)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    save_index(root)
    warning = "cannot be saved (Read-only file system): the index will be built at each start"
    assert warning in capsys.readouterr().err and len(data_root.open_training(str(root))) == 36
    assert sorted(os.listdir(root / "train")) == ["000000.tar", "000001.tar", "000002.tar"]


def test_pickled_source_is_a_few_arrays(folder):
    source = data_root.open_training(str(sharded(folder, as_class_folders)))
    index = source._index
    assert isinstance(index.block, bytes)
    assert all(isinstance(getattr(index, name), np.ndarray) for name in tar_index.INDEX_DTYPES)


# Damage.


def test_truncated_tar_file_is_named(folder):
    root = sharded(folder, as_named_samples)
    file = root / "train" / "000001.tar"
    whole = file.read_bytes()
    with tarfile.open(file) as tar:
        end = max(member.offset_data + member.size for member in tar) // 512 * 512 + 512
    for length in {*range(512, end, 5 * 512), 1000, end - 100, end, end + 512 - 1}:
        file.write_bytes(whole[:length])
        with pytest.raises(tar_members.TarError) as caught:
            data_root.open_training(str(root))
        assert "train: 000001.tar: truncated at byte " in str(caught.value), length
    file.write_bytes(whole[: end + 512])  # one block of the two end marks
    assert len(data_root.open_training(str(root))) == 36


def test_image_beyond_the_end_of_its_file_is_unreadable(folder):
    root = sharded(folder, as_named_samples)
    source = data_root.open_training(str(root))
    os.truncate(root / "train" / "000001.tar", 3000)
    bad = set()
    for index in range(36):
        try:
            source.read(index)
        except OSError as error:
            assert "ends within the image" in str(error) and "000001.tar:" in str(error)
            bad.add(index)
    assert 10 < len(bad) <= 12
    groups = TrainGroups(source, recipe_for(root))
    unreadable = {
        i for step in range(9) for group in (0, 1) for i in groups[step, group].unreadable
    }
    assert unreadable == bad
    source._index.sizes[0] = tar_set.MAX_IMAGE_BYTES + 1
    with pytest.raises(OSError, match="File too large"):
        source.read(0)


def test_more_tar_files_than_kept_descriptors(folder, monkeypatch):
    monkeypatch.setattr(tar_set, "MAX_OPEN", 1)
    source = data_root.open_training(str(sharded(folder, as_named_samples)))
    plain = data_root.open_training(str(folder))
    before = len(os.listdir("/proc/self/fd"))
    assert all(source.read(index) == plain.read(index) for index in range(36))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del source
    assert len(os.listdir("/proc/self/fd")) == before


def test_damaged_headers_give_an_error_or_fewer_images(folder):
    root = sharded(folder, as_class_folders)
    file = root / "train" / "000000.tar"
    whole, rng = file.read_bytes(), random.Random(1)
    with tarfile.open(file) as tar:
        offsets = [member.offset for member in tar]
    refused = 0
    for trial in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 3])):
            start = rng.choice(offsets) + rng.choice([0, 100, 124, 148, 156, 257])
            damaged[start + rng.randrange(12)] = rng.randrange(256)
        if trial % 2:  # like an attacker: with valid checksums
            for offset in offsets:
                block = damaged[offset : offset + 512]
                total = sum(block[:148]) + 256 + sum(block[156:])
                damaged[offset + 148 : offset + 156] = b"%06o\0 " % total
        file.write_bytes(damaged)
        try:
            source = data_root.open_training(str(root))
            [source.read(index) for index in range(len(source))]
        except DataError:
            refused += 1
    assert refused > 100


# Mistakes, each with its own message, which docs/data.md quotes.


def train(root):
    return data_root.open_training(str(root))


def val(root):
    return data_root.open_validation(str(root), CLASSES)


def only(root, *entries):
    """A training set in one tar file."""
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    return write_tar(root / "train" / "0.tar", *entries)


def sound(root, *further):
    return only(root, ("apple/0.jpg", b"x"), ("bear/0.jpg", b"x"), *further)


def append(root, name, **attributes):
    with tarfile.open(sound(root), "a") as tar:
        put(tar, name, **attributes)
    return train


def both_kinds(root):
    write_tar(root / "train" / "0.tar", ("apple/0.jpg", b"x"))
    return train


def folder_and_file(root):
    write_tar(root / "train-0.tar", ("apple/0.jpg", b"x"))
    return train


def part_of_tar_files_given(root):
    sound(root)
    return lambda root: train(root / "train")


def no_val(root):
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "val")
    write_tar(root / "train.tar", ("apple/0.jpg", b"x"))
    return val


def linked_to_nowhere(root):
    sound(root)
    (root / "train" / "1.tar").symlink_to("gone")
    return train


def pipe(root):
    sound(root)
    os.mkfifo(root / "train" / "1.tar")
    return train


def cut(root):
    os.truncate(sound(root), 1024)
    return train


def empty(root):
    sound(root)
    (root / "train" / "1.tar").touch()
    return train


def header_damaged(root):
    file = sound(root)
    data = bytearray(file.read_bytes())
    data[1024] ^= 1
    file.write_bytes(data)
    return train


def joined(root):
    file = sound(root)
    file.write_bytes(file.read_bytes() * 2)
    return train


def compressed(root):
    file = sound(root)
    shutil.copy(file, root / "0.tar")
    with tarfile.open(file, "w:gz") as tar:
        put(tar, "apple/0.jpg", b"x")
    return train


def no_tar(root):
    sound(root).write_bytes(b"<html>404</html>" * 50)
    return train


def leads_out(root):
    return append(root, "../../apple/1.jpg")


def absolute(root):
    return append(root, "/etc/passwd.jpg")


def link(root):
    return append(root, "apple/1.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")


def hard_link(root):
    return append(root, "apple/1.jpg", type=tarfile.LNKTYPE, linkname="apple/0.jpg")


def device(root):
    return append(root, "apple/1.jpg", type=tarfile.CHRTYPE)


def twice(root):
    return append(root, "./apple/0.jpg")


def in_no_folder(root):
    return append(root, "1.jpg")


def flat(root):
    only(root, ("0.jpg", b"x"))
    write_tar(root / "train" / "1.tar", ("0.jpg", b"x"))
    return train


def no_image(root):
    only(root, ("apple/0.gif", b"x"))
    return train


def tars_in_tars(root):
    only(root, ("apple.tar", b"x"), ("bear.tar", b"x"))
    return train


def both_parts(root):
    only(root, ("train/apple/0.jpg", b"x"), ("val/apple/0.jpg", b"x"))
    return train


def between(root):
    only(root, ("images/apple/0.jpg", b"x"), ("images/bear/0.jpg", b"x"))
    return train


def sample_without_class(root):
    only(root, ("0.jpg", b"x"), ("0.cls", b"bear"), ("1.jpg", b"x"))
    return train


def class_without_sample(root):
    only(root, ("0.jpg", b"x"), ("0.cls", b"bear"), ("1.gif", b"x"), ("1.cls", b"bear"))
    return train


def two_images(root):
    only(root, ("0.jpg", b"x"), ("0.png", b"x"), ("0.cls", b"bear"))
    return train


def dot_in_the_key(root):
    only(root, ("0.jpg", b"x"), ("0.cls", b"bear"), ("1.v2.jpg", b"x"), ("1.v2.cls", b"bear"))
    return train


def numbers(root):
    only(root, ("0.jpg", b"x"), ("0.cls", b"0"), ("1.jpg", b"x"), ("1.cls", b"12"))
    return train


def too_few_names(root):
    numbers(root)
    (root / "train" / "classes.txt").write_text("apple\nbear\n")
    return train


def unlisted(root):
    sample_without_class(root)
    only(root, ("0.jpg", b"x"), ("0.cls", b"dog"))
    (root / "train" / "classes.txt").write_text("apple\nbear\n")
    return train


def listed_twice(root):
    sound(root)
    (root / "train" / "classes.txt").write_text("apple\nbear\napple\n")
    return train


def without_images(root):
    only(root, ("0.jpg", b"x"), ("0.cls", b"bear"))
    (root / "train" / "classes.txt").write_text("apple\nbear\n")
    return train


MISTAKES = {
    both_kinds: "contains both 3 folders (apple, bear, cat) and 1 tar file (0.tar): "
    "which are the images?",
    folder_and_file: "has 1 tar file (train-0.tar), but also train/: which are the images?",
    part_of_tar_files_given: "has no folder train/. It contains the tar files of train/: "
    "give its parent",
    no_val: "has train.tar, but none of val.tar, valid.tar, validation.tar.",
    linked_to_nowhere: "1.tar cannot be opened: No such file or directory",
    pipe: "1.tar is not a regular file",
    cut: "0.tar: truncated at byte 1,024, ",
    empty: "1.tar: empty, 0 bytes: copy or download it again",
    header_damaged: "0.tar: its header at byte 1,024 cannot be read: copy or download it again",
    joined: "0.tar: has data after its end mark at byte 2,048: joined by cat?",
    compressed: "0.tar: compressed, so it cannot be read in place: decompress it",
    no_tar: "0.tar: not a tar file, or damaged at its first header: copy or download it again",
    leads_out: "0.tar: ../../apple/1.jpg points outside the tar file",
    absolute: "0.tar: /etc/passwd.jpg points outside the tar file",
    link: "0.tar: apple/1.jpg is a link: pack the file itself",
    hard_link: "0.tar: apple/1.jpg is a link: pack the file itself",
    device: "0.tar: apple/1.jpg is not a regular file: leave it out",
    twice: "0.tar: apple/0.jpg is in the tar file twice: remove one",
    in_no_folder: "0.tar: 1.jpg has no class: it is not in a folder",
    flat: "no image has a class: neither folders nor .cls in 2 tar files (0.tar, 1.tar). "
    "Is each a class?",
    no_image: "no image in 1 tar file (0.tar); it contains: apple/0.gif. Supported are .jpg",
    tars_in_tars: "no image in 1 tar file (0.tar), but more archives (apple.tar …). Unpack them",
    both_parts: "train/ and val/ in the same tar files. Pack each by itself",
    between: "the tar files contain only one folder, images/, with 2 folders (apple, bear) in it: "
    "one level too many.",
    sample_without_class: "0.tar: 1.jpg has no class: add KEY.cls to each KEY.jpg",
    class_without_sample: "0.tar: 1.cls has no image with the same key",
    two_images: "0.tar: 0.png and 0.jpg belong to one sample: which is its image?",
    dot_in_the_key: "0.tar: 1.v2.jpg has a dot in its key: a sample is KEY.jpg with KEY.cls",
    numbers: "the classes are numbers from 0 to 12, without names: put a classes.txt next to",
    too_few_names: "0.tar: 1.jpg has class 12, but classes.txt has no such line",
    unlisted: "0.tar: 0.jpg has class dog, which is not in classes.txt",
    listed_twice: "classes.txt has 1 name (apple) more than once: one class per line",
    without_images: "no image of 1 class (apple) listed in classes.txt. "
    "Add the missing tar files, or",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_each_mistake_has_its_own_documented_message(folder, mistake):
    expected = MISTAKES[mistake]
    assert f"`{expected}" in (ROOT / "docs" / "data.md").read_text()
    open_source = mistake(folder)
    with pytest.raises(DataError) as caught:
        open_source(folder)
    message = str(caught.value)
    assert expected in message and "\n" not in message
    assert not [other for other in MISTAKES.values() if other != expected and other in message]


def test_names_in_a_tar_file_are_never_opened_as_paths(folder, monkeypatch):
    """Indexing a hostile tar file opens no other file."""
    touched = []

    def listen(call):
        return lambda path, *args, **named: (touched.append(path), call(path, *args, **named))[1]

    for name in ("open", "stat", "lstat", "readlink", "scandir"):
        monkeypatch.setattr(os, name, listen(getattr(os, name)))
    link(folder)
    with pytest.raises(DataError):
        train(folder)
    assert not [path for path in touched if "passwd" in str(path)]


def test_check_reads_images_in_tar_files(folder):
    shutil.copy(folder / "train" / "apple" / "0.jpg", folder / "val" / "bear" / "a.jpg")
    (folder / "train" / "bear" / "1.jpg").write_bytes(b"")
    root = sharded(folder, as_class_folders)
    plain, report = check_dataset(str(folder)), check_dataset(str(root))
    assert [f.kind for f in report.findings] == [f.kind for f in plain.findings]
    (leak,) = (f for f in report.findings if f.kind == "leak")
    assert leak.files[0].endswith(".tar:apple/0.jpg") and leak.files[1].endswith("bear/a.jpg")
    assert [split.classes for split in report.splits] == [split.classes for split in plain.splits]
    os.truncate(root / "train" / "000001.tar", 3000)
    (error,) = (f for f in check_dataset(str(root)).findings if f.kind == "layout")
    assert "000001.tar: truncated" in error.message


# The command.


def test_index_command_builds_the_index_and_lists_problems(folder, command, tmp_path):
    root = sharded(folder, as_named_samples)
    done = command("main", "index", root)
    assert done.returncode == 0, done.stderr
    assert "train: 3 tar files, 36 images, 3 classes;" in done.stdout
    assert "val: class folders, which need no index" in done.stdout
    assert (root / "train" / "index.cspnet").exists()
    done = command("main", "check", root, "-j", 2)
    assert done.returncode == 0 and "train: 36 images, 3 classes" in done.stdout
    for number in range(2):
        os.truncate(root / "train" / f"00000{number}.tar", 3000)
    with tarfile.open(root / "train" / "000002.tar", "a") as tar:
        put(tar, "a\x1b[31m.jpg", type=tarfile.SYMTYPE, linkname="x")
    done = command("main", "index", root / "train")
    assert done.returncode == 1 and "\x1b" not in done.stdout
    for line in ("000000.tar: truncated", "000001.tar: truncated", "000002.tar: a\\x1b[31m.jpg"):
        assert f"error: train: {line}" in done.stdout
    done = command("main", "index", tmp_path / "gone")
    assert done.returncode == 2 and "does not exist" in done.stderr


def test_index_command_compares_the_classes_of_the_splits(folder, command):
    root = folder.parent / "flat"
    in_shards(images(folder / "train"), root, as_class_folders, 1, "train-")
    in_shards(images(folder / "val")[:6], root, as_class_folders, 1, "val-")
    done = command("main", "index", root)
    assert done.returncode == 1 and "it lacks 1 class (cat)" in done.stdout
