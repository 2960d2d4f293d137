"""Darknet's files: against OpenCV's reader, a writer from the table of layers, known sizes."""

import re
import struct
from hashlib import sha256
from math import prod
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from cspnet.nets import create
from cspnet.nets.csp import ACTIVATIONS, CspNet
from cspnet.weights.darknet_cfg import create_from_cfg, parse_cfg, to_cfg
from cspnet.weights.darknet_format import (
    DARKNET_NETWORKS,
    DarknetFormatError,
    cfg_sections,
    load_darknet_weights,
    to_darknet_weights,
)
from tests.conftest import ROOT, picture
from tests.helpers import live

SMALL = {"width": 0.25, "classes": 10}
PHOTOS = ROOT / "data" / "local" / "imagenet-sample"  # <synset>/*.JPEG
SIZE = 64
MANY = 3 * 2**32 + 5  # images seen, more than 32 bits hold


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def meta():
    """Nets without memory, where only the graph matters."""
    with torch.device("meta"):
        yield


def scramble(net: CspNet) -> CspNet:
    """Draw every weight and every statistic anew; no two tensors of a net are alike."""
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_().div_(
                tensor[0].numel() ** 0.5
            )  # by the inputs: activations stay finite
    return net


def digest(data: bytes) -> str:
    """Equal where the bytes are; a failure prints these, not megabytes."""
    return sha256(data).hexdigest()


def bits(net: nn.Module) -> dict[str, str]:
    """Digests of all tensors by their names."""
    return {name: digest(t.contiguous().numpy().tobytes()) for name, t in net.state_dict().items()}


# --- there and back


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", DARKNET_NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_round_trip(tmp_path, name, activation, layout):
    net = scramble(create(name, activation=activation, **SMALL)).to(memory_format=layout)
    (tmp_path / "a.cfg").write_text(to_cfg(net, 96))
    (tmp_path / "a.weights").write_bytes(to_darknet_weights(net, MANY))

    other, size = create_from_cfg(tmp_path / "a.cfg")
    assert (size, other.name, other.classes) == (96, name, 10)
    other = scramble(other).to(memory_format=layout)
    places = [tensor.data_ptr() for tensor in other.state_dict().values()]
    assert bits(other) != bits(net)
    assert load_darknet_weights(other, tmp_path / "a.weights") == MANY
    assert bits(other) == bits(net)
    # filled where they lie, so that an optimizer or an average keeps its hold of them
    assert places == [tensor.data_ptr() for tensor in other.state_dict().values()]
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net.eval()(images), other.eval()(images))
    assert to_cfg(other, 96) == to_cfg(net, 96)
    assert digest(to_darknet_weights(other, MANY)) == digest((tmp_path / "a.weights").read_bytes())


@pytest.mark.parametrize("width", [0.01, 0.125, 0.3, 0.302, 1, 1.1])
@pytest.mark.parametrize("name", DARKNET_NETWORKS)
def test_any_width_comes_back_from_its_cfg(tmp_path, meta, name, width):
    path = tmp_path / "a.cfg"
    path.write_text(to_cfg(create(name, width=width, classes=7), SIZE))
    other, _ = create_from_cfg(path)
    assert to_cfg(other, SIZE) == path.read_text()


# --- OpenCV's reader


