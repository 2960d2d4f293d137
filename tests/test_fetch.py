"""`cspnet prepare` with small imitations of the official archives."""

import io
import pickle
import shutil
import tarfile

import cv2
import numpy as np
import pytest
from torchvision.datasets import CIFAR10, Imagenette, imagenet
from torchvision.datasets.utils import calculate_md5

from cspnet.datasets import download as module
from cspnet.datasets.download import prepare_dataset
from cspnet.errors import DataError, RecipeError
from cspnet.sources.data_root import open_training, open_validation
from tests.conftest import picture

WNIDS = ["n00000001", "n00000002", "n00000003"]


def jpeg(seed: int) -> bytes:
    return cv2.imencode(".jpg", picture(seed))[1].tobytes()


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    """The bytes of a tar file with these files."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """ImageNet's archives with three classes of four training and two validation images each."""
    from scipy.io import savemat

    folder = tmp_path / "archives"
    folder.mkdir()
    inner = {
        f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": jpeg(10 * c + i) for i in range(4)})
        for c, wnid in enumerate(WNIDS)
    }
    # The devkit has its own class order, and lists inner nodes of WordNet, too.
    numbers = {"n00000003": 1, "n00000001": 2, "n00000002": 3}
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("n", "O")]
    rows = [(number, wnid, f"{wnid}, alias", "-", 0) for wnid, number in numbers.items()]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array([*rows, (4, "n9", "entity", "-", 3)], dtype=kinds)})
    labels = "".join(f"{number}\n" for number in (3, 1, 2, 2, 1, 3))
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": labels.encode(),
    }
    content = {
        "train": tar(inner),
        "val": tar({f"ILSVRC2012_val_0000000{i}.JPEG": jpeg(100 + i) for i in range(1, 7)}),
        "devkit": tar(devkit, "w:gz"),
    }
    known = {}
    for kind, data in content.items():
        file = folder / imagenet.ARCHIVE_META[kind][0]
        file.write_bytes(data)
        known[kind] = (file.name, calculate_md5(file))
    monkeypatch.setattr(imagenet, "ARCHIVE_META", known)
    sizes = {kind: len(content[kind]) for kind in ("train", "val")}
    monkeypatch.setattr(module, "ARCHIVE_SIZES", sizes)
    monkeypatch.setitem(module.DOWNLOADABLE, "imagenet", 3)
    return folder


@pytest.fixture
def get(tmp_path):
    """Calls `prepare_dataset` for tmp_path/root; returns its result and the reported lines."""

    def run(name, archives=None, progress=lambda done, total: None):
        lines = []
        return prepare_dataset(name, tmp_path / "root", archives, lines.append, progress), lines

    return run


def test_imagenet_is_unpacked_into_class_folders(archives, get, tmp_path):
    made, _ = get("imagenet", archives)
    root = tmp_path / "root"
    assert made and sorted(p.name for p in root.iterdir()) == ["train", "val"]
    training, validation = open_training(str(root)), open_validation(str(root), WNIDS, 3)
    assert training.classes == WNIDS and len(training) == 12
    # The ground truth in the devkit's numbers: 3, 1, 2, 2, 1, 3.
    names = {p.name[-6]: p.parent.name for p in (root / "val").glob("*/*")}
    truth = [names[str(i)] for i in range(1, 7)]
    assert truth == [WNIDS[1], WNIDS[2], WNIDS[0], WNIDS[0], WNIDS[2], WNIDS[1]]
    assert validation.classes == WNIDS and len(validation) == 6


def test_second_run_changes_nothing(archives, get, tmp_path):
    get("imagenet", archives)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "root").rglob("*")}
    shutil.rmtree(archives)  # they are not needed any more
    assert get("imagenet", archives) == (False, [])
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "root").rglob("*")} == files


def test_archives_in_the_data_root(archives, get, tmp_path):
    shutil.move(archives, tmp_path / "root")
    assert get("imagenet")[0]
    assert len(open_training(str(tmp_path / "root"))) == 12


def test_interrupted_preparation_resumes(archives, get, tmp_path, monkeypatch):
    """Only the interrupted class is unpacked again, and the checksum is not recomputed."""

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get("imagenet", archives, stop)
    root = tmp_path / "root"
    assert not (root / "train").exists()
    half = root / "train.partial"
    kept = half / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    before = kept.stat().st_ino
    (half / WNIDS[1]).rename(half / f"{WNIDS[1]}.partial")  # as if interrupted within the class
    (half / f"{WNIDS[1]}.partial" / f"{WNIDS[1]}_3.JPEG").unlink()
    _, lines = get("imagenet", archives)
    assert not any("md5" in line for line in lines)
    assert (root / "train" / kept.relative_to(half)).stat().st_ino == before
    assert sorted(p.name for p in (root / "train").iterdir()) == WNIDS
    assert len(open_training(str(root))) == 12 and not half.exists()


def test_interrupted_val_is_never_incomplete(archives, get, tmp_path, monkeypatch):
    def cut(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(imagenet.shutil, "move", cut)
        with pytest.raises(DataError, match=r"No space left on device.*run the same command again"):
            get("imagenet", archives)
    assert not (tmp_path / "root" / "val").exists()
    get("imagenet", archives)
    assert sum(1 for _ in (tmp_path / "root" / "val").glob("*/*.JPEG")) == 6


def test_missing_archives_are_reported_before_unpacking(archives, get, tmp_path):
    for file in archives.iterdir():
        if "val" not in file.name:
            file.unlink()
    with pytest.raises(DataError) as error:
        get("imagenet", archives)
    text = str(error.value)
    assert "ILSVRC2012_img_train.tar" in text and "devkit_t12.tar.gz (2.5 MB)" in text
    assert "img_val" not in text and "image-net.org" in text and str(archives) in text
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("kind", ["train", "val", "devkit"])
def test_damaged_archive_is_reported(archives, get, tmp_path, kind):
    file = archives / imagenet.ARCHIVE_META[kind][0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{file.name} is damaged"):
        get("imagenet", archives)
    assert not (tmp_path / "root" / ("train" if kind == "train" else "val")).exists()


def test_truncated_download_is_detected_by_its_size(archives, get):
    file = archives / "ILSVRC2012_img_train.tar"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-512])
    with pytest.raises(DataError, match=f"has {size - 512:,} bytes, not {size:,} bytes: finish"):
        get("imagenet", archives)


