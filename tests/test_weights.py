"""Other programs' files: class order, label files, `config.json`; names and paths of any bytes."""

import json
import os
import stat

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_dataset, create_transform

from cspnet.data import augment
from cspnet.errors import CheckpointError, RecipeError
from cspnet.images import decode
from cspnet.nets import create
from cspnet.recipe import load as recipes
from cspnet.weights.export import ExportError, export_network
from cspnet.weights.labels import natural_key, read_labels, resolve_class_names
from cspnet.weights.load import init_net, load_weights
from cspnet.weights.trained import Trained, build_net
from tests.conftest import picture
from tests.helpers import equal, trained

SMALL = ("data.image_size=64", "model.width=0.125")
TWELVE = [str(number) for number in range(1, 13)]


def folders(root, names, images=1):
    """A data root with the same small pictures for training and validation; names may be bytes."""
    for part in ("train", "val"):
        for name in names:
            target = os.path.join(os.fsencode(root), part.encode(), os.fsencode(name))
            os.makedirs(target)
            for i in range(images):
                content = cv2.imencode(".png", picture(i, 40, 40))[1].tobytes()
                with open(os.path.join(target, b"%d.png" % i), "wb") as file:
                    file.write(content)
    return root


def nameless(path, classes):
    """A state dict with timm's names; the bias of its i-th output is i / 10."""
    net = create("cspdarknet53", classes=classes, activation="leaky", leaky_slope=0.01, width=0.125)
    with torch.no_grad():
        net.head.fc.bias.copy_(torch.arange(classes) / 10)
    torch.save({"state_dict": net.state_dict()}, path)
    return net


# --- class order


def test_the_natural_order_is_timms(tmp_path):
    names = ["10", "9", "b2", "B10", "a", "Z", "é1", "1a", "01b", "x-3", "x-20", "١"]
    root = folders(tmp_path / "data", names)
    theirs = create_dataset("", root=str(root / "train")).reader.class_to_idx
    assert sorted(names, key=natural_key) == sorted(theirs, key=theirs.get)


@pytest.mark.parametrize("ours", [False, True], ids=["pth", "safetensors"])
def test_nameless_weights_are_refused_where_the_orders_differ(tmp_path, command, ours):
    net = nameless(tmp_path / "net.pth", 12)
    file = tmp_path / "net.pth"
    if ours:  # the way through our own file hides nothing
        export_network(load_weights(str(file)), tmp_path / "net.safetensors")
        file = tmp_path / "net.safetensors"
    root = folders(tmp_path / "data", TWELVE)
    call = ("main_eval", "--checkpoint", file, "--data", root, "--workers", "0", "--batch", "2")
    done = command(*call)
    assert done.returncode == 2 and "top-1" not in done.stdout
    assert "class 1 would be '2' or '10'" in done.stderr and "--class-order" in done.stderr
    # Folders in code-point order have 12 in the fourth place, in natural order in the last.
    for order, place in (("natural", 11), ("sorted", TWELVE.index("9"))):
        found = resolve_class_names(load_weights(str(file)), sorted(TWELVE), "x", order)
        last = found.classes.index(TWELVE[place])
        assert found.net.head.fc.bias[last] == net.head.fc.bias[11]
        assert found.classes == sorted(TWELVE)
    done = command(*call, "--class-order", "natural")
    assert done.returncode == 0 and "natural order, by --class-order" in done.stdout


def test_timms_score_is_ours_in_natural_order(tmp_path, command):
    """One picture for each class, which a classifier recognises by its features: 100 % in timm."""
    net = nameless(tmp_path / "net.pth", 12).eval()
    root = folders(tmp_path / "data", TWELVE)
    for number, name in enumerate(TWELVE):
        cv2.imwrite(str(root / "val" / name / "0.png"), picture(number, 40, 40))
    view = create_transform(input_size=(3, 256, 256), interpolation="bilinear", crop_pct=0.887)
    images, labels = zip(*create_dataset("", root=str(root / "val")), strict=True)
    assert list(labels) == list(range(12))
    pixels = torch.stack([view(image) for image in images])
    with torch.no_grad():
        features = net.forward_features(pixels).mean((2, 3)).double()
        weight = torch.linalg.pinv(features - features.mean(0)).T.float()
        net.head.fc.weight.copy_(weight)
        net.head.fc.bias.copy_(-weight @ features.mean(0).float())
        assert net(pixels).argmax(1).tolist() == list(labels)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    call = (
        "main_eval",
        "--checkpoint",
        tmp_path / "net.pth",
        "--data",
        root,
        "--workers",
        "0",
        "--batch",
        "12",
    )
    done = command(*call, "--class-order", "natural")
    assert done.returncode == 0, done.stderr
    assert "top-1 100.00 %" in done.stdout