def photos() -> list[np.ndarray]:
    paths = sorted(PHOTOS.glob("*/*.JPEG"))
    if len(paths) < 24:
        pytest.skip(f"no photos in {PHOTOS}")
    return [cv2.imread(str(path))[:, :, ::-1] for path in paths[:: len(paths) // 24][:24]]


def synthetic() -> list[np.ndarray]:
    return [picture(seed) for seed in range(24)]


@pytest.fixture
def one_thread():
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", DARKNET_NETWORKS)
@pytest.mark.parametrize("source", [photos, synthetic])
def test_opencv_agrees(tmp_path, one_thread, source, name, activation):
    pictures = [cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for image in source()]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255  # [24, 3, 64, 64]

    net = live(create(name, activation=activation, norm_momentum=1.0, **SMALL))
    with torch.no_grad():
        # A random net tells images hardly apart: take their own statistics, widen what is left.
        net.train()(images)
        logits = net.eval()(images)  # [24, 10]
        head = net.head.fc
        factor = 2 / logits.std(0).mean()
        head.bias.sub_(logits.mean(0)).mul_(factor)
        head.weight.mul_(factor)
    cfg, weights = tmp_path / "a.cfg", tmp_path / "a.weights"
    cfg.write_text(to_cfg(net, SIZE))
    weights.write_bytes(to_darknet_weights(net, 0))

    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-6  # OpenCV's; Darknet's and ours is 1e-5
    # float64: in float32 the rounding of both sides comes near the tolerance
    with torch.no_grad():
        expected = net.double()(images.double()).softmax(1).numpy()
    top = expected.max(1)
    assert top.mean() > 0.3 and top.std() > 0.1 and len(set(expected.argmax(1))) > 3

    theirs = cv2.dnn.readNetFromDarknet(str(cfg), str(weights))
    theirs.enableWinograd(False)  # for its rounding
    theirs.setInput(images.numpy())
    probabilities = theirs.forward().reshape(expected.shape)
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-4)


# --- full size


def plain_sections(text: str) -> list[tuple[str, dict[str, str]]]:
    """A reader of our own `.cfg` that shares nothing with the one under test."""
    found = []
    for block in text.strip().split("\n\n"):
        head, *options = block.split("\n")
        found.append((head.strip("[]"), dict(option.split("=") for option in options)))
    return found


def count(text: str) -> dict[str, int]:
    """Follow the shapes through a `.cfg`, by Darknet's rules, and add up what the layers cost."""
    (kind, options), *layers = plain_sections(text)
    assert kind == "net"
    shape = int(options["channels"]), int(options["height"]), int(options["width"])
    shapes = []
    total = {"layers": len(layers), "convolutions": 0, "macs": 0, "parameters": 0, "floats": 0}
    for index, (kind, options) in enumerate(layers):

        def earlier(reference: str, index: int = index) -> tuple[int, int, int]:
            where = int(reference) + (index if int(reference) < 0 else 0)
            assert 0 <= where < index
            return shapes[where]

        inputs, height, width = shape
        if kind == "convolutional":
            filters, size, stride = (int(options[k]) for k in ("filters", "size", "stride"))
            padding = size // 2 if options["pad"] == "1" else 0
            height, width = ((n + 2 * padding - size) // stride + 1 for n in (height, width))
            shape = filters, height, width
            values = size * size * inputs * filters
            vectors = 4 if options.get("batch_normalize") == "1" else 1
            total["convolutions"] += 1
            total["macs"] += values * height * width
            total["parameters"] += values + min(vectors, 2) * filters
            total["floats"] += values + vectors * filters
        elif kind == "route":
            joined = [earlier(reference) for reference in options["layers"].split(",")]
            assert len({size for _, *size in map(list, joined) for size in size}) == 1
            shape = sum(channels for channels, *_ in joined), *joined[0][1:]
        elif kind == "shortcut":
            assert earlier(options["from"]) == shape and options["activation"] == "linear"
        elif kind == "avgpool":
            shape = inputs, 1, 1
        else:
            assert kind == "softmax" and index == len(layers) - 1
        shapes.append(shape)
    total["outputs"] = prod(shape)
    return total


@pytest.mark.parametrize(
    ("name", "layers", "convolutions", "parameters", "gflop", "size"),
    [  # counted from the published cfgs
        ("cspdarknet53", 108, 73, 27_642_184, 13.067, 110_710_068),
        ("darknet53", 78, 53, 41_609_928, 18.570, 166_582_580),
    ],
)
def test_full_size(name, layers, convolutions, parameters, gflop, size):
    net = create(name)
    total = count(to_cfg(net, 256))
    assert (total["layers"], total["convolutions"]) == (layers, convolutions)
    assert total["parameters"] == parameters == sum(p.numel() for p in net.parameters())
    assert round(2 * total["macs"] / 1e9, 3) == gflop
    assert total["outputs"] == 1000
    assert len(to_darknet_weights(net, 0)) == size == 20 + 4 * total["floats"]
    backbone = to_darknet_weights(net, 0, first_layers=layers - 3)
    assert len(backbone) == size - 4 * 1000 * (1024 + 1)


# --- byte by byte

# The cfgs: the index of each stage's first layer, and its blocks
STAGES = [(1, 1), (11, 2), (24, 8), (55, 8), (86, 4)]


def floats(*arrays: np.ndarray) -> bytes:
    values = [value for array in arrays for value in array.ravel().tolist()]
    return struct.pack(f"<{len(values)}f", *values)


def plain_layers(net: CspNet) -> dict[int, bytes]:
    """What each convolution of cspdarknet53 is in the file, by its index in the `.cfg`."""
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    layers = {}

    def put(index: int, name: str, rows: slice = slice(None), columns=slice(None)) -> None:
        norm = [state[f"{name}.bn.{n}"] for n in ("bias", "weight", "running_mean", "running_var")]
        weight = state[f"{name}.conv.weight"][rows]
        layers[index] = floats(*(vector[rows] for vector in norm), weight[:, columns])

    put(0, "stem.conv1")
    for number, (first, depth) in enumerate(STAGES):
        stage = f"stages.{number}"
        half = len(state[f"{stage}.conv_exp.conv.weight"]) // 2
        after = first + 3 * depth
        put(first, f"{stage}.conv_down")
        put(first + 1, f"{stage}.conv_exp", slice(0, half))  # X
        put(first + 3, f"{stage}.conv_exp", slice(half, 2 * half))  # M
        for block in range(depth):
            put(first + 4 + 3 * block, f"{stage}.blocks.{block}.conv1")
            put(first + 5 + 3 * block, f"{stage}.blocks.{block}.conv2")
        put(after + 4, f"{stage}.conv_transition_b")  # T
        swapped = [*range(half, 2 * half), *range(half)]  # theirs joins [T, X], ours [X, T]
        put(after + 6, f"{stage}.conv_transition", columns=swapped)  # O
    layers[106] = floats(state["head.fc.bias"], state["head.fc.weight"])
    return layers


def test_bytes_are_those_of_the_table():
    net = scramble(create("cspdarknet53", **SMALL))
    layers = plain_layers(net)
    body = b"".join(layers[index] for index in sorted(layers))
    assert to_darknet_weights(net, MANY)[:20] == struct.pack("<iiiQ", 0, 2, 5, MANY)
    assert digest(to_darknet_weights(net, MANY)[20:]) == digest(body)

    _, *cfg = plain_sections(to_cfg(net, SIZE))
    assert [i for i, (kind, _) in enumerate(cfg) if kind == "convolutional"] == sorted(layers)
    assert all(cfg[first + 2] == ("route", {"layers": "-2"}) for first, _ in STAGES)
    for first, depth in STAGES:
        index = first + 3 * depth + 5
        x = int(cfg[index][1]["layers"].removeprefix("-1,")) + index
        assert (cfg[index][0], x) == ("route", first + 1)


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 11, 104, 105, 106, 107, 108])
def test_cut(cut):
    net = scramble(create("cspdarknet53", **SMALL))
    layers = plain_layers(net)
    expected = b"".join(layers[index] for index in sorted(layers) if index < cut)
    written = to_darknet_weights(net, MANY, first_layers=cut)
    assert written[:20] == struct.pack("<iiiQ", 0, 2, 5, 0)
    assert digest(written[20:]) == digest(expected)


