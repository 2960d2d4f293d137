"""A trained net out to every format and in again."""

import json

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import cspnet
from cspnet.data import augment
from cspnet.errors import CheckpointError
from cspnet.images import decode
from cspnet.inference.evaluate import evaluate_network
from cspnet.recipe.load import load_recipe
from cspnet.runtime.device import Precision
from cspnet.sources.data_root import open_validation
from cspnet.weights.export import ExportError, export_network
from cspnet.weights.load import load_weights
from cspnet.weights.trained import Trained, build_net
from tests.conftest import ROOT, picture
from tests.helpers import equal, run_lines, trained, views


@pytest.mark.parametrize("name", ["cspdarknet53", "darknet53"])
@pytest.mark.parametrize("activation", ["mish", "leaky"])
@pytest.mark.parametrize("suffix", [".safetensors", ".weights"])
def test_round_trip_is_bit_exact(tmp_path, name, activation, suffix):
    out = trained(f"model.name={name}", f"model.activation={activation}")
    path = tmp_path / f"net{suffix}"
    export_network(out, path)
    back = load_weights(str(path))
    assert equal(back.net, out.net)
    assert back.classes == out.classes and back.images_seen == out.images_seen
    assert back.recipe.model.activation == activation and back.recipe.data.image_size == 64
    if suffix == ".safetensors":
        assert back.recipe == out.recipe and back.averaged


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.activation=mish", "data.normalize=imagenet", "evaluate.interpolation=antialias"),
        ("model.activation=leaky", "model.leaky_slope=0.1", "evaluate.crop_pct=0.9"),
        ("model.activation=leaky", "model.leaky_slope=0.01", "data.normalize=imagenet"),
        ("model.norm_eps=0.01", "evaluate.interpolation=bicubic", "evaluate.crop_pct=0.8"),
        (
            *("data.normalize=custom", "data.mean=[0.5,0.4,0.3]", "data.std=[0.2,0.3,0.4]"),
            "evaluate.interpolation=antialias",
        ),
        ("model.name=darknet53", "model.activation=leaky", "model.norm_eps=0.001"),
        ("digits",),
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_the_printed_lines_give_our_logits_in_timm(tmp_path, overrides):
    if overrides == ("digits",):
        recipe = load_recipe(ROOT / "recipes" / "digits.yaml", ["model.width=1"])
    else:
        recipe = load_recipe(None, ["data.image_size=64", *overrides])
    out = Trained(build_net(recipe, 10).eval(), recipe, None)
    with torch.no_grad():  # statistics in whose company a slope or an epsilon matters
        for module in out.net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    defined = run_lines(export_network(out, tmp_path / "net.safetensors"))
    assert equal(defined["net"], out.net)
    image = picture(3, 90, 131)
    theirs = defined["transform"](Image.fromarray(image))
    view = decode.evaluation_view(image, recipe.data.image_size, recipe.evaluate)
    ours = torch.from_numpy(view).permute(2, 0, 1)[None].float() / 255
    ours = augment.normalize(ours, recipe.data)
    _, std = augment.mean_and_std(recipe.data)
    off = (theirs - ours[0]).abs() * torch.tensor(std)[:, None, None] * 255
    assert off.max() < 1.01 and (off > 0.01).float().mean() < 0.02  # PIL rounds otherwise
    with torch.no_grad():
        expected, got = out.net(ours), defined["net"](ours)
    assert (expected - got).abs().max() <= 1e-4 * expected.abs().max()


def test_onnx_logits_and_pyramid_at_other_batch_sizes(tmp_path):
    import onnxruntime

    out = trained()
    export_network(out, tmp_path / "net.onnx")
    export_network(out, tmp_path / "maps.onnx", pyramid=True)
    for batch in (1, 5):
        images = views(batch)
        with torch.no_grad():
            expected = {"net": [out.net(images)], "maps": out.net.pyramid(images)}
        for name, tensors in expected.items():
            session = onnxruntime.InferenceSession(str(tmp_path / f"{name}.onnx"))
            got = session.run(None, {"images": images.numpy()})
            assert len(got) == len(tensors)
            for theirs, ours in zip(got, tensors, strict=True):
                np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    names = [output.name for output in session.get_outputs()]
    assert names == ["p8", "p16", "p32"]


IMAGENETS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    "overrides, values",
    [
        (("data.normalize=imagenet",), IMAGENETS),
        (
            ("data.normalize=custom", "data.mean=[0.5,0.4,0.3]", "data.std=[0.1,0.2,0.5]"),
            ([0.5, 0.4, 0.3], [0.1, 0.2, 0.5]),
        ),
    ],
    ids=["imagenet", "custom"],
)
def test_mean_and_deviation_are_folded_for_darknet(tmp_path, overrides, values):
    """Exact away from the border: the first convolution of black-framed images, compared inside."""
    out = trained(*overrides)
    remarks = export_network(out, tmp_path / "net.weights")
    assert any("folded" in remark for remark in remarks)
    back = load_weights(str(tmp_path / "net.weights")).net
    images = views(4)
    mean, std = (torch.tensor(part)[:, None, None] for part in values)
    with torch.no_grad():
        ours = out.net.stem((images - mean) / std)
        theirs = back.eval().stem(images)
    torch.testing.assert_close(theirs[..., 1:-1, 1:-1], ours[..., 1:-1, 1:-1], rtol=1e-4, atol=1e-4)


