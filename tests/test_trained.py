"""Weights from files: what is taken over, what is not, and what is said of it."""

import json
import shutil
from dataclasses import replace

import pytest
import timm
import torch

from cspnet.errors import CheckpointError, RecipeError
from cspnet.nets import create
from cspnet.nets.timm_net import create_timm_network
from cspnet.recipe import load as recipes
from cspnet.run.checkpoint import load_checkpoint
from cspnet.train.adversarial import attack
from cspnet.train.optim import parameter_groups
from cspnet.weights.export import ExportError, export_network
from cspnet.weights.load import init_net, load_weights
from cspnet.weights.trained import build_net
from tests.helpers import equal, run_lines, trained, views

SMALL = ("data.image_size=64", "model.width=0.25")


@pytest.fixture
def weights(tmp_path):
    """A net of ten classes with lively statistics, as a safetensors file."""
    out = trained()
    export_network(out, tmp_path / "net.safetensors")
    return out, tmp_path / "net.safetensors"


def wanted(path, *overrides):
    small = SMALL[:1] if any("timm/" in text for text in overrides) else SMALL
    return recipes.load_recipe(None, [*small, f"model.init_from={path}", *overrides])


def test_another_set_of_classes_drops_the_classifier_alone(weights):
    out, path = weights
    recipe = wanted(path)
    net, (remark,) = init_net(recipe, [str(number) for number in range(7)])
    fresh, given = build_net(recipe, 7).state_dict(), out.net.state_dict()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, (fresh if name.startswith("head.") else given)[name]), name
    assert f"{len(given) - 2} tensors loaded" in remark
    assert "not loaded: head.fc.weight, head.fc.bias" in remark


def test_as_many_classes_of_other_names_are_other_classes(weights):
    out, path = weights
    same, (remark,) = init_net(wanted(path), out.classes)
    assert equal(same, out.net) and "all" in remark
    others, (remark,) = init_net(wanted(path), [f"other {number}" for number in range(10)])
    assert not torch.equal(others.head.fc.weight, out.net.head.fc.weight)
    assert "not loaded" in remark


@pytest.mark.parametrize(
    "override, told",
    [
        ("model.width=0.5", r"stem\.conv1\.conv\.weight is \[8, 3, 3, 3\].*\[16, 3, 3, 3\]"),
        ("model.name=darknet53", r"stages\.1\.blocks.*\[16, 16, 1, 1\].*\[16, 32, 1, 1\]"),
        ("model.name=timm/resnet18", r"has no tensor conv1\.weight"),
    ],
)
def test_weights_of_another_net_name_the_first_tensor(weights, override, told):
    with pytest.raises(CheckpointError, match=told):
        init_net(wanted(weights[1], override), ["a", "b"])


def test_weights_that_go_with_another_activation_are_told(weights):
    _, (_, *remarks) = init_net(
        wanted(weights[1], "model.activation=leaky", "data.normalize=imagenet"), ["a", "b"]
    )
    assert [remark.split()[6] for remark in remarks] == [
        "model.activation=mish,",
        "data.normalize=none,",
    ]