@pytest.mark.parametrize(("name", "layers"), [("cspdarknet53", 108), ("darknet53", 78)])
def test_cut_out_of_range(meta, name, layers):
    net = create(name, **SMALL)
    for cut in (-1, 0, layers + 1):
        with pytest.raises(DarknetFormatError, match=f"first-layers must be 1 to {layers}"):
            to_darknet_weights(net, 0, first_layers=cut)


# --- other people's .weights


@pytest.mark.parametrize(
    ("version", "seen"), [((0, 1, 0), "I"), ((0, 2, 0), "Q"), ((1, 0, 0), "Q")], ids=str
)
def test_versions(tmp_path, version, seen):
    header = struct.pack(f"<iii{seen}", *version, 2**32 - 3)
    net, other = (scramble(create("cspdarknet53", **SMALL)) for _ in range(2))
    path = tmp_path / "a.weights"
    path.write_bytes(header + to_darknet_weights(net, 0)[20:])
    assert load_darknet_weights(other, path) == 2**32 - 3
    assert bits(other) == bits(net)


def refuse_weights(path: Path, net: CspNet, *said: str) -> None:
    before = bits(net)
    with pytest.raises(DarknetFormatError) as caught:
        load_darknet_weights(net, path)
    for part in (str(path), *said):
        assert part in str(caught.value)
    assert bits(net) == before