def test_labels_that_are_not_sorted_are_put_in_order(tmp_path):
    """As Darknet's imagenet.labels.list: index by index another class than ours."""
    out = trained(classes=3)
    export_network(out, tmp_path / "my net.weights")
    (tmp_path / "my net.labels").write_text("cherry\napple\nbanana\n")
    back = load_weights(str(tmp_path / "my net.weights"))
    assert back.classes == ["apple", "banana", "cherry"]
    images = views(2)
    with torch.no_grad():
        ours, theirs = out.net(images), back.net.eval()(images)
    torch.testing.assert_close(theirs, ours[:, [1, 2, 0]])


def test_four_formats_report_the_same_top1(tmp_path):
    """A net trained for a moment on the digits; the Darknet file is run by OpenCV."""
    import onnxruntime

    view = [
        "evaluate.interpolation=antialias",
        "evaluate.crop_pct=0.9",
    ]  # not Darknet's: the .cfg keeps it
    recipe = load_recipe(
        None, ["data.root=digits", "data.image_size=64", "model.width=0.125", *view]
    )
    source = open_validation("digits", None, 10)
    net = build_net(recipe, 10)
    images = torch.stack(
        [
            torch.from_numpy(
                decode.evaluation_view(decode.decode(source.read(i)[0]), 64, recipe.evaluate)
            )
            for i in range(len(source))
        ]
    )
    pixels = images.permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(source.labels).long()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum, module.group = 0.2, None
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        chosen = torch.randperm(len(source), generator=generator)[:64]
        torch.nn.functional.cross_entropy(net(pixels[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    out = Trained(net, recipe, source.classes)
    precision = Precision("fp32", "")
    expected = evaluate_network(net, source, recipe, precision, workers=0).top1
    assert 20 < expected < 100
    for suffix in (".safetensors", ".weights", ".onnx"):
        export_network(out, tmp_path / f"net{suffix}")
    for suffix in (".safetensors", ".weights"):
        back = load_weights(str(tmp_path / f"net{suffix}"))
        assert back.recipe.evaluate.interpolation == "antialias"
        assert (
            evaluate_network(back.net, source, back.recipe, precision, workers=0).top1 == expected
        )
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    logits = session.run(None, {"images": pixels.numpy()})[0]
    reader = cv2.dnn.readNetFromDarknet(str(tmp_path / "net.cfg"), str(tmp_path / "net.weights"))
    reader.setInput(pixels.numpy())
    for scores in (logits, reader.forward().reshape(len(source), 10)):
        assert 100 * (scores.argmax(1) == source.labels).mean() == pytest.approx(expected)


def test_a_bare_state_dict_is_recognised_and_said(tmp_path):
    theirs = timm.create_model("darknet53", num_classes=7)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "net.pth")
    back = load_weights(str(tmp_path / "net.pth"))
    assert equal(back.net, theirs) and back.net.name == "darknet53"
    assert back.recipe.model.leaky_slope == 0.01 and back.recipe.data.normalize == "imagenet"
    assert "assuming timm's" in back.remarks[0]
    assert isinstance(cspnet.load(tmp_path / "net.pth"), type(back.net))


def test_files_that_do_not_fit_name_the_first_tensor(tmp_path):
    state = build_net(load_recipe(None, ["model.width=0.25"]), 10).state_dict()
    state["stages.1.conv_down.conv.weight"] = torch.zeros(8, 8, 3, 3)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"stages\.1\.conv_down.*\[8, 8, 3, 3\].*\[32, 16, 3"):
        load_weights(str(tmp_path / "a.pth"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="unsupported architecture"):
        load_weights(str(tmp_path / "b.pth"))
    (tmp_path / "c.safetensors").write_bytes(b"torn" * 10)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_weights(str(tmp_path / "c.safetensors"))
    (tmp_path / "d.weights").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"needs its \.cfg"):
        load_weights(str(tmp_path / "d.weights"))
    with pytest.raises(CheckpointError, match="no network of this name"):
        load_weights("timm:resnet81")


def test_exports_that_cannot_be(tmp_path):
    out = trained(live=False)
    for name, options, told in (
        ("net.pt", {}, "the suffix must be one of"),
        ("no/net.onnx", {}, "does not exist"),
        ("net.weights", {"pyramid": True}, "--pyramid requires .onnx"),
        ("net.onnx", {"first_layers": 3}, "--first-layers requires .weights"),
        ("net.weights", {"first_layers": 0}, "1 to 108"),
    ):
        with pytest.raises(ExportError, match=told):
            export_network(out, tmp_path / name, **options)
    slope = trained("model.activation=leaky", "model.leaky_slope=0.01", live=False)
    with pytest.raises(ExportError, match=r"Darknet's is always 0\.1"):
        export_network(slope, tmp_path / "net.weights")
    other = trained("model.name=cspresnet50", live=False)
    with pytest.raises(ExportError, match="differs from Darknet's"):
        export_network(other, tmp_path / "net.weights")
    assert not list(tmp_path.iterdir())


def test_export_and_eval_as_commands(tmp_path, command):
    out = trained("data.root=digits", "data.image_size=32", live=False)
    digits = [str(number) for number in range(10)]
    out = Trained(out.net, out.recipe, digits, 70, True, 70 * 128)
    export_network(out, tmp_path / "a.safetensors")
    done = command(
        "main", "export", "--checkpoint", "a.safetensors", "--output", "b.weights", cwd=tmp_path
    )
    assert done.returncode == 0 and "EMA weights" in done.stdout, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.safetensors", "b.weights", "b.cfg", "b.data", "b.names", "b.labels"}
    done = command(
        *("main_eval", "--checkpoint", "b.weights", "--data", "digits", "--json", "s.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "preprocessing from its .cfg" in done.stdout, done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["images"] == 359