def test_an_order_that_does_not_matter_is_assumed_and_said(tmp_path, command):
    nameless(tmp_path / "net.pth", 3)
    root = folders(tmp_path / "data", ["ant", "bee", "cat"])
    call = ("--checkpoint", tmp_path / "net.pth", "--data", root, "--workers", "0", "--batch", "2")
    done = command("main_eval", *call)
    assert done.returncode == 0 and "in sorted order (assumed)" in done.stdout
    two = folders(tmp_path / "two", ["ant", "bee"])
    done = command("main_eval", *call[:2], "--data", two, "--workers", "0", "--batch", "2")
    assert done.returncode == 2 and "has 2 classes, but the network has 3" in done.stderr


def test_names_that_timm_takes_for_equal_have_no_order(tmp_path):
    nameless(tmp_path / "net.pth", 3)
    for order in (None, "natural"):
        found = load_weights(str(tmp_path / "net.pth"))
        with pytest.raises(
            CheckpointError, match="01 and 1 compare equal, so their order is undefined"
        ):
            resolve_class_names(found, ["01", "1", "2"], "net.pth", order)
    assert resolve_class_names(found, ["01", "1", "2"], "net.pth", "sorted").classes == [
        "01",
        "1",
        "2",
    ]


def test_a_thousand_classes_are_imagenets_unless_the_user_knows_better(tmp_path):
    nameless(tmp_path / "net.pth", 1000)
    found = load_weights(str(tmp_path / "net.pth"))
    assert found.classes[0] == "n01440764" and found.inferred
    synsets = found.classes
    assert resolve_class_names(found, synsets, "net.pth").file_order is None
    numbers = sorted(map(str, range(1000)))
    assert resolve_class_names(found, numbers, "net.pth", "natural").classes == numbers
    # A run on as many other classes has a classifier of its own.
    recipe = recipes.load_recipe(None, [f"model.init_from={tmp_path / 'net.pth'}", *SMALL])
    _, remarks = init_net(recipe, numbers)
    assert any("not loaded: head.fc.weight" in remark for remark in remarks)
    _, remarks = init_net(recipe, synsets)
    assert any("all 404 tensors loaded" in remark for remark in remarks)


def test_fine_tuning_takes_over_no_guessed_classifier(tmp_path):
    theirs = nameless(tmp_path / "net.pth", 12)
    names = sorted(TWELVE)

    def start(*overrides):
        weights = f"model.init_from={tmp_path / 'net.pth'}"
        return init_net(recipes.load_recipe(None, [weights, *SMALL, *overrides]), names)

    with pytest.raises(CheckpointError, match=r"class 1 would be.*model\.class_order"):
        start()
    bias = theirs.head.fc.bias
    for order, last in (("natural", names.index("12")), ("sorted", 11)):
        net, remarks = start(f"model.class_order={order}")
        assert net.head.fc.bias[last] == bias[11]
        assert any(f"{order} order, by model.class_order" in remark for remark in remarks)
    net, remarks = start("model.class_order=fresh")
    assert not torch.equal(net.head.fc.bias, bias) and "class_order is fresh" in remarks[-1]
    (tmp_path / "net.labels").write_text("\n".join(TWELVE))
    net, _ = start()
    assert net.head.fc.bias[names.index("12")] == bias[11]
    with pytest.raises(RecipeError, match=r"model\.class_order has no effect"):
        start("model.class_order=sorted")
    with pytest.raises(RecipeError, match=r"model\.init_from is not given"):
        recipes.load_recipe(None, ["model.class_order=sorted"])


def test_the_preview_needs_a_known_order_too(tmp_path, command):
    nameless(tmp_path / "net.pth", 12)
    root = folders(tmp_path / "data", TWELVE, images=2)
    call = (
        *("main", "preview", "--recipe", "digits", "--data", root, "--device", "cpu"),
        *("--checkpoint", tmp_path / "net.pth", "--output", tmp_path / "p.png"),
        *("model.classes=auto", "batch=8", "group=8"),
    )
    done = command(*call)
    assert done.returncode == 2 and "--class-order" in done.stderr
    assert command(*call, "--class-order", "natural").returncode == 0


# --- label files