@pytest.mark.parametrize("name", DARKNET_NETWORKS)
@pytest.mark.parametrize("old", [False, True])
def test_wrong_size(tmp_path, name, old):
    net = create(name, **SMALL)
    data = to_darknet_weights(net, 7)
    if old:
        data = struct.pack("<iiiI", 0, 1, 0, 7) + data[20:]
    path = tmp_path / "a.weights"
    for wrong in (data[:-4], data[:-1], data + b"\0", data + data[-4:], data[:20], data + data):
        path.write_bytes(wrong)
        refuse_weights(path, net, f"{len(wrong):,} bytes", f"{len(data):,}", name, "10 classes")


def test_weights_of_another_net(tmp_path):
    path = tmp_path / "a.weights"
    net = create("cspdarknet53", **SMALL)
    for other in (
        create("darknet53", **SMALL),
        create("cspdarknet53", width=0.25, classes=11),
        create("cspdarknet53", width=0.5, classes=10),
    ):
        path.write_bytes(to_darknet_weights(other, 0))
        refuse_weights(path, net, f"{path.stat().st_size:,}")
    path.write_bytes(to_darknet_weights(net, 0, first_layers=105))
    refuse_weights(path, net, f"{path.stat().st_size:,}")


def test_truncated_header(tmp_path):
    net = create("cspdarknet53", **SMALL)
    data = to_darknet_weights(net, 7)
    path = tmp_path / "a.weights"
    for length in (0, 1, 11, 12, 15, 16, 19):
        path.write_bytes(data[:length])
        refuse_weights(path, net, f"{length} bytes")


def test_garbage(tmp_path):
    net = create("cspdarknet53", **SMALL)
    size = len(to_darknet_weights(net, 0))
    path = tmp_path / "a.weights"
    for garbage in (
        b"<!DOCTYPE html><html><head><title>Sign in</title>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n",
        b"PK\x03\x04" + bytes(100),
        b"\x7f" * size,
        # of the right size for their version
        *(struct.pack("<ii", *v) + bytes(size - 8) for v in ((0, 1000), (1000, 0))),
        *(struct.pack("<ii", *v) + bytes(size - 12) for v in ((0, -1), (-1, 0))),
    ):
        path.write_bytes(garbage)
        refuse_weights(path, net, "version")
    path.write_bytes(bytes(100))
    refuse_weights(path, net, "100 bytes")


# --- other people's .cfg

NET = "[net]\nheight=64\nwidth=64\nchannels=3\n"


