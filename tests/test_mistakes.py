"""Plausible mistakes of users: each gives one message and exit code 2, and writes no file."""

import contextlib
import re
import shlex
import shutil

import cv2
import pytest

from tests.conftest import TINY, call, picture

TRAIN = "cspnet-train --recipe digits"
EVAL = "cspnet-eval --checkpoint run/checkpoints/best.pt"
PREDICT = "cspnet predict photo.jpg --checkpoint run/checkpoints/best.pt"
EXPORT = "cspnet export --checkpoint run/checkpoints/best.pt"
PREVIEW = "cspnet preview --recipe digits"

MISTAKES = [
    # Commands and options
    ("cspnet trian", "No such command 'trian'. Did you mean 'train'?"),
    ("cspnet evaluate", "No such command 'evaluate'. Did you mean 'eval'"),
    ("cspnet validate", "No such command 'validate'"),
    ("cspnet resume", "No such command 'resume'"),
    ("cspnet --recipe digits", "No such option: --recipe"),
    ("cspnet train --recpe digits", "No such option: --recpe (Possible options: --force, --recipe"),
    ("cspnet-train --recipes digits", "No such option: --recipes"),
    (
        f"{TRAIN} --epochs 3",
        "no such option: --epochs; the length of a run is counted in optimizer",
    ),
    (f"{TRAIN} --epochs 3", "schedule.steps=N with N = 3 × training images / batch"),
    (
        f"{TRAIN} --lr 0.1",
        "no such option: --lr; the learning rate is a recipe field: optim.learnin",
    ),
    (
        f"{TRAIN} --batch-size 64",
        "no such option: --batch-size; the batch size is a recipe field: b",
    ),
    (f"{TRAIN} --resume-from run", "no such option: --resume-from; use --resume with"),
    (f"{TRAIN} --data-dir data", "no such option: --data-dir; use --data data"),
    (f"{TRAIN} --no-such-thing", "No such option: --no-such-thing"),
    ("cspnet plan --recipe digits --lr=1", "no such option: --lr; the learning rate"),
    (
        f"{PREVIEW} --imgsz 64",
        "no such option: --imgsz; the image size is a recipe field: data.image_size=64",
    ),
    ("cspnet-train --recipe", "Option '--recipe' requires an argument"),
    ("cspnet-train digits", "no recipe: give --recipe NAME"),
    ("cspnet-train --data data", "no recipe: give --recipe NAME"),
    ("cspnet-eval --data digits", "Missing option '--checkpoint'"),
    ("cspnet-eval --checkpoint run/checkpoints/best.pt", "Missing option '--data'"),
    ("cspnet predict --checkpoint run/checkpoints/best.pt", "Missing argument 'IMAGES"),
    ("cspnet export run/checkpoints/best.pt", "Missing option '--checkpoint'"),
    ("cspnet pack data", "Missing option '--output'"),
    # Recipes
    ("cspnet-train --recipe digit", "recipe 'digit' is neither a file nor"),
    ("cspnet-train --recipe digit", "Did you mean 'digits'?"),
    ("cspnet-train --recipe cspdarknet", "Did you mean 'cspdarknet53'?"),
    ("cspnet-train --recipe recipes/none.yaml", "recipe 'recipes/none.yaml' is neither a file nor"),
    ("cspnet-train --recipe ''", "recipe '' is neither a file nor"),
    ("cspnet-train --recipe void", "the recipe void is a folder"),
    ("cspnet-train --recipe tabs.yaml", "tabs.yaml cannot be read as YAML"),
    ("cspnet-train --recipe photo.jpg", "photo.jpg cannot be read as YAML"),
    ("cspnet-train --recipe list.yaml", "list.yaml must consist of `key: value` lines"),
    ("cspnet-train --recipe empty.yaml", "empty.yaml is empty"),
    ("cspnet-train --recipe wrong.yaml", "unknown key 'learning_rate'. Did you mean 'optim.lear"),
    # Overrides
    (f"{TRAIN} schedule.step=100", "'schedule.step'. Did you mean 'schedule.steps=100'?"),
    (f"{TRAIN} steps=100", "unknown key 'steps'. Did you mean 'schedule.steps=100'?"),
    (f"{TRAIN} learning_rate=0.1", "Did you mean 'optim.learning_rate=0.1'?"),
    (f"{TRAIN} epochs=90", "unknown key 'epochs'; the length of a run is counted in optimizer st"),
    (f"{TRAIN} schedule.epochs=90", "schedule.steps=N with N = 90 × training images / batch"),
    (
        f"{TRAIN} batch_size=64",
        "unknown key 'batch_size'; the batch size is a recipe field: batch=64",
    ),
    (f"{TRAIN} optim.lr=0.1", "the learning rate is a recipe field: optim.learning_rate=0.1"),
    (f"{TRAIN} model=darknet53", "the network is a recipe field: model.name=darknet53"),
    (f"{TRAIN} batch", "'batch' is not of the form section.key=value"),
    (f"{TRAIN} batch = 64", "'batch' is not of the form section.key=value"),
    (f"{TRAIN} model=darknet53", "model is a section: set its fields, model.KEY=VALUE"),
    (f"{TRAIN} batch=0", "batch is 0, must be at least 2"),
    (f"{TRAIN} batch=-64", "batch is -64, must be at least 2"),
    (f"{TRAIN} batch=100", "batch (100) is not a multiple of group (32)"),
    (f"{TRAIN} batch=64.5", "batch: Value '64.5'"),
    (f"{TRAIN} optim.learning_rate=abc", "optim.learning_rate: Value 'abc'"),
    (f"{TRAIN} optim.learning_rate=0,1", "optim.learning_rate: Value '0,1'"),
    (f"{TRAIN} optim.learning_rate=-1", "optim.learning_rate is -1.0, must be"),
    (f"{TRAIN} optim.learning_rate=nan", "optim.learning_rate is nan, must be"),
    (f"{TRAIN} mix.probability=2", "mix.probability is 2.0, must be between 0 and 1"),
    (f"{TRAIN} data.image_size=100", "data.image_size (100) must be a multiple of 32: try 96"),
    (f"{TRAIN} schedule.steps=", "schedule.steps: needs a value"),
    (f"{TRAIN} schedule.steps=1e6", "could not be converted to Integer: write 1000000"),
    (f"{TRAIN} model.name=cspdarknet", "Did you mean 'cspdarknet53'?"),
    (f"{TRAIN} model.name=timm/no_such_net", "model.name=timm/no_such_net"),
    (f"{TRAIN} model.activation=relu", "model.activation: Invalid value 'relu'"),
    (f"{TRAIN} model.classes=7", "model.classes is 7, but digits has 10 classes"),
    (f"{TRAIN} model.leaky_slope=0.2", "has no effect, since model.activation is mish"),
    (f"{TRAIN} model.init_from=none.pt", "none.pt does not exist"),
    (f"{TRAIN} model.freeze_stages=2", "set model.init_from, or leave model.freeze_stages out"),
    (f"{TRAIN} precision=fp8", "precision: Invalid value 'fp8', expected one of"),
    (f"{TRAIN} precision=fp16 --device cpu", "precision is fp16, but the device is a CPU"),
    (f"{TRAIN} mix.images_per_draw=0", "mix.images_per_draw is 0, must be at least"),
    (f"{TRAIN} augment.scale=2", "augment.scale: needs two numbers, augment.scale=[LOW,HIGH]"),
    (f"{TRAIN} augment.scale=[1,2,3]", "augment.scale: needs two numbers"),
    (f"{TRAIN} augment.scale=[2,1]", "the smaller bound comes first"),
    # Data
    (f"{TRAIN} --data nowhere", "the data folder nowhere does not exist"),
    (f"{TRAIN} --data file", "the data folder file is a file"),
    (f"{TRAIN} --data data.zip", "is an archive. Unpack it"),
    (f"{TRAIN} --data data/train", "give its parent"),
    (f"{TRAIN} --data void", "void has no folder train/"),
    (f"{TRAIN} --data https://host/set.tar", "https://host/set.tar is a URL, not a local folder"),
    (f"{TRAIN} --data s3://bucket/imagenet", "s3://bucket/imagenet is a URL, not a local folder"),
    (f"{TRAIN} --data hf://datasets/imagenet-1k", "is a URL, not a local folder"),
    (f"{TRAIN} data.root=gs://bucket", "gs://bucket is a URL, not a local folder"),
    (f"{TRAIN} --data imagenette", "cspnet prepare imagenette"),
    (f"{EVAL} --data https://host/set", "https://host/set is a URL, not a local folder"),
    (f"{EVAL} --data data", "it has 3 classes (apple, bear, cat)"),
    (f"{EVAL} --data data/train", "contains the training images"),
    (f"{EVAL} --data data/val/cat", "data/val/cat is flat"),
    ("cspnet check file", "the data folder file is a file"),
    ("cspnet check nowhere", "the data folder nowhere does not exist"),
    ("cspnet check hf://imagenet", "hf://imagenet is a URL, not a local folder"),
    ("cspnet check void", "void is empty"),
    ("cspnet check data --workers -1", "--workers -1: must be 0 (none) or more"),
    ("cspnet check data --json void", "--json void: must be a file in an existing folder"),
    ("cspnet index nowhere", "the data folder nowhere does not exist"),
    ("cspnet pack nowhere --output packed", "the data folder nowhere does not exist"),
    ("cspnet pack data --output data", "data"),
    ("cspnet pack data --output data/packed", "data/packed"),
    ("cspnet pack data --output file", "file"),
    ("cspnet pack data --output /proc/packed", "--output /proc/packed cannot be created"),
    ("cspnet pack data --output packed --short-side 8", "Invalid value for '--short-side'"),
    ("cspnet pack data --output packed --quality 101", "Invalid value for '--quality'"),
    ("cspnet prepare imagnet", "Did you mean 'imagenet'?"),
    ("cspnet prepare coco", "choose from imagenet, imagenette, cifar10"),
    ("cspnet prepare imagenet", "ILSVRC2012_img_train.tar (147,897,477,120 bytes) is missing"),
    ("cspnet prepare cifar10 --output file", "file is not a folder"),
    (
        "cspnet prepare cifar10 --output file/sub",
        "cannot create the folder file/sub: Not a directory",
    ),
    ("cspnet prepare imagenet --archives file", "file is not a folder"),
    ("cspnet prepare imagenet --output data", "data/train exists with 3 class folders"),
    # Where it runs
    ("cspnet plan --recipe digits --gpu gtx970", "--gpu gtx970: unknown; must be one of rtx2070"),
    (
        "cspnet plan --recipe digits --gpu 2070 --workers 4",
        "without running anything: omit --workers",
    ),
    (
        "cspnet plan --recipe digits --gpu 2070 precision=bf16",
        "precision=bf16: --gpu supports only fp16",
    ),
    (f"{TRAIN} --device gpu", "--device gpu: must be auto, cpu, cuda or cuda:N"),
    (f"{TRAIN} --device 0", "--device 0: must be auto, cpu, cuda or cuda:N"),
    (f"{TRAIN} --device cuda:x", "must be auto, cpu, cuda or cuda:N"),
    (f"{TRAIN} --device cuda:9", "CUDA devices on this machine"),
    (f"{TRAIN} --device mps", "must be auto, cpu, cuda or cuda:N"),
    (f"{EVAL} --data digits --device gpu", "--device gpu: must be"),
    (f"{TRAIN} --workers -1", "--workers -1: must be 0"),
    (f"{EVAL} --data digits --workers -1", "--workers -1: must be 0"),
    (f"{TRAIN} --workers many", "Invalid value for '--workers'"),
    (f"{TRAIN} --micro-batch 0", "--micro-batch 0: must be a multiple of"),
    (f"{TRAIN} --micro-batch 99", "--micro-batch 99: must be a multiple of"),
    (f"{TRAIN} --micro-batch many", "--micro-batch many: must be auto or a number"),
    (f"{TRAIN} --micro-batch -1", "--micro-batch -1: must be auto or a number"),
    (f"{TRAIN} --recompute huge", "'huge' is not one of 'none', 'light', 'full'"),
    (f"{TRAIN} --recompute full --device cpu", "--recompute full has no effect"),
    (f"{TRAIN} --max-hours -1", "Invalid value for '--max-hours'"),
    (f"{TRAIN} --max-hours abc", "Invalid value for '--max-hours'"),
    (f"{TRAIN} --max-hours nan", "Invalid value for '--max-hours'"),
    # The run folder
    (f"{TRAIN} --output /proc/run", "/proc/run"),
    (f"{TRAIN} --output file", "--output file is a file: give a folder"),
    (f"{TRAIN} --output file/run", "cannot be written: Not a directory"),
    (f"{TRAIN} --output data", "the run folder data is not empty"),
    (f"{TRAIN} --output run", "the run folder run is not empty: continue its run with --resume"),
    ("cspnet-train --resume --output void", "--output void is not a run folder"),
    ("cspnet-train --resume --output nowhere", "--output nowhere does not exist"),
    (f"{TRAIN} --resume --output data", "data is not a run folder"),
    (f"{TRAIN} --resume --output run seed=7", "this run cannot be resumed with other settings"),
    # Checkpoints
    ("cspnet-eval --checkpoint none.pt --data digits", "the checkpoint none.pt does not exist"),
    ("cspnet-eval --checkpoint run --data digits", "the checkpoint run is a folder"),
    ("cspnet-eval --checkpoint torn.pt --data digits", "torn.pt is truncated, damaged, or not"),
    (
        "cspnet-eval --checkpoint photo.jpg --data digits",
        "photo.jpg: unknown suffix; supported are",
    ),
    ("cspnet-eval --checkpoint file --data digits", "file: unknown suffix; supported are"),
    ("cspnet-eval --checkpoint plain.pt --data digits", "is not a checkpoint of cspnet"),
    ("cspnet-eval --checkpoint x.weights --data digits", "the file x.weights does not exist"),
    ("cspnet-eval --checkpoint timm:nope --data digits", "timm has no network of this name"),
    # Results
    (f"{EVAL} --data digits --json void", "--json void: must be a file in an existing folder"),
    (
        f"{EVAL} --data digits --json no/a.json",
        "--json no/a.json: must be a file in an existing folder",
    ),
    (f"{EVAL} --data digits --batch 0", "Invalid value for '--batch'"),
    (f"{PREDICT} --json void", "--json void: must be a file in an existing folder"),
    (f"{PREDICT} --json a.txt --csv a.txt", "--json and --csv name the same file a.txt"),
    (f"{PREDICT} --top 0", "Invalid value for '--top'"),
    (PREDICT.replace("photo.jpg", "none.jpg"), "no such file or folder: none.jpg"),
    (PREDICT.replace("photo.jpg", "void"), "void contains no image"),
    (PREDICT.replace("photo.jpg", "https://host/a.jpg"), "no such file or folder: https://host/"),
    (f"{PREDICT} --json /proc/a.json", "/proc/a.json cannot be written"),
    (f"{EXPORT} --output /proc/net.safetensors", "/proc/net.safetensors cannot be written"),
    (f"{EXPORT} --output net", "net: the suffix must be one of .safetensors, .onnx, .weights"),
    (f"{EXPORT} --output void.onnx", "void.onnx is a folder: give a file"),
    (f"{EXPORT} --output net.pth", "net.pth: the suffix must be one of"),
    (f"{EXPORT} --output no/net.onnx", "no/net.onnx: the folder no does not exist"),
    (f"{EXPORT} --output net.safetensors --first-layers 105", "--first-layers requires .weights"),
    (
        f"{EXPORT} --output net.weights --first-layers 9999",
        "the network has layers 0 to 107: --first-layers must be 1 to 108",
    ),
    (f"{EXPORT} --output net.weights --first-layers 0", "--first-layers must be 1 to 108"),
    (f"{EXPORT} --output net.weights --pyramid", "--pyramid requires .onnx"),
    (f"{PREVIEW} --output preview.jpg", "--output preview.jpg: must be a .png file"),
    (f"{PREVIEW} --output void.png", "--output void.png: must be a .png file"),
    (f"{PREVIEW} --output text.png", "--output text.png: exists and is not a PNG file"),
    (
        f"{PREVIEW} --output no/preview.png",
        "--output no/preview.png: must be a .png file in an existing",
    ),
    (f"{PREVIEW} --output /proc/preview.png", "--output /proc/preview.png cannot be written"),
    (f"{PREVIEW} --step 600", "--step 600: the last one is 599"),
    (f"{PREVIEW} --step -1", "Invalid value for '--step'"),
    (f"{PREVIEW} --checkpoint none.pt", "the checkpoint none.pt does not exist"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A working folder with files that a user may have."""
    import torch

    home = tmp_path_factory.mktemp("home")
    for name, text in (
        ("file", "precious"),
        ("tabs.yaml", "model:\n\tname: darknet53\n"),
        ("list.yaml", "- batch\n- 64\n"),
        ("empty.yaml", ""),
        ("wrong.yaml", "learning_rate: 0.1\n"),
        ("data.zip", "PK"),
        ("text.png", "precious"),
    ):
        (home / name).write_text(text)
    (home / "void").mkdir()
    (home / "void.onnx").mkdir()
    (home / "void.png").mkdir()
    cv2.imwrite(str(home / "photo.jpg"), picture(0))
    for split in ("train", "val"):
        for number, name in enumerate(("apple", "bear", "cat")):
            folder = home / "data" / split / name
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "0.jpg"), picture(10 * number))
    torch.save({"a": torch.zeros(1)}, home / "plain.pt")
    with contextlib.chdir(home), pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        steps = ["schedule.steps=2", "schedule.warmup_steps=1", "evaluate.every=2"]
        assert call(shlex.join([*TRAIN.split(), "--output", "run", *TINY, *steps])) == 0
    shutil.rmtree(home / "run" / "tb")
    whole = (home / "run" / "checkpoints" / "best.pt").read_bytes()
    (home / "torn.pt").write_bytes(whole[: len(whole) // 2])
    return home


def listing(folder) -> dict[str, tuple[int, int]]:
    """Size and time of change of all that is in a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in paths}


@pytest.mark.parametrize("line, message", MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_has_its_message(home, line, message, capsys, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    before = listing(home)
    assert call(line) == 2
    output, errors = capsys.readouterr()
    assert output == "", "the error comes before any other output"
    assert "Traceback" not in errors
    printed = re.sub(r"[\s│]+", " ", errors)
    assert message in printed, printed
    assert not re.search(r"(?<!\.)\.\.(?![./])", printed), "two full stops"
    # One box of the command line's parser, or one message of ours.
    assert len(re.findall(r"^(?:error: |╭─ Error)", errors, re.MULTILINE)) == 1
    assert listing(home) == before, "something was written"


@pytest.mark.parametrize("line", ["cspnet", "cspnet check", "cspnet prepare", "cspnet-eval"])
def test_without_arguments_the_help_is_printed(line, capsys):
    assert call(line) == 2
    output = capsys.readouterr()
    assert "Usage: " in output.out + output.err
