import pytest
import torch
from rich.console import Console

from cspnet.nets import create
from cspnet.runtime.options import RunOptions
from cspnet.train import adversarial, setup
from cspnet.train.adversarial import attack
from cspnet.train.start import start
from cspnet.train.step import TrainStep


@pytest.fixture
def net():
    """A small net in float64 with BatchNorm statistics that matter."""
    torch.manual_seed(0)
    net = create("cspdarknet53", classes=5, width=0.125, group=2, norm_momentum=0.5).double()
    net(torch.rand(8, 3, 64, 64, dtype=torch.float64))
    with torch.no_grad():
        net.head.fc.bias += torch.randn(5).double()
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.clamp_(min=0.05)
    return net.train()


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES = 0.2 + 0.6 * IMAGES  # away from the clip
LABELS = torch.tensor([[0.9, 0.1, 0, 0, 0], [0, 0, 0.5, 0.5, 0]], dtype=torch.float64)


def beliefs(net, images):
    """Log-sum-exp of the logits on running statistics: float64 [B]."""
    net.eval()
    with torch.no_grad():
        logits = net(images)
    net.train()
    return logits.logsumexp(1), logits


def test_the_gradient_is_that_of_the_log_sum_exp_by_finite_differences(net):
    size, step = 1e-3, 1e-4
    moved = attack(net, net, IMAGES, None, size).double()
    gradient = (IMAGES - moved) / size  # attack goes down
    generator = torch.Generator().manual_seed(2)
    for place in torch.randint(0, IMAGES[0].numel(), (6,), generator=generator).tolist():
        for image in range(2):
            up, down = IMAGES.clone(), IMAGES.clone()
            up[image].view(-1)[place] += step
            down[image].view(-1)[place] -= step
            slope = (beliefs(net, up)[0] - beliefs(net, down)[0]) / (2 * step)
            expected, other = slope[image], slope[1 - image]
            got = gradient[image].view(-1)[place]
            assert got == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
            assert float(other) == 0, "images do not act on each other"


def test_it_lowers_what_the_net_believes(net):
    before, _ = beliefs(net, IMAGES)
    after, _ = beliefs(net, attack(net, net, IMAGES, None, 0.1))
    assert (after < before).all()


def test_towards_the_label_it_raises_the_loss(net):
    def loss(images):
        return -(LABELS * beliefs(net, images)[1].log_softmax(1)).sum(1)

    assert (loss(attack(net, net, IMAGES, LABELS, 0.1)) > loss(IMAGES)).all()


def test_it_leaves_the_net_alone(net):
    for weight in net.parameters():
        weight.grad = torch.full_like(weight, 3.0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    attack(net, net, IMAGES, None, 0.1)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for name, weight in net.named_parameters():
        assert weight.requires_grad and torch.equal(weight.grad, torch.full_like(weight, 3.0)), name
    assert net.training and all(module.training for module in net.modules())


def test_no_weight_gradient_is_computed(net):
    """Convolution's backward is asked for the input alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    masks = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution_backward" in str(func):
                masks.append(args[-1])
            return func(*args, **(kwargs or {}))

    with Watch():
        attack(net, net, IMAGES, None, 0.1)
    assert len(masks) == 67 and all(list(mask) == [True, False, False] for mask in masks)


def test_it_clips_to_the_range_of_the_input(net):
    moved = attack(net, net, torch.rand(2, 3, 64, 64).double(), None, 1e6)
    assert moved.min() == 0 and moved.max() == 1


def test_it_does_not_depend_on_the_loss_scale(net):
    a = attack(net, net, IMAGES, None, 0.1)
    b = attack(net, net, IMAGES, None, 0.1, torch.tensor(65536.0))
    torch.testing.assert_close(a, b)


def test_the_surest_images_are_attacked_at_the_scale_that_fp16_steps_run_at(tiny, tmp_path):
    """Logits are halves then: a gradient for each image that is not a part of a batch's overflows
    at the scale where a batch's does not."""
    recipe = tiny("batch=128", "adversarial.step_size=10", "schedule.warmup_steps=1")
    work = setup.prepare(recipe, RunOptions(tmp_path / "run", device="cpu"), Console(quiet=True))
    state = start(work)
    size = adversarial.attack_step_size(6, recipe)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    images = images.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(3 * 32 * 32, 10, generator=torch.Generator().manual_seed(3))

    def sure(images):
        return (images.flatten(1) @ weight).half()

    step = TrainStep(work, state.net, network=sure)
    assert (sure(images).float().softmax(1).amax(1) > 0.9).sum() > 4
    exact = step.attack(images, None, size, 1 / 128)
    moved = step.attack(images, None, size, torch.tensor(2.0**18 / 128))
    assert moved.is_contiguous(memory_format=torch.channels_last)
    assert (moved != images).flatten(1).any(1).all()
    torch.testing.assert_close(moved, exact, rtol=0, atol=1e-2)


def test_strength_grows_with_the_step_after_the_warm_up(tiny):
    recipe = tiny("adversarial.step_size=2", "schedule.steps=100", "schedule.warmup_steps=10")
    assert [adversarial.attack_step_size(step, recipe) for step in (0, 10)] == [0, 0]
    assert adversarial.attack_step_size(11, recipe) == pytest.approx(0.22)
    assert adversarial.attack_step_size(99, recipe) == pytest.approx(1.98)


def test_half_of_the_groups_are_attacked_by_coins_of_their_own(tiny):
    recipe = tiny("adversarial.step_size=1", "schedule.steps=3000", "schedule.warmup_steps=0")
    coins = [adversarial.attack_mask(recipe, step, range(2)) for step in range(1, 2000)]
    share = sum(map(sum, coins)) / (2 * len(coins))
    both = sum(coin.all() for coin in coins) / len(coins)
    assert abs(share - 0.5) < 0.03 and abs(both - 0.25) < 0.03
    assert (adversarial.attack_mask(recipe, 7, range(1, 2)) == coins[6][1:]).all()
    off = tiny("schedule.steps=3000", "schedule.warmup_steps=0")
    assert not any(adversarial.attack_mask(off, step, range(2)).any() for step in range(50))