def test_label_files_are_read_as_darknet_reads_them(tmp_path):
    file = tmp_path / "a.labels"
    for content, names in (
        (b"ant\nbee\ncat", ["ant", "bee", "cat"]),
        (b"ant\r\nbee\r\ncat\r\n\n", ["ant", "bee", "cat"]),
        (b"\xef\xbb\xbfant\nbee\ncat\ndog\n", ["ant", "bee", "cat"]),
        (b"p\xeache\n pomme \nraisin\x85\n", ["p\udceache", " pomme ", "raisin\udc85"]),
    ):
        file.write_bytes(content)
        found, remarks = read_labels(file, 3)
        assert found == names
        assert bool(remarks) == (b"dog" in content)
    for content, told in (
        (b"\nant\nbee\ncat\n", "line 1 is blank"),
        (b"ant\n\r\nbee\n", "line 2 is blank"),
        (b"ant\nbee\nant\n", "lines 1 and 3: both are ant"),
        (b"ant\nbee\n", "has 2 lines, but the network has 3 classes"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=told):
            read_labels(file, 3)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_labels(file, 3)


def test_labels_by_option_and_beside_the_weights(tmp_path, command):
    nameless(tmp_path / "net.pth", 3)
    cv2.imwrite(str(tmp_path / "a.png"), picture(0))
    (tmp_path / "list").write_bytes(b"zebra\np\xeache\x1b[31m\nbee\n")
    call = ("main", "predict", "a.png", "--checkpoint", "net.pth", "--workers", "0", "--batch", "1")
    done = command(*call, cwd=tmp_path)
    assert "no class names, showing class indices" in done.stderr
    done = command(*call, "--labels", "list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "zebra" in done.stdout and "\x1b" not in done.stdout and "\\udcea" in done.stdout
    export_network(load_weights(str(tmp_path / "net.pth")), tmp_path / "bare.safetensors")
    (tmp_path / "bare.labels").write_bytes((tmp_path / "list").read_bytes())
    found = load_weights(str(tmp_path / "bare.safetensors"))
    assert found.classes == ["bee", "p\udceache\x1b[31m", "zebra"] and found.file_order == [2, 1, 0]
    export_network(found, tmp_path / "named.safetensors")
    done = command(*call[:4], "named.safetensors", "--labels", "list", cwd=tmp_path)
    assert done.returncode == 2 and "--labels list has no effect" in done.stderr


@pytest.fixture
def darknet(tmp_path):
    """A `.weights` of three classes, written in tmp_path/out."""
    (tmp_path / "out").mkdir()
    out = trained(classes=3, live=False)
    export_network(out, tmp_path / "out" / "net.weights")
    return tmp_path / "out" / "net.weights"


def test_a_missing_list_is_named(darknet, command, folder):
    data = darknet.with_suffix(".data")
    data.write_bytes(b"# donn\xe9es\nclasses = 5\nlabels = lists/a.txt # mine\nlabels=net.labels\n")
    found = load_weights(str(darknet))
    told = "no class names: net.data names the list lists/a.txt # mine, which does not exist"
    assert found.classes is None and told in found.remarks
    assert "net.data says classes=5, but the network has 3" in found.remarks
    done = command("main_eval", "--checkpoint", darknet, "--data", folder)
    assert done.returncode == 2 and "lists/a.txt # mine, which does not exist" in done.stderr
    data.write_text("top=5\n")
    assert "has no line labels=FILE" in load_weights(str(darknet)).remarks[-1]


def test_a_relative_list_is_darknets_or_beside_the_data(darknet, tmp_path, monkeypatch):
    darknet.with_suffix(".data").write_text("labels=lists/a.txt\n")
    darknet.with_suffix(".labels").unlink()
    for place in (darknet.parent, tmp_path):
        (place / "lists").mkdir()
        (place / "lists" / "a.txt").write_text("x\ny\nz\n")
    monkeypatch.chdir(tmp_path)
    assert load_weights(str(darknet)).classes == ["x", "y", "z"]
    (tmp_path / "lists" / "a.txt").write_text("z\ny\nx\n")
    with pytest.raises(CheckpointError, match="the two differ"):
        load_weights(str(darknet))
    (tmp_path / "lists" / "a.txt").unlink()
    assert load_weights(str(darknet)).classes == ["x", "y", "z"]


def test_an_exported_data_file_works_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    out = trained(classes=3, live=False)
    export_network(out, type(tmp_path)("out/net.weights"))
    lines = (tmp_path / "out" / "net.data").read_text().splitlines()
    options = dict(line.split("=") for line in lines)
    assert options["labels"] == str(tmp_path / "out" / "net.labels")
    assert options["names"] == str(tmp_path / "out" / "net.names")
    monkeypatch.chdir(tmp_path / "out")
    assert load_weights("net.weights").classes == out.classes
    (tmp_path / "out").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert load_weights(str(tmp_path / "moved" / "net.weights")).classes == out.classes


def test_class_names_of_any_bytes_go_through_darknet(tmp_path):
    names = sorted(["p\udceache", "caf\u00e9", "a\x1b[31mb"])
    net = trained(classes=3, live=False)
    out = Trained(net.net, net.recipe, names)
    export_network(out, tmp_path / "net.weights")
    content = (tmp_path / "net.labels").read_bytes()
    assert content == b"".join(os.fsencode(name) + b"\n" for name in names)
    assert b"\x1b" not in (tmp_path / "net.names").read_bytes()
    export_network(out, tmp_path / "net.safetensors")
    for suffix in (".weights", ".safetensors"):
        assert load_weights(str(tmp_path / f"net{suffix}")).classes == names
    for name in ("apple\n2", "apple\r", ""):
        with pytest.raises(ExportError, match=r"cannot be a line of \.labels"):
            export_network(Trained(net.net, net.recipe, [name, "x", "y"]), tmp_path / "no.weights")
    assert not list(tmp_path.glob("no.*"))
    export_network(
        Trained(net.net, net.recipe, ["a\nb", "x", "y"]), tmp_path / "cut.weights", first_layers=105
    )


# --- config.json


HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
CONFIG = {
    "architecture": "test_resnet",  # timm's smallest
    "num_classes": 3,
    "pretrained_cfg": {
        **HALF,
        "input_size": [3, 64, 64],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
    },
    "label_names": ["zebra", "ant", "bee"],
}


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).state_dict()


@pytest.fixture
def hub(tmp_path, state):
    """Writes a folder in the Hub's layout, with a config.json of the given content."""
    (tmp_path / "hf").mkdir()

    def write(content, name="model.safetensors"):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / "hf" / "config.json").write_bytes(text)
        if not (tmp_path / "hf" / name).exists():
            save_file(state, tmp_path / "hf" / name, {"format": "pt"})
        return tmp_path / "hf"

    return write


