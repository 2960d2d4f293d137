"""CSPDarknet53 and its three relatives: a table of channel counts, and the blocks it names.

The structure and every parameter name are those of timm 1.0.31 (timm/models/cspnet.py), so state
dicts pass both ways unchanged. For the two Darknet-53 that is Darknet's own graph, but for the
order of a concatenation: a stage joins [cross, main] where the cfg joins [main, cross]. timm's
cspresnet50 and cspresnext50 are *not* the cfgs of the same names; they split every stage evenly,
leave every expansion linear and pool the stem with a 3x3 window.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import lcm, sqrt

import torch
from torch import Tensor, nn

from cspnet.nets.layers import ConvNormAct, GroupBatchNorm2d
from cspnet.nets.mish import Mish, is_eager


@dataclass(frozen=True)
class StageSpec:
    """One stage of the table. Counts are channels."""

    depth: int  # residual blocks
    outputs: int
    half: int  # of each of the two paths of a cross stage; residual blocks keep it
    middle: int  # inside a residual block
    stride: int = 2


@dataclass(frozen=True)
class ArchSpec:
    """One net of the table."""

    stem: int  # channels
    stages: tuple[StageSpec, ...]
    cross: bool = True  # False: residual blocks alone, no second path
    resnet: bool = False  # ResNet's stem, blocks and linear expansion, not Darknet's
    groups: int = 1  # of every 3x3 convolution after the stem


ARCHITECTURES = {
    # CrossStagePartialNetworks cfg/csdarknet53.cfg; the first stage does not halve
    "cspdarknet53": ArchSpec(32, (
        StageSpec(1, 64, 64, 32),
        StageSpec(2, 128, 64, 64),
        StageSpec(8, 256, 128, 128),
        StageSpec(8, 512, 256, 256),
        StageSpec(4, 1024, 512, 512),
    )),
    # CrossStagePartialNetworks cfg/darknet53.cfg
    "darknet53": ArchSpec(32, (
        StageSpec(1, 64, 64, 32),
        StageSpec(2, 128, 128, 64),
        StageSpec(8, 256, 256, 128),
        StageSpec(8, 512, 512, 256),
        StageSpec(4, 1024, 1024, 512),
    ), cross=False),
    # timm cspresnet50
    "cspresnet50": ArchSpec(64, (
        StageSpec(3, 128, 128, 64, stride=1),
        StageSpec(3, 256, 256, 128),
        StageSpec(5, 512, 512, 256),
        StageSpec(2, 1024, 1024, 512),
    ), resnet=True),
    # timm cspresnext50
    "cspresnext50": ArchSpec(64, (
        StageSpec(3, 256, 128, 128, stride=1),
        StageSpec(3, 512, 256, 256),
        StageSpec(5, 1024, 512, 512),
        StageSpec(2, 2048, 1024, 1024),
    ), resnet=True, groups=32),
}  # fmt: skip
ARCHITECTURE_NAMES = tuple(ARCHITECTURES)
ACTIVATIONS = ("mish", "leaky")


@dataclass(frozen=True)
class LayerFactory:
    """What the layers of one net have in common."""

    norm: Callable[[int], nn.Module]
    activation: Callable[[], nn.Module]
    groups: int = 1  # of the 3x3 convolutions

    def conv(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> ConvNormAct:
        groups = self.groups if kernel == 3 else 1
        return ConvNormAct(
            inputs, outputs, kernel, stride, groups, norm=self.norm, activation=self.activation
        )

    def linear(self, inputs: int, outputs: int) -> ConvNormAct:
        """1x1, normalised, not activated."""
        return ConvNormAct(inputs, outputs, norm=self.norm, activation=None)


class DarkBlock(nn.Module):
    """1x1, 3x3, then the addition, which nothing follows."""

    def __init__(self, channels: int, middle: int, style: LayerFactory) -> None:
        super().__init__()
        self.conv1 = style.conv(channels, middle)
        self.conv2 = style.conv(middle, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))  # [N, channels, H, W]


class BottleneckBlock(nn.Module):
    """1x1, 3x3, linear 1x1; the activation comes after the addition."""

    def __init__(self, channels: int, middle: int, style: LayerFactory) -> None:
        super().__init__()
        self.conv1 = style.conv(channels, middle)
        self.conv2 = style.conv(middle, middle, 3)
        self.conv3 = style.linear(middle, channels)
        self.act3 = style.activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act3(x + self.conv3(self.conv2(self.conv1(x))))  # [N, channels, H, W]


class DarkStage(nn.Module):
    """A 3x3 convolution with a stride, then residual blocks."""

    def __init__(self, inputs: int, stage: StageSpec, style: LayerFactory) -> None:
        super().__init__()
        self.conv_down = style.conv(inputs, stage.outputs, 3, stage.stride)
        blocks = [DarkBlock(stage.outputs, stage.middle, style) for _ in range(stage.depth)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.conv_down(x))  # [N, outputs, H / stride, W / stride]


class CrossStage(nn.Module):
    """Two paths out of one expansion: the main one through the blocks, the cross one past them.

    Wang et al. 2019, arXiv:1911.11929. `conv_exp` is Darknet's two 1x1 convolutions in one: the
    first half of its channels is the cross path, the second half the main path.
    """

    def __init__(self, inputs: int, stage: StageSpec, style: LayerFactory, *, resnet: bool) -> None:
        super().__init__()
        # ResNets keep their channels on the way down and grow at the end; Darknet grows here
        down = inputs if resnet else stage.outputs
        self.conv_down = (
            nn.Identity() if stage.stride == 1 else style.conv(inputs, down, 3, stage.stride)
        )
        expand = style.linear if resnet else style.conv
        self.conv_exp = expand(down, 2 * stage.half)
        block = BottleneckBlock if resnet else DarkBlock
        blocks = [block(stage.half, stage.middle, style) for _ in range(stage.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.conv_transition_b = style.conv(stage.half, stage.half)
        self.conv_transition = style.conv(2 * stage.half, stage.outputs)

    def forward(self, x: Tensor) -> Tensor:
        cross, main = self.conv_exp(self.conv_down(x)).chunk(2, dim=1)  # [N, half, H, W] each
        if is_eager(main):
            main = main.clone()  # of what autograd keeps a view of, it keeps the whole
        main = self.conv_transition_b(self.blocks(main))
        return self.conv_transition(torch.cat([cross, main], dim=1))  # [N, outputs, H, W]


class Head(nn.Module):
    """Mean over the map, then the classifier: Darknet's avgpool and last 1x1 convolution."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=(2, 3)))  # [N, classes]