def test_frozen_stages_stay_as_they_are_while_the_rest_learns():
    net = create("cspdarknet53", classes=3, width=0.125, norm_momentum=0.5)
    net.freeze(2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    images = torch.rand(4, 3, 64, 64)
    attack(net, net, images, None, 1.0)  # leaves training mode and comes back to it
    for mode in (True, False, True):
        net.train(mode)
    net(images).square().sum().backward()
    optimizer.step()
    kept = ("stem.", "stages.0.", "stages.1.")
    for name, tensor in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(tensor, before[name]) == name.startswith(kept), name


def test_the_backbone_learns_at_its_own_rate():
    recipe = recipes.load_recipe(None, ["optim.learning_rate=0.2", "optim.backbone_lr=0.05"])
    for net in (create("cspdarknet53", classes=3, width=0.125), timms_net()):
        names = {id(weight): name for name, weight in net.named_parameters()}
        shares = {
            names[id(weight)]: group["share"]
            for group in parameter_groups(net, recipe.optim)
            for weight in group["params"]
        }
        assert shares.keys() == set(names.values())
        head = {name for name, share in shares.items() if share == 1}
        assert head == {f"{net.classifier_prefixes[0]}{leaf}" for leaf in ("weight", "bias")}
        assert {shares[name] for name in shares.keys() - head} == {0.25}


def timms_net():
    return create_timm_network("timm/resnet18", classes=3, size=64)


def test_a_run_fine_tunes_and_its_resume_needs_the_first_weights_no_more(tmp_path, tiny, command):
    out = trained("data.image_size=32", "model.width=0.125", live=False)
    export_network(out, tmp_path / "net.safetensors")
    short = ["batch=8", "group=4", "schedule.steps=4", "schedule.warmup_steps=1", "save_every=2"]
    arguments = [
        *("--recipe", "finetune", "--data", "digits", "--output", "run"),
        *("data.image_size=32", "model.width=0.125", "model.init_from=net.safetensors", *short),
    ]
    done = command("main_train", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not loaded: head.fc.weight, head.fc.bias" in done.stdout
    assert "of them frozen" in done.stdout
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    for name, tensor in out.net.state_dict().items():
        if name.startswith(("stem.", "stages.0.", "stages.1.")):
            assert torch.equal(saved["state_dict"][name], tensor), name
    (tmp_path / "net.safetensors").unlink()
    done = command("main_train", *arguments, "--resume", "schedule.steps=5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "elsewhere")
    done = command("main_train", *arguments, "--resume", cwd=tmp_path)
    assert done.returncode == 2 and "net.safetensors" in done.stderr


def test_one_of_timms_nets_trains_evaluates_and_goes_back(tmp_path, command, folder):
    arguments = [
        *("--recipe", "cspdarknet53-omega", "--data", str(folder), "--output", "run"),
        *("model.name=timm/resnet18", "data.image_size=64", "batch=8", "group=4"),
        *("schedule.steps=2", "schedule.warmup_steps=1", "ema.decay=0.9"),
    ]
    done = command("main_train", *arguments, "--micro-batch", "8", cwd=tmp_path)
    assert done.returncode == 2 and "it must be one group" in done.stderr
    done = command("main_train", *arguments, "--micro-batch", "auto", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "micro-batch 4 images (1 ×" in done.stdout, "its BatchNorm would mix several groups"
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    done = command(
        *("main_eval", "--checkpoint", str(best), "--data", str(folder), "--json", "s.json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "s.json").read_text())
    assert (scores["top1"], scores["loss"]) == (line["top1"], line["loss"])
    out = load_weights(str(best))
    path = str(tmp_path / "net.safetensors")
    assert equal(run_lines(export_network(out, tmp_path / "net.safetensors"))["net"], out.net)
    back = load_weights(path)
    assert equal(back.net, out.net) and back.recipe == out.recipe and back.classes == out.classes
    for name in ("net.weights", "net.onnx"):
        with pytest.raises(ExportError, match="no feature pyramid and no Darknet format"):
            export_network(out, tmp_path / name, pyramid=name.endswith(".onnx"))


@pytest.mark.parametrize(
    "name, told",
    [
        ("timm/resnet81", "Did you mean"),
        ("timm/vit_tiny_patch16_224", "does not accept images of 64×64.*default size is 224"),
    ],
)
def test_a_net_that_timm_has_not_or_that_wants_another_size(name, told):
    with pytest.raises(RecipeError, match=told):
        build_net(recipes.load_recipe(None, ["data.image_size=64", f"model.name={name}"]), 3)


def test_a_bare_state_dict_starts_the_net_that_is_wanted(tmp_path):
    theirs = timms_net()
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save(state, tmp_path / "net.pth")
    recipe = wanted(tmp_path / "net.pth", "model.name=timm/resnet18")
    net, _ = init_net(recipe, ["a", "b", "c"])
    assert equal(net, theirs)
    net, (remark,) = init_net(recipe, ["a", "b"])
    assert net.fc.weight.shape[0] == 2 and "not loaded: fc.weight, fc.bias" in remark
    with pytest.raises(CheckpointError, match=r"has no matrix head\.fc\.weight"):
        load_weights(str(tmp_path / "net.pth"))  # evaluation has no recipe to tell it the net


def test_timms_pretrained_nets_come_with_timms_view(monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **o: real(name, **o))
    found = load_weights("timm:resnet18.a1_in1k")
    assert found.recipe.model.name == "timm/resnet18" and found.recipe.data.image_size == 224
    assert found.recipe.data.normalize == "imagenet" and found.classes[0] == "n01440764"
    assert found.recipe.evaluate.crop_pct == pytest.approx(found.net.default_cfg["crop_pct"])
    ours = load_weights("timm:darknet53")
    assert ours.recipe.model.name == "darknet53" and ours.recipe.model.leaky_slope == 0.01
    half = load_weights("timm:vit_base_patch16_224.augreg_in21k_ft_in1k").recipe
    assert half.data.normalize == "custom" and half.data.mean == half.data.std == (0.5,) * 3
    assert half.evaluate.interpolation == "bicubic"
    with pytest.raises(RecipeError, match="multiple of 32"):
        load_weights("timm:inception_v3.tf_in1k")  # 299×299
    with pytest.raises(CheckpointError, match="no network of this name"):
        load_weights("timm:resnet81")


def test_darknets_class_order_survives_every_way_back(tmp_path):
    """Out, labels shuffled as Darknet's list is, in, and out again: the very bytes and labels."""
    out = trained(classes=4)
    export_network(out, tmp_path / "first.weights")
    labels = ["cherry", "apple", "damson", "banana"]
    (tmp_path / "first.labels").write_text("\n".join(labels) + "\n")
    back = load_weights(str(tmp_path / "first.weights"))
    assert back.classes == sorted(labels) and back.images_seen == out.images_seen
    export_network(back, tmp_path / "second.weights")
    export_network(back, tmp_path / "between.safetensors")
    export_network(load_weights(str(tmp_path / "between.safetensors")), tmp_path / "third.weights")
    first = (tmp_path / "first.weights").read_bytes()
    for name in ("second", "third"):
        assert (tmp_path / f"{name}.weights").read_bytes() == first
        assert (tmp_path / f"{name}.labels").read_text().split() == labels
    with torch.no_grad():
        ours, theirs = out.net(views(2)), back.net.eval()(views(2))
    torch.testing.assert_close(theirs, ours[:, [1, 3, 0, 2]])


def test_a_net_without_class_names_keeps_its_order_through_darknet(tmp_path):
    out = trained(classes=12, live=False)
    (tmp_path / "net.labels").write_text("stale\n")
    remarks = export_network(replace(out, classes=None), tmp_path / "net.weights")
    assert any("no class names" in remark for remark in remarks)
    assert (tmp_path / "net.names").read_text().split()[10] == "10"
    back = load_weights(str(tmp_path / "net.weights"))
    assert equal(back.net, out.net) and back.file_order is None and back.classes is None


def test_a_darknet_file_without_labels_is_not_scored_by_guessing(tmp_path, command, folder):
    out = trained(classes=3, live=False)
    export_network(out, tmp_path / "net.weights")
    for suffix in (".data", ".labels", ".names"):
        (tmp_path / f"net{suffix}").unlink()
    back = load_weights(str(tmp_path / "net.weights"))
    assert back.classes is None and back.order_unknown
    done = command("main_eval", "--checkpoint", "net.weights", "--data", folder, cwd=tmp_path)
    assert done.returncode == 2 and "there is no net.data that names a labels list" in done.stderr
    export_network(
        back, tmp_path / "net.safetensors"
    )  # the way through another file does not hide it
    for more, code in (((), 2), (("--class-order", "sorted"), 0)):
        call = ("--checkpoint", "net.safetensors", "--data", folder, *more)
        assert command("main_eval", *call, cwd=tmp_path).returncode == code
    starts = wanted(tmp_path / "net.weights")
    with pytest.raises(CheckpointError, match=r"model\.class_order"):
        init_net(starts, ["a", "b", "c"])
    for order, count in (("sorted", "all"), ("fresh", "not loaded")):
        recipe = wanted(tmp_path / "net.weights", f"model.class_order={order}")
        assert count in init_net(recipe, ["a", "b", "c"])[1][-1]
    shutil.copy(tmp_path / "net.weights", tmp_path / "net.wts")
    with pytest.raises(CheckpointError, match="unknown suffix"):
        load_weights(str(tmp_path / "net.wts"))
