import pytest
import torch

from cspnet.nets import create
from cspnet.recipe.load import load_recipe
from cspnet.recipe.schedule import learning_rate
from cspnet.recipe.schema import Optim
from cspnet.train.optim import EMA, build_optimizer, parameter_groups


@pytest.mark.parametrize("steps", [800_000, 1_200_000, 8_000_000])
def test_learning_rate_is_darknets(steps):
    """get_current_rate: 0.1 (n / 1000)^4, then 0.1 (1 - n / max_batches)^4 counted from 0."""
    recipe = load_recipe(None, [f"schedule.steps={steps}"])
    expected = {
        1: 1e-13,
        500: 0.00625,
        999: 0.1 * 0.999**4,
        1000: 0.1 * (1 - 1000 / steps) ** 4,
        steps // 4: 0.0316406,
        steps // 2: 0.00625,
        steps * 3 // 4: 0.000390625,
        steps: 0.0,
    }
    for update, rate in expected.items():
        assert learning_rate(update, recipe) == pytest.approx(rate, rel=1e-6), update
    if steps == 800_000:
        assert learning_rate(1000, recipe) == pytest.approx(0.09950, abs=5e-6)


def test_a_warm_up_longer_than_the_run_only_rises():
    recipe = load_recipe(None, ["schedule.steps=2"])
    assert learning_rate(1, recipe) == pytest.approx(1e-13)
    assert learning_rate(2, recipe) == pytest.approx(1.6e-12)


@pytest.mark.parametrize("name", ["cspdarknet53", "darknet53", "cspresnet50"])
def test_which_parameters_decay(name):
    net = create(name, classes=10, width=0.125)
    decayed, others = parameter_groups(net, Optim())
    names = {id(p): n for n, p in net.named_parameters()}
    first = {names[id(p)] for p in decayed["params"]}
    second = {names[id(p)] for p in others["params"]}
    assert first | second == set(names.values()) and not first & second
    assert first == {n for n in names.values() if n.endswith(("conv.weight", "fc.weight"))}
    assert all(n.endswith(("bn.weight", "bn.bias")) or n == "head.fc.bias" for n in second)
    assert (decayed["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    assert decayed["share"] == others["share"] == 1


def test_updates_are_darknets():
    """u ← u − decay·B·w;  w ← w + (lr/B)·u;  u ← momentum·u; u sums negative gradients."""
    recipe = load_recipe(None, ["optim.weight_decay=0.1"])
    net = torch.nn.Linear(3, 2).double()
    optimizer = build_optimizer(net, recipe.optim)
    batch, decay, momentum = 128, 0.1, 0.9
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    u_weight, u_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    generator = torch.Generator().manual_seed(0)
    for rate in (0.1, 0.05, 0.2, 0.0):
        sums = [torch.randn(p.shape, generator=generator).double() for p in (weight, bias)]
        net.weight.grad, net.bias.grad = sums[0] / batch, sums[1] / batch
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.step()
        u_weight = u_weight - sums[0] - decay * batch * weight
        u_bias = u_bias - sums[1]
        weight, bias = weight + rate / batch * u_weight, bias + rate / batch * u_bias
        u_weight, u_bias = momentum * u_weight, momentum * u_bias
    torch.testing.assert_close(net.weight.detach(), weight)
    torch.testing.assert_close(net.bias.detach(), bias)


def test_average_follows_weights_and_statistics():
    net = create("cspdarknet53", classes=10, width=0.125, group=4)
    average = EMA(net, decay=0.5)
    key, statistic = "head.fc.weight", "stem.conv1.bn.running_mean"
    expected = {name: net.state_dict()[name].clone() for name in (key, statistic)}
    for step in (1, 2, 30):
        with torch.no_grad():
            net.head.fc.weight += step
            net.stem.conv1.bn.running_mean += step
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name in expected:
            expected[name] = decay * expected[name] + (1 - decay) * net.state_dict()[name]
    for name, tensor in expected.items():
        torch.testing.assert_close(average.tensors[name], tensor)
    assert average.tensors.keys() == net.state_dict().keys()