class CspNet(nn.Module):
    """A net of the table; `create` builds it. The input is [N, 3, H, W], H and W multiples of 32.

    `channels` and `strides` describe the three maps that `pyramid` returns.
    """

    classifier_prefixes = ("head.fc.",)  # of its tensors' names

    def __init__(
        self, name: str, *, classes: int, activation: str, width: float, style: LayerFactory
    ) -> None:
        super().__init__()
        self.name = name
        self.classes = classes
        self.activation = activation
        self.width = width
        plan = scale_channels(ARCHITECTURES[name], width)
        self.stem = nn.Sequential()
        if plan.resnet:
            self.stem.add_module("conv1", style.conv(3, plan.stem, 7, stride=2))
            self.stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        else:
            self.stem.add_module("conv1", style.conv(3, plan.stem, 3))
        inputs = plan.stem
        self.stages = nn.Sequential()
        for stage in plan.stages:
            if plan.cross:
                self.stages.append(CrossStage(inputs, stage, style, resnet=plan.resnet))
            else:
                self.stages.append(DarkStage(inputs, stage, style))
            inputs = stage.outputs
        self.head = Head(inputs, classes)
        self.channels = tuple(stage.outputs for stage in plan.stages[-3:])
        self.strides = (8, 16, 32)
        self._frozen: tuple[nn.Module, ...] = ()
        init_parameters(self)

    def freeze(self, stages: int) -> None:
        """Keeps the stem and the first `stages` stages as they are, in training too.

        Their weights ask for no gradient, their BatchNorm uses its running statistics.
        """
        self._frozen = (self.stem, *self.stages[:stages])
        for module in self._frozen:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "CspNet":
        """Training mode for all but the frozen part."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, classes]"""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> the last map, [N, channels[-1], H / 32, W / 32]"""
        return self.stages(self.stem(x))

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """[N, 3, H, W] -> three maps [N, channels[i], H / strides[i], W / strides[i]], fine first.

        They are the outputs of the last three stages: what YOLOv4's neck takes.
        """
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-3:]


def scale_channels(plan: ArchSpec, width: float) -> ArchSpec:
    """The plan with every channel count times `width`.

    One rule for all counts of a net: the nearest multiple of lcm(8, groups), at least one of it.
    Eight is what Tensor Cores ask for; the groups keep every grouped convolution divisible.
    """
    unit = lcm(8, plan.groups)

    def count(channels: int) -> int:
        return unit * max(1, int(channels * width / unit + 0.5))

    stages = tuple(
        replace(s, outputs=count(s.outputs), half=count(s.half), middle=count(s.middle))
        for s in plan.stages
    )
    return replace(plan, stem=count(plan.stem), stages=stages)


def init_parameters(net: nn.Module) -> None:
    """Darknet's start: every weight uniform in +-sqrt(2 / fan_in), the classifier's included.

    fan_in = k * k * inputs / groups, so the variance is 2 / (3 fan_in). Biases are 0. The norms
    keep torch's start: weight 1, bias 0, running mean 0 and variance 1. (Darknet's running
    variance starts at 0; only an evaluation within the first updates could tell.)
    Source: darknet src/convolutional_layer.c, make_convolutional_layer.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = sqrt(2 / module.weight[0].numel())
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def create(
    name: str,
    *,
    classes: int = 1000,
    activation: str = "mish",
    leaky_slope: float = 0.1,
    width: float = 1.0,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.01,
    group: int | None = None,
) -> CspNet:
    """A freshly initialised net of `NAMES`, its activation one of `ACTIVATIONS`.

    `leaky_slope` matters to "leaky" alone: 0.1 is Darknet's, 0.01 timm's. `norm_momentum` is the
    share of the new value, 0.01 on Darknet's GPU path. `group` is the number of images that share
    BatchNorm statistics (see `GroupBatchNorm2d`). `width` multiplies every channel count (see
    `scale`). ValueError: a name, an activation or a width that there is not.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown net {name!r}; known: {', '.join(ARCHITECTURE_NAMES)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if width <= 0:
        raise ValueError(f"width is {width}; it must be above 0")
    # In place, leaky keeps its output, which the next layer keeps anyway; Mish needs its input.
    leaky = partial(nn.LeakyReLU, leaky_slope, inplace=True)
    style = LayerFactory(
        norm=partial(GroupBatchNorm2d, group=group, eps=norm_eps, momentum=norm_momentum),
        activation=Mish if activation == "mish" else leaky,
        groups=ARCHITECTURES[name].groups,
    )
    return CspNet(name, classes=classes, activation=activation, width=width, style=style)