def test_parse_cfg_reads_as_darknet_does(tmp_path):
    path = tmp_path / "a.cfg"
    path.write_bytes(
        b"# a comment = none\r\n\r\n [ network ] \r\n; another\r\n\twidth = 2 5 6\t\r\n#width=1\r\n"
        b"policy=a=b\r\n[ route]\nlayers = -1, -7\nlayers=-2\n[avgpool]\n# \xff\xfe\n[softmax]"
    )
    assert parse_cfg(path) == [
        ("network", {"width": "256", "policy": "a=b"}),
        ("route", {"layers": "-1,-7"}),  # the first of two is the one that Darknet finds
        ("avgpool", {}),
        ("softmax", {}),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "net"),
        ("\n# nothing\n", "net"),
        ("width=256\n[net]\n", "line 1"),
        ("[net]\nwidth=256\n\nconvolutional\n", "line 4"),
        ("[net]\n# a comment\n[convolutional\n", "line 3"),
        ("[convolutional]\nfilters=8\n", "[net]"),
        ("[]\n", "[net]"),
        ("\0\1\2\3", "line 1"),
        (NET, "convolution"),
        (NET + "[convolutional]\nfilters=8\n", "convolution"),
        (NET + 2 * "[convolutional]\n", "layer 0"),
        (NET + 2 * "[convolutional]\nfilters=8\n", "layer"),
    ],
)
def test_no_cfg_of_a_net(tmp_path, text, said):
    path = tmp_path / "a.cfg"
    path.write_text(text)
    refuse_cfg(path, said)


def refuse_cfg(path: Path, said: str) -> None:
    with pytest.raises(DarknetFormatError, match=re.escape(said) + r"(?!\d)") as caught:
        create_from_cfg(path)
    assert str(path) in str(caught.value)


