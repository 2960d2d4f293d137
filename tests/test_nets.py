"""The nets against timm, Mish and BatchNorm by group against float64, Darknet's initialisation."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from cspnet.nets import create
from cspnet.nets.csp import ACTIVATIONS, NAMES
from cspnet.nets.layers import AlgebraicMish, ConvNormAct, GroupBatchNorm2d, Mish, mish

TINY = {"width": 0.125, "classes": 10}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def live(net: nn.Module) -> nn.Module:
    """Give every norm an affine of its own and the statistics of a batch, so that signals live."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    nn.init.uniform_(net.head.fc.bias, -0.1, 0.1)
    with torch.no_grad():
        net.train()(torch.randn(8, 3, 64, 64))
    return net.eval()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_timm_parity(name, activation):
    act_layer = {"mish": "mish", "leaky": "leaky_relu"}[activation]
    ours = live(create(name, activation=activation, leaky_slope=0.01, norm_momentum=1.0))
    theirs = timm.create_model(name, act_layer=act_layer).eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    ours.load_state_dict(theirs.state_dict(), strict=True)

    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(images)
        largest = expected.abs().max().item()
        assert (expected[0] - expected[1]).abs().max() > 0.05 * largest
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5 * largest)
        maps = theirs.forward_intermediates(images, indices=3, intermediates_only=True)
        for ours_map, theirs_map in zip(ours.pyramid(images), maps, strict=True):
            torch.testing.assert_close(ours_map, theirs_map, rtol=1e-4, atol=1e-4)
    info = theirs.feature_info[-3:]
    assert ours.channels == tuple(f["num_chs"] for f in info)
    assert ours.strides == tuple(f["reduction"] for f in info) == (8, 16, 32)


@pytest.mark.parametrize(
    ("name", "count"), [("cspdarknet53", 27_642_184), ("darknet53", 41_609_928)]
)
def test_parameter_count(name, count):
    # of the cfg files, counted by hand from their layers
    with torch.device("meta"):
        assert sum(p.numel() for p in create(name).parameters()) == count


# --- Mish


def mish_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.double().detach().requires_grad_()
    y = x * torch.tanh(F.softplus(x, threshold=1000))
    y.sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("function", [mish, AlgebraicMish.apply], ids=["eager", "algebraic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mish_accuracy(function, dtype):
    x = torch.linspace(-90, 90, 200_001).to(dtype).requires_grad_()
    y = function(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    expected, slope = mish_reference(x)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), slope, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize("function", [mish, AlgebraicMish.apply], ids=["eager", "algebraic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_mish_at_the_ends(function, dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, -1e4, 0, 1e4, largest / 2, largest], dtype=dtype).requires_grad_()
    y = function(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, x.clamp(min=0))
    torch.testing.assert_close(x.grad, torch.tensor([0, 0, 0.6, 1, 1, 1], dtype=dtype))


@pytest.mark.parametrize("function", [mish, AlgebraicMish.apply], ids=["eager", "algebraic"])
def test_mish_gradient_and_what_it_saves(function):
    x = torch.linspace(-30, 30, 61, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, x)

    saved = []
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(images)
    assert [t.data_ptr() for t in saved] == [images.data_ptr()]
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_mish_is_algebraic_when_compiled_and_an_operator_when_exported():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(5).requires_grad_()
    torch.compile(mish, fullgraph=True, backend=keep)(x)
    assert "mish" not in {getattr(node.target, "__name__", "") for node in graphs[0].graph.nodes}
    exported = torch.export.export(Mish(), (x,))
    assert any(node.target is torch.ops.aten.mish.default for node in exported.graph.nodes)


# --- BatchNorm by group


def batch_norm(channels: int = 3, group: int | None = None) -> GroupBatchNorm2d:
    norm = GroupBatchNorm2d(channels, group=group, eps=1e-5, momentum=0.1)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return norm


@pytest.mark.parametrize("group", [None, 2, 4, 8])
def test_group_norm_formulas(group):
    norm = batch_norm(group=group)
    images = torch.randn(8, 3, 5, 6).mul_(3).add_(2).requires_grad_()
    upstream = torch.randn(8, 3, 5, 6)
    y = norm(images)
    y.backward(upstream)

    x = images.detach().double().requires_grad_()
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    parts = []
    for part in x.split(group or 8):
        centre = part.mean(dim=(0, 2, 3))
        spread = (part - centre[:, None, None]).square()
        scale = (spread.mean(dim=(0, 2, 3)) + 1e-5).sqrt()
        scaled = (part - centre[:, None, None]) / scale[:, None, None]
        parts.append(scaled * weight[:, None, None] + bias[:, None, None])
        unbiased = spread.sum(dim=(0, 2, 3)) / (part.numel() / 3 - 1)
        mean = 0.9 * mean + 0.1 * centre.detach()
        var = 0.9 * var + 0.1 * unbiased.detach()
    expected = torch.cat(parts)
    expected.backward(upstream.double())
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), expected, **close)
    torch.testing.assert_close(images.grad.double(), x.grad, **close)
    torch.testing.assert_close(norm.running_mean.double(), mean, **close)
    torch.testing.assert_close(norm.running_var.double(), var, **close)
    assert norm.num_batches_tracked == 0

    before = [b.clone() for b in norm.buffers()]
    y = norm.eval()(images[:3])  # 3 images are no whole group, and need not be
    expected = (x[:3] - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    expected = expected * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(y.double(), expected, **close)
    assert all(map(torch.equal, before, norm.buffers()))


def test_group_norm_wants_whole_groups():
    with pytest.raises(AssertionError, match="6 images are not whole groups of 4"):
        batch_norm(group=4)(torch.randn(6, 3, 2, 2))


def test_group_norm_memory_format_and_autocast():
    images = torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last)
    for group in (None, 2):
        layer = ConvNormAct(
            3, 8, 3, norm=lambda c, group=group: batch_norm(c, group), activation=Mish
        )
        layer.to(memory_format=torch.channels_last)
        assert layer(images).is_contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(images)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert layer.bn.running_var.dtype == torch.float32


def test_four_groups_in_one_pass_or_four_passes():
    images = torch.randn(8, 3, 64, 64, dtype=torch.float64)
    labels = torch.randint(0, 10, (8,))
    results = []
    for images_per_pass in (8, 4, 2):
        torch.manual_seed(1)
        net = create("cspdarknet53", group=2, **TINY).double()
        logits = []
        parts = zip(images.split(images_per_pass), labels.split(images_per_pass), strict=True)
        for part, part_labels in parts:
            logits.append(net(part))
            F.cross_entropy(logits[-1], part_labels, reduction="sum").backward()
        gradients = [p.grad for p in net.parameters()]
        results.append([torch.cat(logits), *gradients, *net.buffers()])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-10)


def test_four_groups_bit_for_bit():
    images = torch.randn(8, 3, 5, 6)
    together, apart = batch_norm(group=2), batch_norm(group=2)
    apart.load_state_dict(together.state_dict())
    y = together(images)
    assert torch.equal(y, torch.cat([apart(part) for part in images.split(2)]))
    assert all(map(torch.equal, together.buffers(), apart.buffers()))


# --- the nets


@pytest.mark.parametrize("name", NAMES)
def test_initialisation_is_darknets(name):
    net = create(name, width=0.5)
    everything = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            k, _ = module.kernel_size
            fan_in = k * k * module.in_channels // module.groups
        elif isinstance(module, nn.Linear):
            fan_in = module.in_features
        else:
            continue
        weight = module.weight.detach().double()
        assert weight.abs().max() <= math.sqrt(2 / fan_in) * (1 + 1e-6)
        if weight.numel() > 10_000:
            assert weight.var().item() == pytest.approx(2 / (3 * fan_in), rel=0.05)
        everything.append(weight.flatten() / math.sqrt(2 / fan_in))
    everything = torch.cat(everything)
    assert everything.var().item() == pytest.approx(1 / 3, rel=0.005)
    assert everything.mean().item() == pytest.approx(0, abs=0.005)
    assert not net.head.fc.bias.any()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.running_var, torch.ones_like(module.weight))
            assert not module.bias.any() and not module.running_mean.any()