def test_a_hub_folder_is_opened_with_its_view_and_names(hub, tmp_path, command):
    hub = hub(CONFIG)
    theirs = timm.create_model(f"local-dir:{hub}", pretrained=True).eval()
    view = timm.data.resolve_model_data_config(theirs)
    transform = create_transform(**view)
    for name in (hub, hub / "model.safetensors"):
        found = load_weights(str(name))
        assert found.classes == ["ant", "bee", "zebra"] and found.file_order == [1, 2, 0]
        recipe = found.recipe
        assert (recipe.data.image_size, recipe.evaluate.crop_pct) == (64, 0.95)
        assert recipe.data.mean == recipe.data.std == (0.5, 0.5, 0.5)
    image = picture(1, 100, 150)
    square = decode.evaluation_view(image, 64, recipe.evaluate)
    ours = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255
    ours = augment.normalize(ours, recipe.data)
    pixels = transform(Image.fromarray(image))[None]
    assert (ours - pixels).abs().max() < 3 / 127.5
    with torch.no_grad():
        expected, got = theirs(pixels)[:, [1, 2, 0]], found.net.eval()(pixels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    cv2.imwrite(str(tmp_path / "a.png"), image[:, :, ::-1])
    done = command(
        "main", "predict", tmp_path / "a.png", "--checkpoint", hub, "--workers", "0", "--batch", "2"
    )
    best = theirs.pretrained_cfg["label_names"][int(theirs(pixels).argmax())]
    assert done.returncode == 0 and done.stdout.splitlines()[1].split()[1] == best
    assert "mean (0.5, 0.5, 0.5)" in done.stderr and "interpolation bicubic" in done.stderr


def test_a_config_counts_in_fine_tuning_and_in_exports(hub, tmp_path):
    hub = hub(CONFIG)
    model = ("model.name=timm/test_resnet", f"model.init_from={hub}", "data.image_size=64")
    net, remarks = init_net(recipes.load_recipe(None, model), ["ant", "bee", "zebra"])
    assert any("tensors loaded" in remark and "all" in remark for remark in remarks)
    assert any(
        "trained with data.normalize=custom, this run has none" in remark for remark in remarks
    )
    found = load_weights(str(hub))
    assert torch.equal(net.fc.weight, found.net.fc.weight)
    export_network(found, tmp_path / "net.safetensors")
    back = load_weights(str(tmp_path / "net.safetensors"))
    assert back.recipe == found.recipe and back.classes == found.classes
    assert back.file_order == found.file_order and equal(back.net, found.net)


def test_keys_that_are_missing_have_timms_defaults(hub):
    hub = hub({"architecture": "test_resnet.r160_in1k", "labels": ["b", "a", "c"]})
    recipe = load_weights(str(hub)).recipe
    view = timm.data.resolve_data_config(
        pretrained_cfg=timm.models.PretrainedCfg(architecture="test_resnet").to_dict()
    )
    assert recipe.data.image_size == view["input_size"][1] == 224
    assert (recipe.evaluate.crop_pct, recipe.evaluate.interpolation) == (
        view["crop_pct"],
        "bicubic",
    )
    assert recipe.data.normalize == "imagenet" and view["mean"] == augment.IMAGENET_MEAN
    assert load_weights(str(hub)).classes == ["a", "b", "c"]


@pytest.mark.parametrize("activation", ["mish", "leaky_relu"])
def test_a_config_of_a_net_of_ours(hub, tmp_path, activation):
    net = timm.create_model("cspdarknet53", num_classes=3, act_layer=activation).eval()
    save_file(net.state_dict(), tmp_path / "hf" / "model.safetensors")
    own = {**CONFIG, "architecture": "cspdarknet53", "model_args": {"act_layer": activation}}
    found = load_weights(str(hub(own)))
    assert found.recipe.model.name == "cspdarknet53"
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected, got = net(pixels)[:, [1, 2, 0]], found.net.eval()(pixels)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


VIEW = CONFIG["pretrained_cfg"]
OWN = {**CONFIG, "architecture": "cspdarknet53"}


@pytest.mark.parametrize(
    "content, told",
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1]", "contains a list, not an object"),
        ({"pretrained_cfg": {}}, "has no architecture"),
        ({**CONFIG, "architecture": "cspdarknet54"}, "timm has no network"),
        ({**CONFIG, "architecture": "resnet18"}, "which timm/resnet18 needs"),
        ({**CONFIG, "pretrained_cfg": [1]}, "pretrained_cfg is not an object"),
        ({**CONFIG, "pretrained_cfg": {**VIEW, "crop_mode": "squash"}}, "crop_mode is 'squash'"),
        ({**CONFIG, "pretrained_cfg": {**VIEW, "interpolation": "lanczos"}}, "is 'lanczos'"),
        ({**CONFIG, "pretrained_cfg": {**VIEW, "mean": [0.5]}}, r"mean is \[0\.5\], not three"),
        ({**CONFIG, "pretrained_cfg": {**VIEW, "std": [0, 1, 1]}}, "data.std is .* must be"),
        ({**CONFIG, "pretrained_cfg": {**VIEW, "crop_pct": "x"}}, "crop_pct is 'x'"),
        ({**CONFIG, "pretrained_cfg": {**VIEW, "crop_pct": 1.5}}, "evaluate.crop_pct is 1.5"),
        ({**CONFIG, "pretrained_cfg": {**VIEW, "input_size": [1, 64, 64]}}, "square RGB images"),
        ({**CONFIG, "pretrained_cfg": {**VIEW, "input_size": [3, 65, 65]}}, "multiple of 32"),
        ({**CONFIG, "num_classes": 0}, "has no classifier"),
        ({**CONFIG, "model_args": {"features_only": True}}, "has no classifier"),
        ({**OWN, "model_args": {"global_pool": "max"}}, "global_pool is 'max'"),
        ({**OWN, "model_args": {"act_layer": "silu"}}, "act_layer is 'silu'"),
        ({**OWN, "model_args": {"stem": {"pool": "max"}}}, "cannot build cspdarknet53 with"),
        ({**CONFIG, "num_classes": 4}, "num_classes is 4, but the weights have 3"),
        ({**CONFIG, "label_names": ["a", "b"]}, "label_names has 2 names"),
        ({**CONFIG, "label_names": ["a", "b", "a"]}, "not a list of unique names"),
        ({**CONFIG, "label_names": {"0": "a"}}, "not a list of unique names"),
    ],
)
def test_a_config_that_cannot_be_used_gives_one_message(hub, content, told):
    with pytest.raises(CheckpointError, match=told) as caught:
        load_weights(str(hub(content)))
    assert "\n" not in str(caught.value)