def test_disk_space_is_checked_first(archives, get, tmp_path, monkeypatch):
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 9)
    )
    with pytest.raises(DataError, match="Free disk space or choose another disk with --output"):
        get("imagenet", archives)
    assert not (tmp_path / "root").exists()


def test_foreign_split_folder_is_not_modified(archives, get, tmp_path):
    (tmp_path / "root" / "train" / WNIDS[0]).mkdir(parents=True)
    with pytest.raises(DataError, match="with 1 class folders instead of 3"):
        get("imagenet", archives)
    assert [p.name for p in (tmp_path / "root").rglob("*")] == ["train", WNIDS[0]]


def test_unknown_data_set_is_reported(get):
    with pytest.raises(RecipeError, match="Did you mean 'imagenet'"):
        get("imagnet")


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10's archive with four training and two test images."""

    def batch(seed: int, labels: list[int]) -> bytes:
        rng = np.random.default_rng(seed)
        data = rng.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        return pickle.dumps({"data": data, "labels": labels})

    names = [f"class{i}" for i in range(10)]
    files = {
        "data_batch_1": batch(0, [3, 1, 3, 0]),
        "test_batch": batch(1, [2, 3]),
        "batches.meta": pickle.dumps({"label_names": names}),
    }
    archive = tmp_path / "archives" / CIFAR10.filename
    archive.parent.mkdir()
    archive.write_bytes(tar({f"cifar-10-batches-py/{n}": c for n, c in files.items()}, "w:gz"))
    md5 = {}
    for name, content in files.items():
        (tmp_path / "one").write_bytes(content)
        md5[name] = calculate_md5(tmp_path / "one")
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(archive))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    return archive


def test_cifar10_is_written_as_png_files(cifar, get, tmp_path):
    assert get("cifar10", cifar.parent)[0]
    root = tmp_path / "root"
    assert sorted(p.name for p in root.iterdir()) == ["train", "val"]
    files = sorted(str(p.relative_to(root)) for p in root.rglob("*.png"))
    assert files == [
        *("train/class0/00003.png", "train/class1/00001.png"),
        *("train/class3/00000.png", "train/class3/00002.png"),
        *("val/class2/00000.png", "val/class3/00001.png"),
    ]
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3072), dtype=np.uint8)
    image = cv2.imread(str(root / "val" / "class2" / "00000.png"))[:, :, ::-1]
    assert np.array_equal(image, pixels[0].reshape(3, 32, 32).transpose(1, 2, 0))
    assert get("cifar10", cifar.parent)[0] is False


def test_interrupted_cifar10_resumes(cifar, get, tmp_path):
    def stop(done, total):
        if (done, total) == (1, 2):  # in val
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get("cifar10", cifar.parent, stop)
    root = tmp_path / "root"
    assert (root / "train").exists() and not (root / "val").exists()
    before = (root / "train").stat().st_ino
    get("cifar10", cifar.parent)
    assert (root / "train").stat().st_ino == before
    assert sorted(p.name for p in root.iterdir()) == ["train", "val"]


def test_damaged_small_archive_is_not_overwritten(cifar, get, tmp_path):
    cifar.write_bytes(b"half a download")
    with pytest.raises(DataError, match="is damaged or incomplete"):
        get("cifar10", cifar.parent)
    assert cifar.read_bytes() == b"half a download" and not (tmp_path / "root").exists()


def test_imagenette_archive_is_downloaded_once(tmp_path, get, monkeypatch):
    """With a fake network. A downloaded archive is treated like an existing one."""
    monkeypatch.setitem(module.DOWNLOADABLE, "imagenette", 3)
    content = tar(
        {
            f"imagenette2-320/{split}/{wnid}/{i}.JPEG": jpeg(i)
            for split in ("train", "val")
            for wnid in WNIDS
            for i in range(2)
        },
        "w:gz",
    )
    (tmp_path / "one").write_bytes(content)
    url, _ = Imagenette._ARCHIVES["320px"]
    monkeypatch.setitem(Imagenette._ARCHIVES, "320px", (url, calculate_md5(tmp_path / "one")))
    requests = []

    def download(address, folder, name, md5):
        requests.append(address)
        folder.mkdir()
        (folder / name).write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.utils.download_url", download)
    assert get("imagenette")[0] and requests == [url]
    root = tmp_path / "root"
    assert sorted(p.name for p in root.iterdir()) == ["imagenette2-320.tgz", "train", "val"]
    assert len(open_training(str(root))) == 6
    shutil.rmtree(root / "val")  # the archive exists: no second download
    assert get("imagenette")[0] and requests == [url]


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_missing_network_connection_is_reported(name, tmp_path, get, monkeypatch):
    def resolve(*_, **__):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    with pytest.raises(DataError) as error:
        get(name)
    text = str(error.value)
    url, md5 = Imagenette._ARCHIVES["320px"]
    url, md5 = (CIFAR10.url, CIFAR10.tgz_md5) if name == "cifar10" else (url, md5)
    assert url in text and md5 in text and "Name or service not known" in text
    assert f"copy it to {tmp_path / 'root'} as" in text
    assert not (tmp_path / "root").exists()
