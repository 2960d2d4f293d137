"""The layers of a network in Darknet's order, and `.weights` files.

cspdarknet53 and darknet53 are Darknet's graphs. Our tensors differ from its file in three ways.
Darknet has two convolutions for the expansion of a stage: first the cross path, then the main path.
It concatenates [main, cross] at the end of a stage, we [cross, main], so the input channels of the
transition are ordered differently. Its classifier is a 1x1 convolution.

File format (darknet src/parser.c, save_weights_upto, save_convolutional_weights), little-endian:
int32 major, minor, revision; the number of images seen, uint64 since version 0.2, uint32 before;
then for each convolution float32 biases [n], with BatchNorm also scales, means and variances [n],
and the weights. For the `.cfg` see cspnet/weights/darknet_cfg.py.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cspnet.nets.csp import CrossStage, CspNet, DarkStage
from cspnet.nets.layers import ConvNormAct, GroupBatchNorm2d
from cspnet.nets.mish import Mish

DARKNET_VERSION = (0, 2, 5)
DARKNET_NETWORKS = ("cspdarknet53", "darknet53")
ALL_CHANNELS = slice(None)


class DarknetFormatError(ValueError):
    """A malformed or unsupported `.cfg` or `.weights` file; the message says where."""


@dataclass(frozen=True)
class DarknetConv:
    """One of Darknet's convolutions, and the tensors of ours that it corresponds to."""

    name: str
    conv: nn.Conv2d | nn.Linear
    norm: GroupBatchNorm2d | None
    channels: slice  # of the output channels of `conv`
    swapped: bool = False  # the halves of the input channels are in the opposite order

    def tensors(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Views of our tensors in the order of the file, each with its shape in Darknet."""
        weight = self.conv.weight.data[self.channels]
        shape = (*weight.shape, 1, 1)[:4]
        if self.norm is None:
            assert self.conv.bias is not None
            return [(self.conv.bias.data[self.channels], shape[:1]), (weight, shape)]
        norm = self.norm
        vectors = (norm.bias.data, norm.weight.data, norm.running_mean, norm.running_var)
        return [(vector[self.channels], shape[:1]) for vector in vectors] + [(weight, shape)]

    def swap_inputs(self, tensor: Tensor) -> Tensor:
        """Convert a tensor between the two orders of input channels, in either direction."""
        if not self.swapped or tensor.ndim < 2:
            return tensor
        return tensor.roll(tensor.shape[1] // 2, 1)


@dataclass(frozen=True)
class CfgSection:
    """A section of a `.cfg`, and its convolution if it has one."""

    kind: str
    options: dict[str, str]
    convolution: DarknetConv | None = None


def cfg_sections(net: CspNet) -> Iterator[CfgSection]:
    """The layers of a network in Darknet's order; the first one is layer 0.

    DarknetFormatError if Darknet does not have the network, or cannot express its options.
    """
    if net.name not in DARKNET_NETWORKS:
        raise DarknetFormatError(
            f"{net.name} follows timm and differs from Darknet's network of that name; only "
            f"{' and '.join(DARKNET_NETWORKS)} have Darknet files"
        )
    yield _conv_section("stem.conv1", net.stem.conv1)
    for number, stage in enumerate(net.stages):
        assert isinstance(stage, DarkStage | CrossStage)
        prefix = f"stages.{number}"
        yield _conv_section(f"{prefix}.conv_down", stage.conv_down)
        if isinstance(stage, DarkStage):
            yield from _block_sections(stage.blocks, prefix)
            continue
        half = stage.conv_transition_b.conv.out_channels
        yield _conv_section(f"{prefix}.conv_exp (cross)", stage.conv_exp, slice(0, half))
        yield CfgSection("route", {"layers": "-2"})
        yield _conv_section(f"{prefix}.conv_exp (main)", stage.conv_exp, slice(half, None))
        yield from _block_sections(stage.blocks, prefix)
        yield _conv_section(f"{prefix}.conv_transition_b", stage.conv_transition_b)
        yield CfgSection("route", {"layers": f"-1,-{3 * len(stage.blocks) + 4}"})
        yield _conv_section(f"{prefix}.conv_transition", stage.conv_transition, swapped=True)
    yield CfgSection("avgpool", {})
    options = {
        "filters": str(net.classes),
        "size": "1",
        "stride": "1",
        "pad": "1",
        "activation": "linear",
    }
    classifier = DarknetConv("head.fc", net.head.fc, None, ALL_CHANNELS)
    yield CfgSection("convolutional", options, classifier)
    yield CfgSection("softmax", {"groups": "1"})


def _block_sections(blocks: nn.Sequential, prefix: str) -> Iterator[CfgSection]:
    """The residual blocks of a stage."""
    for number, block in enumerate(blocks):
        yield _conv_section(f"{prefix}.blocks.{number}.conv1", block.conv1)
        yield _conv_section(f"{prefix}.blocks.{number}.conv2", block.conv2)
        yield CfgSection("shortcut", {"from": "-3", "activation": "linear"})


def _conv_section(
    name: str, layer: object, channels: slice = ALL_CHANNELS, swapped: bool = False
) -> CfgSection:
    """A convolution with BatchNorm and activation."""
    assert isinstance(layer, ConvNormAct)
    if isinstance(layer.act, nn.LeakyReLU) and layer.act.negative_slope != 0.1:
        raise DarknetFormatError(
            f"leaky_slope is {layer.act.negative_slope}, but Darknet's leaky ReLU has slope 0.1"
        )
    if layer.bn.eps != 1e-5:
        raise DarknetFormatError(f"norm_eps is {layer.bn.eps}, but Darknet's BatchNorm has 1e-5")
    options = {
        "batch_normalize": "1",
        "filters": str(len(layer.conv.weight[channels])),
        "size": str(layer.conv.kernel_size[0]),
        "stride": str(layer.conv.stride[0]),
        "pad": "1",
        "activation": "mish" if isinstance(layer.act, Mish) else "leaky",
    }
    convolution = DarknetConv(name, layer.conv, layer.bn, channels, swapped)
    return CfgSection("convolutional", options, convolution)


def to_darknet_weights(net: CspNet, images_seen: int, first_layers: int | None = None) -> bytes:
    """The contents of a `.weights` file; with `first_layers`, of that many layers only.

    105 layers of cspdarknet53 give a file like csdarknet53-omega.conv.105, which Darknet's
    detectors start from. As in Darknet, its number of images seen is 0 (src/darknet.c, partial).
    """
    layers = list(cfg_sections(net))
    if first_layers is not None and not 0 < first_layers <= len(layers):
        raise DarknetFormatError(
            f"the network has layers 0 to {len(layers) - 1}: "
            f"--first-layers must be 1 to {len(layers)}"
        )
    blobs = [struct.pack("<iiiQ", *DARKNET_VERSION, images_seen if first_layers is None else 0)]
    for section in layers[:first_layers]:
        if section.convolution:
            for tensor, _ in section.convolution.tensors():
                values = section.convolution.swap_inputs(tensor).float().cpu().contiguous()
                blobs.append(values.numpy().astype("<f4").tobytes())
    return b"".join(blobs)


def load_darknet_weights(net: CspNet, path: Path) -> int:
    """Load a `.weights` file into a network in place; returns the number of images seen.

    DarknetFormatError if the file does not have the right size; then the network is unchanged.
    """
    data = path.read_bytes()
    if len(data) < 16:
        raise DarknetFormatError(f"{path} has {len(data)} bytes, fewer than a header")
    major, minor, _ = struct.unpack_from("<iii", data)
    if not (0 <= major < 1000 and 0 <= minor < 1000):
        raise DarknetFormatError(
            f"{path} is not a .weights file: its version would be {major}.{minor}"
        )
    is_64_bit = major * 10 + minor >= 2
    convolutions = [section.convolution for section in cfg_sections(net) if section.convolution]
    values = sum(int(np.prod(shape)) for conv in convolutions for _, shape in conv.tensors())
    header = 20 if is_64_bit else 16
    if len(data) != header + 4 * values:
        raise DarknetFormatError(
            f"{path} has {len(data):,} bytes; {net.name} with {net.classes} classes needs "
            f"{header + 4 * values:,}. {_explain_size(net, len(data) - header)}"
        )
    (images_seen,) = struct.unpack_from("<Q" if is_64_bit else "<I", data, 12)
    offset = header
    for conv in convolutions:
        for tensor, shape in conv.tensors():
            count = int(np.prod(shape))
            array = np.frombuffer(data, "<f4", count, offset).astype(np.float32)
            value = torch.from_numpy(array).reshape(shape)
            tensor.copy_(conv.swap_inputs(value).view(tensor.shape))
            offset += 4 * count
    return images_seen


def _explain_size(net: CspNet, size: int) -> str:
    """The likely reason why a file has `size` bytes after its header."""
    total = layers = 0
    for number, section in enumerate(cfg_sections(net), 1):
        if section.convolution:
            if total == size > 0:
                return (
                    f"It contains only the first {layers} layers, a backbone without a "
                    "classifier: use the file of the whole network"
                )
            total += sum(4 * int(np.prod(shape)) for _, shape in section.convolution.tensors())
            layers = number
    if size < total:
        return "It is truncated, or the .cfg belongs to another network"
    return "It has extra bytes, or the .cfg belongs to another network"