def test_folders_and_files_that_are_not_the_hubs(hub, tmp_path):
    folder = hub(CONFIG)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has a config\.json, but no model\.safetensors"):
        load_weights(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="is a folder"):
        load_weights(str(folder))
    # Beside a file of another name a config.json may be another program's.
    nameless(folder / "net.pth", 3)
    (folder / "config.json").write_text('{"lr": 0.1}')
    assert load_weights(str(folder / "net.pth")).recipe.data.normalize == "imagenet"


# --- files and paths


@pytest.mark.parametrize("suffix", [".safetensors", ".weights"])
def test_exports_have_the_mode_of_other_files(tmp_path, suffix):
    before = os.umask(0o027)
    try:
        export_network(trained(live=False), tmp_path / f"net{suffix}")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o640}


@pytest.mark.parametrize("suffix", [".safetensors", ".weights", ".onnx", ".pth"])
def test_paths_of_any_bytes(tmp_path, command, suffix):
    folder = tmp_path / "donn\udce9es"
    folder.mkdir()
    out = trained(classes=3, live=False)
    file = folder / f"net{suffix}"
    if suffix == ".pth":
        nameless(file, 3)
    else:
        export_network(out, file)
    assert os.fsencode(file.name) in os.listdir(os.fsencode(folder))
    if suffix != ".onnx":
        assert load_weights(str(file)).net.classes == 3
        cv2.imwrite(str(tmp_path / "a.png"), picture(0))
        call = (
            "predict",
            tmp_path / "a.png",
            "--checkpoint",
            file,
            "--workers",
            "0",
            "--batch",
            "2",
        )
        assert command("main", *call).returncode == 0
        done = command("main", "export", "--checkpoint", file, "--output", folder / "b.safetensors")
        assert done.returncode == 0 and "\\udce9" in done.stdout