class Cfg:
    """A `.cfg` to be changed: a list of sections, the first one [net]; `layers` start after it."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        with torch.device("meta"):
            self.net, *self.layers = plain_sections(to_cfg(create(name, **SMALL), SIZE))

    def options(self, layer: int | None) -> dict[str, str]:
        return (self.net if layer is None else self.layers[layer])[1]

    def write(self) -> Path:
        lines = []
        for kind, options in [self.net, *self.layers]:
            lines += [f"[{kind}]", *(f"{key}={value}" for key, value in options.items())]
        self.path.write_text("\n".join(lines))
        return self.path


@pytest.fixture(params=DARKNET_NETWORKS)
def cfg(tmp_path, request) -> Cfg:
    return Cfg(tmp_path / "a.cfg", request.param)


@pytest.fixture
def cross(tmp_path) -> Cfg:
    return Cfg(tmp_path / "a.cfg", "cspdarknet53")


def test_comments_and_blanks_change_nothing(cfg):
    text = cfg.write().read_text()
    text = text.replace("[net]", "# from a forum\n\n[network]").replace("=", " = ")
    cfg.path.write_text(text.replace("\n[", "\n\n; next\n [").replace("\n", "\r\n"))
    net, size = create_from_cfg(cfg.path)
    assert plain_sections(to_cfg(net, size))[1:] == cfg.layers


def test_what_darknet_assumes_may_be_left_out(cfg):
    for _, options in cfg.layers:
        for key, assumed in (("size", "1"), ("stride", "1"), ("groups", "1")):
            if options.get(key) == assumed:
                del options[key]
    net, size = create_from_cfg(cfg.write())
    assert to_cfg(net, size) == to_cfg(create(net.name, **SMALL), SIZE)


# Of cspdarknet53: all kinds of layers of its first stage, one inside, the last stage's O, the
# classifier and softmax. A reader may take the width from the first or from the last filters.
@pytest.mark.parametrize("layer", [0, 1, 3, 7, 9, 54, 104, 106, 107])
def test_one_changed_key(cross, layer):
    where = f"layer {layer}"
    for key, value in list(cross.options(layer).items()):
        if key == "filters" and layer == 106:
            continue
        # A net of another width has other filters from its first layer on.
        said = "layer" if key == "filters" and layer in (0, 104) else where
        for wrong in {
            "activation": ("relu", "mish,leaky"),
            "layers": ("-1", "-1,-8", "x"),
            "from": ("-2", "-33", "x"),
            "batch_normalize": ("0", ""),
            "stride": ("0", "3"),
        }.get(key, (f"{value}0", "x")):
            cross.options(layer)[key] = wrong
            refuse_cfg(cross.write(), said)
        cross.options(layer)[key] = value
    create_from_cfg(cross.write())


@pytest.mark.parametrize(
    ("layer", "key"),
    [
        *((0, key) for key in ("batch_normalize", "filters", "size", "pad", "activation")),
        *((1, key) for key in ("batch_normalize", "filters", "size", "stride", "pad")),
        (3, "layers"),
        (7, "from"),
        (54, "batch_normalize"),
        (104, "filters"),
        (106, "filters"),
        (106, "activation"),
    ],
)
def test_one_missing_key(cross, layer, key):
    del cross.options(layer)[key]
    refuse_cfg(cross.write(), f"layer {layer}")


@pytest.mark.parametrize(
    ("layer", "key", "value"),
    [
        (1, "groups", "2"),
        (1, "dilation", "2"),
        (1, "stride_x", "1"),
        (3, "groups", "2"),
        (7, "weights_type", "per_channel"),
        (106, "batch_normalize", "1"),
        (107, "temperature", "2"),
    ],
)
def test_one_key_more(cross, layer, key, value):
    cross.options(layer)[key] = value
    refuse_cfg(cross.write(), f"layer {layer}")


@pytest.mark.parametrize(
    "filters", ["", "x", "²", "1.5", "0", "-1", "-8", "9" * 12, "9" * 30, "9" * 5000]
)
@pytest.mark.parametrize("layer", [0, 73, 76], ids=["stem", "last", "classifier"])
def test_filters_that_no_net_has(tmp_path, layer, filters):
    cfg = Cfg(tmp_path / "a.cfg", "darknet53")
    cfg.options(layer)["filters"] = filters
    refuse_cfg(cfg.write(), "layer")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("width", value) for value in (None, "", "x", "0", "-256", "256.5", "²")),
        ("height", "128"),
        ("channels", "1"),
    ],
)
def test_net_section(cross, key, value):
    cross.options(None).pop(key)
    if value is not None:
        cross.options(None)[key] = value
    refuse_cfg(cross.write(), key)


def test_layers_missing_or_too_many(cfg):
    layers = cfg.layers
    for index in (0, 2, 3, 4, len(layers) - 3, len(layers) - 2):
        cfg.layers = layers[:index] + layers[index + 1 :]
        refuse_cfg(cfg.write(), f"layer {index}")
        cfg.layers = [*layers[:index], ("maxpool", {"size": "2"}), *layers[index:]]
        refuse_cfg(cfg.write(), f"layer {index}")
    for wrong in (layers[:-1], [*layers, layers[-1]], layers + layers):
        cfg.layers = wrong
        refuse_cfg(cfg.write(), f"{len(layers)}")  # as many as there should be


def test_wrong_kind(cfg):
    last = len(cfg.layers) - 1
    for index in (0, 3, 4, last - 2, last - 1, last):
        kind, options = cfg.layers[index]
        for wrong in ("connected", ""):
            cfg.layers[index] = wrong, options
            refuse_cfg(cfg.write(), f"layer {index}")
        cfg.layers[index] = kind, options


def test_a_detector_is_said_to_be_one(cross):
    """As yolov4.cfg: the backbone's first 105 layers, then a neck and heads."""
    backbone = cross.layers[:105]
    for neck in (
        [("route", {"layers": "85"}), ("upsample", {"stride": "2"}), ("yolo", {"mask": "0,1,2"})],
        [("yolo", {"mask": "0,1,2"})],
        [("region", {"anchors": "1,1"})],
        [("Gaussian_yolo", {})],
    ):
        cross.layers = [*backbone, *neck]
        kind = next(kind for kind, _ in neck if kind != "route")
        refuse_cfg(cross.write(), "describes a detector")
        refuse_cfg(
            cross.path, f"layer {[kind for kind, _ in cross.layers].index(kind)} is [{kind}]"
        )


