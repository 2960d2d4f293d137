"""CSPDarknet53 and three related networks: a table of channel counts, and the blocks.

Structure and parameter names match timm 1.0.31 (timm/models/cspnet.py), so state dicts are
interchangeable. cspdarknet53 and darknet53 are also Darknet's graphs, with one exception: a stage
concatenates [cross, main], Darknet's cfg [main, cross]. timm's cspresnet50 and cspresnext50 differ
from the cfgs of the same names: they split every stage evenly, have no activation after the
expansion, and use a 3x3 max pooling in the stem.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import lcm
from typing import Self

import torch
from torch import Tensor, nn

from cspnet.nets.layers import ConvNormAct, GroupBatchNorm2d, init_parameters
from cspnet.nets.mish import Mish, is_eager
from cspnet.nets.network import Network


@dataclass(frozen=True)
class StageSpec:
    """One stage of an architecture."""

    depth: int  # residual blocks
    outputs: int  # channels
    path_channels: int  # of each of the two paths; also at both ends of a residual block
    bottleneck_channels: int  # inside a residual block
    stride: int = 2


@dataclass(frozen=True)
class ArchSpec:
    """An architecture: its stem and stages."""

    stem: int  # channels
    stages: tuple[StageSpec, ...]
    cross: bool = True  # False: residual blocks only, no second path
    resnet: bool = False  # stem, blocks and linear expansion of ResNet, not of Darknet
    groups: int = 1  # of every 3x3 convolution after the stem


ARCHITECTURES = {
    # CrossStagePartialNetworks cfg/csdarknet53.cfg; the first stage does not halve the channels
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
    """Builds the layers of a network with its norm, activation and group count."""

    norm: Callable[[int], GroupBatchNorm2d]
    activation: Callable[[], nn.Module]
    groups: int = 1  # of the 3x3 convolutions

    def conv(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> ConvNormAct:
        groups = self.groups if kernel == 3 else 1
        return ConvNormAct(
            inputs, outputs, kernel, stride, groups, norm=self.norm, activation=self.activation
        )

    def linear(self, inputs: int, outputs: int) -> ConvNormAct:
        """1x1 convolution and norm, no activation."""
        return ConvNormAct(inputs, outputs, norm=self.norm, activation=None)


class DarkBlock(nn.Module):
    """1x1, 3x3, addition; no activation after it."""

    def __init__(self, channels: int, bottleneck: int, layers: LayerFactory) -> None:
        super().__init__()
        self.conv1 = layers.conv(channels, bottleneck)
        self.conv2 = layers.conv(bottleneck, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))  # [N, channels, H, W]


class BottleneckBlock(nn.Module):
    """1x1, 3x3, linear 1x1, addition, activation."""

    def __init__(self, channels: int, bottleneck: int, layers: LayerFactory) -> None:
        super().__init__()
        self.conv1 = layers.conv(channels, bottleneck)
        self.conv2 = layers.conv(bottleneck, bottleneck, 3)
        self.conv3 = layers.linear(bottleneck, channels)
        self.act3 = layers.activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act3(x + self.conv3(self.conv2(self.conv1(x))))  # [N, channels, H, W]


class DarkStage(nn.Module):
    """A strided 3x3 convolution, then residual blocks."""

    def __init__(self, inputs: int, stage: StageSpec, layers: LayerFactory) -> None:
        super().__init__()
        self.conv_down = layers.conv(inputs, stage.outputs, 3, stage.stride)
        inner = stage.bottleneck_channels
        blocks = [DarkBlock(stage.outputs, inner, layers) for _ in range(stage.depth)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.conv_down(x))  # [N, outputs, H / stride, W / stride]


class CrossStage(nn.Module):
    """Cross stage partial connection: a main path through the blocks, a cross path around them.

    Wang et al. 2019, arXiv:1911.11929. `conv_exp` combines Darknet's two 1x1 convolutions: the
    first half of its output channels is the cross path, the second half the main path.
    """

    def __init__(
        self, inputs: int, stage: StageSpec, layers: LayerFactory, *, resnet: bool
    ) -> None:
        super().__init__()
        # Downsampling keeps the channel count in a ResNet; Darknet increases it here.
        down = inputs if resnet else stage.outputs
        self.conv_down = (
            nn.Identity() if stage.stride == 1 else layers.conv(inputs, down, 3, stage.stride)
        )
        expand = layers.linear if resnet else layers.conv
        self.conv_exp = expand(down, 2 * stage.path_channels)
        block = BottleneckBlock if resnet else DarkBlock
        inner = stage.bottleneck_channels
        blocks = [block(stage.path_channels, inner, layers) for _ in range(stage.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.conv_transition_b = layers.conv(stage.path_channels, stage.path_channels)
        self.conv_transition = layers.conv(2 * stage.path_channels, stage.outputs)

    def forward(self, x: Tensor) -> Tensor:
        cross, main = self.conv_exp(self.conv_down(x)).chunk(
            2, dim=1
        )  # [N, path_channels, H, W] each
        if is_eager(main):
            main = main.clone()  # autograd saving a view would keep the whole tensor alive
        main = self.conv_transition_b(self.blocks(main))
        return self.conv_transition(torch.cat([cross, main], dim=1))  # [N, outputs, H, W]


class Head(nn.Module):
    """Global average pooling and classifier: Darknet's avgpool and last 1x1 convolution."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=(2, 3)))  # [N, classes]