def test_a_checkpoint_out_of_reach_gives_one_message(tmp_path, monkeypatch):
    """As root nothing is out of reach: the system's answer is made up."""
    real = os.stat

    def forbidden(path, *arguments, **options):
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", forbidden)
    for name in ("best.pt", "net.safetensors", "net.weights", "net.pth", "net", "hf/"):
        with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
            load_weights(str(tmp_path / name))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="cannot be read: File name too long"):
        load_weights("x" * 300 + ".pth")


def test_what_is_no_file_is_said(tmp_path):
    for name in ("net.safetensors", "net.weights", "net.pth"):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_weights(str(tmp_path / name))
        (tmp_path / name).mkdir()
        with pytest.raises(CheckpointError, match="is a folder"):
            load_weights(str(tmp_path / name))
    (tmp_path / "line\nbreak").mkdir()
    with pytest.raises(ExportError, match="has a line break"):
        export_network(trained(classes=3, live=False), tmp_path / "line\nbreak" / "net.weights")


def test_numbers_of_the_normalisation_are_checked():
    for overrides, told in (
        (["data.normalize=custom"], "needs data.mean"),
        (["data.normalize=custom", "data.mean=[0,0,0]"], "needs data.mean"),
        (["data.mean=[0,0,0]"], "data.mean has no effect, since data.normalize is none"),
        (["data.normalize=custom", "data.mean=[0,0]", "data.std=[1,1,1]"], "three numbers"),
        (["data.normalize=custom", "data.mean=[0,0,0]", "data.std=[1,0,1]"], "must be between"),
    ):
        with pytest.raises(RecipeError, match=told):
            recipes.load_recipe(None, overrides)
    given = ["data.normalize=custom", "data.mean=[0.5,0.1,0.3]", "data.std=[1,0.5,1]"]
    recipe = recipes.load_recipe(None, given)
    assert recipes.recipe_from_yaml(recipes.recipe_to_yaml(recipe)) == recipe
    assert build_net(recipe, 2) and np.isclose(recipe.data.mean[1], 0.1)


def test_an_export_of_another_version_gets_one_message(tmp_path):
    metadata = {"recipe": "average: {decay: 0.9}", "count": 2, "classes": None, "step": 1}
    file = tmp_path / "net.safetensors"
    save_file({"w": torch.zeros(1)}, file, {"cspnet": json.dumps(metadata)})
    with pytest.raises(CheckpointError, match=r"average\.decay was renamed ema\.decay") as caught:
        load_weights(str(file))
    assert str(caught.value).startswith(f"{file}: the stored recipe is of another version")