def backbones() -> dict[str, list[tuple[str, int]]]:
    """Kinds and sizes of the layers of other backbones, in Darknet's order."""
    conv, end = "convolutional", [("avgpool", 1), ("convolutional", 1), ("softmax", 1)]
    residual = [(conv, 1), (conv, 3), (conv, 1), ("shortcut", 1)]
    cross = [(conv, 1), ("route", 1), (conv, 1), *residual * 3, (conv, 1), ("route", 1), (conv, 1)]
    return {
        "resnet50": [(conv, 7), ("maxpool", 2), *residual * 16, *end],
        "csresnet50": [(conv, 7), ("maxpool", 2), *[*cross, (conv, 3)] * 4, *end],
        "darknet19": [*[(conv, 3), ("maxpool", 2), (conv, 3), (conv, 1), (conv, 3)] * 5, *end],
        "vgg16": [*[(conv, 3), (conv, 3), ("maxpool", 2)] * 5, *[("connected", 1)] * 3],
    }


@pytest.mark.parametrize("name", backbones())
def test_another_backbone_is_said_to_be_one(cross, name):
    layers = [(kind, {"size": str(size), "filters": "32"}) for kind, size in backbones()[name]]
    cross.layers = layers
    refuse_cfg(
        cross.write(), "describes an unsupported backbone; supported are cspdarknet53 and darknet53"
    )


def test_short_names_a_mark_of_utf8_and_the_loss_are_darknets(cfg):
    text = cfg.write().read_text()
    for long, short in (("convolutional", "conv"), ("avgpool", "avg"), ("softmax", "soft")):
        text = text.replace(f"[{long}]", f"[{short}]")
    cfg.path.write_bytes(b"\xef\xbb\xbf" + f"{text}\n[cost]\ntype=sse\n".encode())
    net, size = create_from_cfg(cfg.path)
    assert plain_sections(to_cfg(net, size))[1:] == cfg.layers


def test_a_backbone_file_is_said_to_be_one(tmp_path):
    net = create("darknet53", classes=3, width=0.0625)
    path = tmp_path / "a.weights"
    for cut in (20, 74):
        path.write_bytes(to_darknet_weights(net, 0, first_layers=cut))
        refuse_weights(path, net, f"only the first {cut} layers, a backbone without a classifier")
    whole = to_darknet_weights(net, 0)
    for data, told in ((whole[:-4], "truncated"), (whole + bytes(4), "extra bytes")):
        path.write_bytes(data)
        refuse_weights(path, net, told)


# --- nets without a Darknet file


@pytest.mark.parametrize("name", ["cspresnet50", "cspresnext50"])
def test_timms_nets_are_refused(tmp_path, meta, name):
    net = create(name, **SMALL)
    path = tmp_path / "a.weights"
    path.write_bytes(struct.pack("<iiiQ", 0, 2, 5, 0))
    for call in (
        lambda: list(cfg_sections(net)),
        lambda: to_cfg(net, SIZE),
        lambda: to_darknet_weights(net, 0),
        lambda: to_darknet_weights(net, 0, first_layers=3),
        lambda: load_darknet_weights(net, path),
    ):
        with pytest.raises(DarknetFormatError, match=f"{name}.*only cspdarknet53 and darknet53"):
            call()


@pytest.mark.parametrize("option", [{"leaky_slope": 0.01}, {"norm_eps": 1e-3}])
def test_what_a_cfg_cannot_say_is_refused(meta, option):
    # Darknet's leaky is 0.1 and its epsilon 1e-5, whatever we were trained with
    net = create("cspdarknet53", activation="leaky", **SMALL, **option)
    with pytest.raises(DarknetFormatError, match=next(iter(option))):
        to_cfg(net, SIZE)
    to_cfg(create("cspdarknet53", activation="mish", leaky_slope=0.01, **SMALL), SIZE)