class CspNet(Network):
    """A network of the table, built by `create`. Input [N, 3, H, W], H and W multiples of 32.

    `channels` and `strides` describe the three feature maps that `pyramid` returns.
    """

    classifier_prefixes = ("head.fc.",)

    def __init__(
        self, name: str, *, classes: int, activation: str, width: float, layers: LayerFactory
    ) -> None:
        super().__init__()
        self.name = name
        self.classes = classes
        self.activation = activation
        self.width = width
        spec = scale_channels(ARCHITECTURES[name], width)
        self.stem = nn.Sequential()
        if spec.resnet:
            self.stem.add_module("conv1", layers.conv(3, spec.stem, 7, stride=2))
            self.stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        else:
            self.stem.add_module("conv1", layers.conv(3, spec.stem, 3))
        inputs = spec.stem
        self.stages = nn.Sequential()
        for stage in spec.stages:
            if spec.cross:
                self.stages.append(CrossStage(inputs, stage, layers, resnet=spec.resnet))
            else:
                self.stages.append(DarkStage(inputs, stage, layers))
            inputs = stage.outputs
        self.head = Head(inputs, classes)
        self.channels = tuple(stage.outputs for stage in spec.stages[-3:])
        self.strides = (8, 16, 32)
        self._frozen: tuple[nn.Module, ...] = ()
        init_parameters(self)

    def freeze(self, stages: int) -> None:
        """Freeze the stem and the first `stages` stages.

        Their parameters require no gradient; their BatchNorm always uses running statistics.
        """
        self._frozen = (self.stem, *self.stages[:stages])
        for module in self._frozen:
            module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules except the frozen ones."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, classes]"""
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> the last feature map, [N, channels[-1], H / 32, W / 32]"""
        return self.stages(self.stem(x))

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """[N, 3, H, W] -> maps [N, channels[i], H / strides[i], W / strides[i]], finest first.

        They are the outputs of the last three stages, the inputs of YOLOv4's neck.
        """
        x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-3:]


def scale_channels(spec: ArchSpec, width: float) -> ArchSpec:
    """The architecture with every channel count multiplied by `width`.

    Each count is rounded to the nearest multiple of lcm(8, groups), but not to 0. Tensor Cores need
    multiples of 8, grouped convolutions multiples of the group count.
    """
    unit = lcm(8, spec.groups)

    def count(channels: int) -> int:
        return unit * max(1, int(channels * width / unit + 0.5))

    stages = tuple(
        replace(
            stage,
            outputs=count(stage.outputs),
            path_channels=count(stage.path_channels),
            bottleneck_channels=count(stage.bottleneck_channels),
        )
        for stage in spec.stages
    )
    return replace(spec, stem=count(spec.stem), stages=stages)


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
    """A freshly initialized network of `ARCHITECTURE_NAMES`.

    `activation` is one of `ACTIVATIONS`. `leaky_slope` applies to "leaky" only: 0.1 in Darknet,
    0.01 in timm. `norm_momentum` is the weight of the new value, 0.01 in Darknet's GPU code.
    `group` is the number of images that share BatchNorm statistics (see `GroupBatchNorm2d`).
    `width` multiplies every channel count (see `scale_channels`). ValueError for an unknown name or
    activation, or a width that is not positive.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(ARCHITECTURE_NAMES)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    if width <= 0:
        raise ValueError(f"width is {width}, but must be positive")
    # Leaky ReLU in place saves its output, which the next layer saves anyway. Mish needs its input.
    leaky = partial(nn.LeakyReLU, leaky_slope, inplace=True)
    layers = LayerFactory(
        norm=partial(GroupBatchNorm2d, group=group, eps=norm_eps, momentum=norm_momentum),
        activation=Mish if activation == "mish" else leaky,
        groups=ARCHITECTURES[name].groups,
    )
    return CspNet(name, classes=classes, activation=activation, width=width, layers=layers)