def test_options_reach_the_layers():
    net = create("darknet53", activation="leaky", norm_eps=1e-3, norm_momentum=0.2, group=4, **TINY)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum, m.group) for m in norms} == {(1e-3, 0.2, 4)}
    slopes = [m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.1] * len(norms)
    assert create("darknet53", **TINY).stem.conv1.bn.momentum == 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [0.01, 0.125, 0.3])
def test_width(name, width):
    net = create(name, width=width, classes=7)
    unit = 32 if name == "cspresnext50" else 8
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.out_channels % unit == 0 for m in convolutions)
    assert {m.groups for m in convolutions} == ({1, 32} if unit == 32 else {1})
    if width == 0.01:
        assert {m.out_channels for m in convolutions} <= {unit, 2 * unit}  # conv_exp has two halves
    if (name, width) == ("cspdarknet53", 0.3):
        assert net.channels == (80, 152, 304)  # of 76.8, 153.6, 307.2

    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    net.to(memory_format=torch.channels_last)
    maps = net.pyramid(images)
    assert [tuple(m.shape) for m in maps] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(net.channels, net.strides, strict=True)
    ]
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    net.eval()
    with torch.no_grad():
        last = net.pyramid(images)[-1]
        assert torch.equal(net.forward_features(images), last)
        assert torch.equal(net(images), net.head(last))
        assert net(images).shape == (2, 7)


def test_compiles_in_one_graph():
    # float64: BatchNorm over 2 images of 2 x 2 magnifies float32 rounding beyond a useful tolerance
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last)
    nets = [create("cspresnet50", group=2, **TINY).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[0].to(memory_format=torch.channels_last)
    compiled = torch.compile(nets[0], fullgraph=True, backend="aot_eager")
    results = []
    for net, call in zip(nets, (compiled, nets[1]), strict=True):
        logits = call(images)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in net.parameters()), *net.buffers()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)


def test_what_there_is_not():
    with pytest.raises(ValueError, match="known: cspdarknet53, darknet53, cspresnet50"):
        create("cspdarknet35")
    with pytest.raises(ValueError, match="known: mish, leaky"):
        create("cspdarknet53", activation="swish")
    with pytest.raises(ValueError, match="width"):
        create("cspdarknet53", width=0)
