"""The nets against timm, Mish and BatchNorm by group against float64, Darknet's initialisation."""

import copy
import importlib
import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from cspnet.nets import create, csp, layers
from cspnet.nets import mish as mish_module
from cspnet.nets.csp import ACTIVATIONS, ARCHITECTURE_NAMES
from cspnet.nets.layers import ConvNormAct, GroupBatchNorm2d, GroupedNorm, NormMish, fold
from cspnet.nets.mish import AlgebraicMish, Mish, mish
from tests.helpers import live

TINY = {"width": 0.125, "classes": 10}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
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


@pytest.fixture(params=["kernel", "pieces", "algebraic"])
def function(request, monkeypatch):
    """A form of Mish: torch's kernel, the pieces of a CPU (several of them), the compiled one."""
    monkeypatch.setattr(
        mish_module, "MIN_CHUNKED_ELEMENTS", 0 if request.param == "pieces" else math.inf
    )
    monkeypatch.setattr(mish_module, "CHUNK", 13 if request.param == "pieces" else 1)
    return AlgebraicMish.apply if request.param == "algebraic" else mish


def mish_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.double().detach().requires_grad_()
    y = x * torch.tanh(F.softplus(x, threshold=1000))
    y.sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mish_accuracy(function, dtype, monkeypatch):
    monkeypatch.setattr(mish_module, "CHUNK", 1 << 15)
    x = torch.linspace(-90, 90, 200_001).to(dtype).requires_grad_()
    upstream = torch.randn(200_001).to(dtype)
    y = function(x)
    y.backward(upstream)
    assert y.dtype == x.grad.dtype == dtype
    expected, slope = mish_reference(x)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=1e-6)
    error = (x.grad.double() - slope * upstream.double()).abs()
    allowed = 2e-6 * upstream.double().abs() + rounding * (slope * upstream).abs() + 1e-7
    assert (error <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_mish_at_the_ends(function, dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([-largest, -1e4, 0, 1e4, largest / 2, largest], dtype=dtype).requires_grad_()
    y = function(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, x.clamp(min=0))
    torch.testing.assert_close(x.grad, torch.tensor([0, 0, 0.6, 1, 1, 1], dtype=dtype))


def test_mish_gradient_and_what_it_saves(function):
    x = torch.linspace(-30, 30, 61, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, x)

    saved = []
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = function(images)
    assert [t.data_ptr() for t in saved] == [images.data_ptr()]
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_mish_in_pieces_of_any_layout(monkeypatch):
    monkeypatch.setattr(mish_module, "MIN_CHUNKED_ELEMENTS", 0)
    monkeypatch.setattr(mish_module, "CHUNK", 7)
    dense = torch.randn(4, 6, 5, 3, dtype=torch.float64).mul_(5)
    channels_last = dense.contiguous(memory_format=torch.channels_last)
    values = [
        *(dense, channels_last, dense.permute(3, 1, 0, 2), dense[:, 2:4], channels_last[:, ::2]),
        *(dense[:1, :1].expand(4, 6, 5, 3), dense[0, 0, 0, 0], dense[:0], dense[1:, 1:, 1:, 1:]),
    ]
    for x in values:
        upstream = torch.randn_like(dense.permute(1, 0, 3, 2)).expand(2, -1, -1, -1, -1)
        upstream = upstream.flatten()[: x.numel()].view(x.shape)
        for gradient in (upstream, torch.ones(()).double().expand(x.shape)):
            ours, theirs = x.detach().requires_grad_(), x.detach().requires_grad_()
            y, expected = mish(ours), F.mish(theirs)
            assert y.stride() == expected.stride()
            y.backward(gradient)
            expected.backward(gradient)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)
    with pytest.raises(RuntimeError, match="not implemented for"):
        mish(torch.arange(5))  # as torch's own says


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
    with pytest.raises(AssertionError, match="6 images are not a multiple of the group of 4"):
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


# --- norm and Mish in one function


def norm_and_mish(norm: GroupBatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    return NormMish.apply(x, norm.weight, norm.bias, norm)


def used(norm: GroupBatchNorm2d) -> GroupBatchNorm2d:
    """The norm with running statistics that are not the fresh ones."""
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return norm


PATTERNS = [p for p in itertools.product([True, False], repeat=3) if any(p)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("group", [None, 2, 4])
@pytest.mark.parametrize("small", [0, math.inf], ids=["pieces", "kernel"])
def test_norm_mish_is_norm_then_mish(group, training, small, monkeypatch):
    monkeypatch.setattr(mish_module, "MIN_CHUNKED_ELEMENTS", small)
    monkeypatch.setattr(mish_module, "CHUNK", 101)
    images = torch.randn(8, 3, 5, 6, dtype=torch.float64).mul_(3).add_(2)
    upstream = torch.randn_like(images)
    for memory_format, pattern in itertools.product(
        (torch.contiguous_format, torch.channels_last), PATTERNS
    ):
        one = used(batch_norm(group=group)).double().train(training)
        results = []
        for norm, call in (
            (one, norm_and_mish),
            (copy.deepcopy(one), lambda norm, x: F.mish(norm(x))),
        ):
            x = images.contiguous(memory_format=memory_format)
            inputs = (x, norm.weight, norm.bias)
            for tensor, wanted in zip(inputs, pattern, strict=True):
                tensor.requires_grad_(wanted)
            y = call(norm, x)
            assert y.is_contiguous(memory_format=memory_format)
            wanted = [tensor for tensor in inputs if tensor.requires_grad]
            # a gradient of another layout, as that of a concatenation is
            gradients = torch.autograd.grad(y, wanted, upstream[:, :, :, :])
            assert all(g.shape == t.shape for g, t in zip(gradients, wanted, strict=True))
            results.append([y, *gradients, *norm.buffers()])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_norm_mish_gradients_by_differences(training):
    norm = used(batch_norm(channels=2, group=2)).double().train(training)
    x = torch.randn(4, 2, 3, 2, dtype=torch.float64).requires_grad_()
    inputs = (x, norm.weight, norm.bias)
    assert torch.autograd.gradcheck(lambda *inputs: NormMish.apply(*inputs, norm), inputs)


@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [0, math.inf], ids=["pieces", "kernel"])
def test_norm_mish_of_every_type(group, dtype, small, monkeypatch):
    """The forward pass is that of the two modules bit for bit."""
    monkeypatch.setattr(mish_module, "MIN_CHUNKED_ELEMENTS", small)
    images = torch.randn(8, 16, 5, 6).mul_(3).add_(2).to(dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(8, 16, 5, 6).to(dtype)
    one = batch_norm(16, group)
    results = []
    for norm, call in ((one, norm_and_mish), (copy.deepcopy(one), lambda n, x: mish(n(x)))):
        x = images.clone().requires_grad_()
        y = call(norm, x)
        y.backward(upstream)
        assert y.dtype == x.grad.dtype == dtype
        assert norm.weight.grad.dtype == norm.running_var.dtype == torch.float32
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
        results.append([y, *norm.buffers(), x.grad, norm.weight.grad, norm.bias.grad])
    for number, (ours, theirs) in enumerate(zip(*results, strict=True)):
        if number < 4:
            assert torch.equal(ours, theirs)
        else:  # normalised once more from the rounded mean: a last place of 16 bits may move
            rounding = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=rounding, atol=4 * rounding)


def test_norm_mish_in_one_pass_or_four_bit_for_bit():
    images, upstream = torch.randn(2, 8, 16, 12, 12)
    together, apart = (used(batch_norm(16, group=2)) for _ in range(2))
    apart.load_state_dict(together.state_dict())
    x, parts = images.clone().requires_grad_(), images.clone().requires_grad_()
    y = norm_and_mish(together, x)
    y.backward(upstream)
    outputs = [norm_and_mish(apart, part) for part in parts.split(2)]
    for output, gradient in zip(outputs, upstream.split(2), strict=True):
        output.backward(gradient)
    assert torch.equal(y, torch.cat(outputs))
    assert all(map(torch.equal, together.buffers(), apart.buffers()))
    assert torch.equal(x.grad, parts.grad)
    for one, two in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-6, atol=1e-5)


def saved_bytes(call) -> tuple[int, set[int]]:
    """Bytes of the distinct storages that autograd saves in a call, and where they lie."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        result = call()
    del result
    return sum(storage.nbytes() for storage in storages.values()), {*storages}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("group", [None, 2])
def test_norm_mish_saves_its_input_alone(group, training):
    norm = batch_norm(16, group).train(training)
    x = torch.randn(8, 16, 20, 20).requires_grad_()
    saved, where = saved_bytes(lambda: norm_and_mish(norm, x))
    assert x.untyped_storage()._cdata in where
    assert saved < x.nbytes + 20 * 16 * 4  # and some numbers a channel


def layer(group: int | None = None, activation=Mish) -> ConvNormAct:
    built = ConvNormAct(3, 8, 3, norm=partial(batch_norm, group=group), activation=activation)
    return built.double()


def is_one_function(call, images: torch.Tensor) -> bool:
    """Whether the output of a call was made by NormMish."""
    return "NormMish" in type(call(images).grad_fn).__name__


def test_where_norm_and_mish_are_one_function(monkeypatch):
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    assert is_one_function(layer(), images)
    assert is_one_function(layer().eval(), images)
    assert is_one_function(layer(group=2), images)
    assert not is_one_function(layer(activation=nn.LeakyReLU), images)
    assert not is_one_function(layer(activation=None), images)
    compiled = torch.compile(layer(), fullgraph=True, backend="eager")
    assert not is_one_function(compiled, images)
    monkeypatch.setattr(layers, "NormMish", None)
    with torch.no_grad():
        layer()(images)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("small", [0, math.inf], ids=["pieces", "kernel"])
@pytest.mark.parametrize("width", [torch.float32, None], ids=["wide norm", "norm of the type"])
def test_without_gradients_norm_and_mish_take_the_memory_of_the_convolution(
    dtype, small, width, monkeypatch
):
    """In evaluation, before and after folding; against the modules one by one in float64."""
    monkeypatch.setattr(mish_module, "MIN_CHUNKED_ELEMENTS", small)
    monkeypatch.setattr(mish_module, "CHUNK", 101)
    images = torch.randn(4, 3, 9, 7, dtype=torch.float64)
    block = layer().eval()
    used(block.bn)
    expected = F.mish(block.bn(block.conv(images))).detach()
    for one, rounding in ((block, 6), (fold(block), 6)):
        one = copy.deepcopy(one).to(dtype)
        if width and dtype != torch.float64:
            one.bn.to(width)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = images.to(dtype).contiguous(memory_format=memory_format)
            kept = x.clone()
            outputs = []
            original = one.conv._conv_forward
            with monkeypatch.context() as patch, torch.no_grad():
                patch.setattr(
                    one.conv,
                    "_conv_forward",
                    lambda *inputs: outputs.append(original(*inputs)) or outputs[-1],  # noqa: B023
                )
                y = one(x)
            assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
            assert torch.equal(x, kept)
            if type(one.bn) is nn.Identity or (small == 0 and memory_format == torch.channels_last):
                assert y.data_ptr() == outputs[0].data_ptr()
            limit = rounding * torch.finfo(dtype).eps
            torch.testing.assert_close(y.double(), expected, rtol=limit, atol=8 * limit)


def test_in_training_mode_without_gradients_statistics_move():
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    ours, theirs = layer(), layer()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        y = ours(images)
        expected = F.mish(theirs.bn(theirs.conv(images)))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, ours.buffers(), theirs.buffers()))
    assert ours.bn.running_mean.any()


@pytest.mark.parametrize("name", ["conv", "bn", "act"])
def test_without_gradients_a_hook_keeps_the_output_that_it_saw(name):
    net, seen = layer().eval(), []
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    getattr(net, name).register_forward_hook(
        lambda module, inputs, output: seen.append((output, output.clone()))
    )
    with torch.no_grad():
        net(images)
    assert len(seen) == 1 and torch.equal(*seen[0])


def test_hooks_see_norm_and_activation():
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    net = layer()
    expected = net(images)
    seen = []

    def see(module, *_):
        seen.append(type(module).__name__)

    for register in ("register_forward_hook", "register_forward_pre_hook"):
        for module, name in ((net.bn, "GroupBatchNorm2d"), (net.act, "Mish")):
            handle = getattr(module, register)(see)
            torch.testing.assert_close(net(images), expected, rtol=1e-12, atol=1e-12)
            handle.remove()
            assert seen == [name]
            seen.clear()
    handle = net.bn.register_full_backward_hook(see)
    net(images).sum().backward()
    handle.remove()
    assert seen == ["GroupBatchNorm2d"]
    seen.clear()
    handle = nn.modules.module.register_module_forward_hook(see)
    net(images)
    handle.remove()
    assert seen == ["Conv2d", "GroupBatchNorm2d", "Mish", "ConvNormAct"]
    assert is_one_function(net, images)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_one_function_under_torchs_transforms():
    """functional_call and deepcopy as ever; transforms and tracers see the two modules."""
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    net = layer(group=2)
    twin = copy.deepcopy(net)
    others = {name: value.detach().clone() for name, value in net.named_parameters()}
    others["conv.weight"] *= 0.5
    others = {name: value.requires_grad_() for name, value in others.items()}
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    y = torch.func.functional_call(net, {**others, **buffers}, (images,))
    assert "NormMish" in type(y.grad_fn).__name__
    y.square().sum().backward()
    assert all(weight.grad is None for weight in net.parameters())
    assert torch.equal(net.bn.running_mean, torch.zeros(8))
    twin.conv.weight.data *= 0.5
    twin(images).square().sum().backward()
    for name, weight in twin.named_parameters():
        assert torch.equal(others[name].grad, weight.grad)
    assert torch.equal(buffers["bn.running_var"], twin.bn.running_var)

    def loss(weights, x):
        return torch.func.functional_call(net, weights, (x,)).square().sum()

    net.eval()
    weights = {name: value.detach() for name, value in net.named_parameters()}
    by_image = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, images[:, None])
    loss(dict(net.named_parameters()), images).backward()
    for name, weight in net.named_parameters():
        torch.testing.assert_close(by_image[name].sum(0), weight.grad, rtol=1e-9, atol=1e-9)

    traced = torch.fx.symbolic_trace(net)
    torch.testing.assert_close(traced(images), net(images), rtol=1e-12, atol=1e-12)
    traced = torch.jit.trace(net, images)
    torch.testing.assert_close(traced(images[:1]), net(images[:1]), rtol=1e-12, atol=1e-12)
    assert "aten::mish" in str(traced.inlined_graph)


def test_export_sees_plain_operators():
    net = create("cspdarknet53", **TINY).eval()
    exported = torch.export.export(net, (torch.randn(2, 3, 64, 64),))
    called = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert {"aten.conv2d.default", "aten.batch_norm.default", "aten.mish.default"} <= called
    assert not {"aten.clone.default", "aten.sigmoid.default", "aten.empty.memory_format"} & called


def test_weights_must_stay_until_the_backward_pass():
    net = layer()
    y = net(torch.randn(4, 3, 5, 6, dtype=torch.float64)).sum()
    with torch.no_grad():
        net.bn.bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_no_second_derivative_rather_than_a_wrong_one():
    net = nn.Sequential(layer(), nn.Conv2d(8, 2, 1).double())
    images = torch.randn(4, 3, 5, 6, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(net(images).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()


def test_one_pixel_has_no_variance():
    for call in (norm_and_mish, GroupBatchNorm2d.__call__):
        for group, images in ((1, 4), (1, 1), (None, 1)):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                call(batch_norm(group=group), torch.randn(images, 3, 1, 1))
        call(batch_norm(group=1).eval(), torch.randn(4, 3, 1, 1))


def test_saved_bytes_of_the_whole_net():
    """256 x 256, 16 bits, an image: 104 MB without NormMish, 71 MB if conv_exp were kept whole."""
    saved = []
    for images in (2, 4):
        with torch._subclasses.FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
            net = create("cspdarknet53", group=2)
            x = torch.randn(images, 3, 256, 256)
            saved.append(saved_bytes(lambda net=net, x=x: net(x))[0])
    assert (saved[1] - saved[0]) / 2 == pytest.approx(67.5e6, rel=0.01)


# --- BatchNorm by group, compiled


@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_grouped_norm_is_norm_of_each_group(group, pattern):
    norm = used(batch_norm(group=group)).double()
    images = torch.randn(8, 3, 5, 6, dtype=torch.float64).mul_(3).add_(2)
    images = images.contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(images)
    inputs = (images, norm.weight, norm.bias)
    for tensor, wanted in zip(inputs, pattern, strict=True):
        tensor.requires_grad_(wanted)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    expected = norm(images)
    y, mean, var = GroupedNorm.apply(*inputs, group, norm.eps)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not mean.requires_grad and not var.requires_grad
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **close)
    for number, part in enumerate(images.detach().split(group)):
        torch.testing.assert_close(mean[number], part.mean((0, 2, 3)), **close)
        torch.testing.assert_close(var[number], part.var((0, 2, 3)), **close)
    for ours, theirs in zip(
        torch.autograd.grad(y, wanted, upstream),
        torch.autograd.grad(expected, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, **close)


def test_compiled_groups_take_no_part_each():
    """One graph whatever the number of groups: nothing is split and joined again."""
    graphs = []

    def keep(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    norm = used(batch_norm(group=2)).double()
    twin = copy.deepcopy(norm)
    images = torch.randn(8, 3, 5, 6, dtype=torch.float64)
    y = torch.compile(norm, fullgraph=True, backend=keep)(images)
    assert not any("split" in target or "cat" in target for target in graphs[0])
    torch.testing.assert_close(y, twin(images), rtol=1e-11, atol=1e-12)
    for one, two in zip(norm.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_compiled_memory(monkeypatch):
    """What the values of `--recompute` keep per image; `light` recomputes no convolution."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    memory = importlib.import_module("memory")
    build = partial(create, "cspdarknet53", group=4)
    budgets = [1.0, 0.6, 0.3]
    none, light, full = memory.compiled(build, 8, 256, budgets, "cpu")
    assert none[0] < 66e6 and none[1] == 0
    assert light[0] < 35e6 and light[1] == 0
    assert full[0] < 21e6 and full[1] < 20


# --- the nets


@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
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


@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
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


def test_compiles_in_one_graph(monkeypatch):
    # Its stem with a pool, a stage with a stride and one without; a block of each kind is enough.
    plan = csp.ARCHITECTURES["cspresnet50"]
    stages = tuple(replace(stage, depth=1) for stage in plan.stages[:2])
    monkeypatch.setitem(csp.ARCHITECTURES, "cspresnet50", replace(plan, stages=stages))
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


# --- folding


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ARCHITECTURE_NAMES)
def test_folded_net_is_the_net(name, activation):
    net = live(create(name, activation=activation, norm_momentum=1.0, **TINY))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for one, tolerance in ((net, 3e-5), (copy.deepcopy(net).double(), 1e-12)):
            images = images.to(one.head.fc.weight.dtype)
            folded = fold(one)
            assert not folded.training
            assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
            for ours, theirs in zip(
                [folded(images), *folded.pyramid(images)],
                [one(images), *one.pyramid(images)],
                strict=True,
            ):
                largest = theirs.abs().max().item()
                torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * largest)
    # the net itself is as it was, and still learns
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(weight.requires_grad for weight in net.parameters())
    assert not any(weight.requires_grad for weight in folded.parameters())


def test_folding_keeps_type_layout_and_frozen_stages():
    net = create("cspdarknet53", **TINY)
    net.freeze(2)
    net.bfloat16().to(memory_format=torch.channels_last)
    folded = fold(net)
    weight = folded.stages[0].conv_exp.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert {tensor.dtype for tensor in folded.state_dict().values()} == {torch.bfloat16}
    assert net.training and not net.stem.training
