"""Darknet's files: the `.cfg` of a net of ours, and `.weights` to and from it.

cspdarknet53 and darknet53 are Darknet's own graphs. Three things lie between our tensors and its
file: the expansion of a stage is two convolutions there, first the cross path (X), then the main
path (M); a stage joins [main, cross] where ours joins [cross, main], so the input channels of the
transition come in the other order; the classifier is a 1x1 convolution.

The file (darknet src/parser.c, save_weights_upto, save_convolutional_weights), little-endian: int32
major, minor, revision; images seen, uint64 from version 0.2 on, uint32 before; then for each
convolution float32 [n] biases, with BatchNorm [n] scales, means and variances, then the weights.
"""

import difflib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cspnet.nets.csp import ARCHITECTURES, CrossStage, CspNet, create
from cspnet.nets.layers import ConvNormAct
from cspnet.nets.mish import Mish

DARKNET_VERSION = (0, 2, 5)
ALL = slice(None)
# What Darknet takes where a layer says nothing (src/parser.c).
DEFAULTS = {"batch_normalize": "0", "size": "1", "stride": "1", "pad": "0", "groups": "1"}
DARKNET_NETWORKS = ("cspdarknet53", "darknet53")
# Darknet's short names of sections (src/parser.c, string_to_layer_type).
ALIASES = {"conv": "convolutional", "avg": "avgpool", "soft": "softmax"}
# Sections that only detectors have.
DETECTORS = {"yolo", "Gaussian_yolo", "region", "detection", "upsample", "reorg", "reorg3d"}


class DarknetFormatError(ValueError):
    """A `.cfg` or `.weights` file that is not what it has to be; the message says where."""


@dataclass(frozen=True)
class DarknetConv:
    """Where the tensors of one of Darknet's convolutions lie in ours."""

    name: str
    conv: nn.Conv2d | nn.Linear
    norm: nn.BatchNorm2d | None
    rows: slice  # output channels of ours
    swapped: bool = False  # halves of the input channels

    def blobs(self) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
        """Views of our tensors in the order of the file, each with its shape there."""
        weight = self.conv.weight.data[self.rows]
        shape = (*weight.shape, 1, 1)[:4]
        if self.norm is None:
            return [(self.conv.bias.data[self.rows], shape[:1]), (weight, shape)]
        norm = self.norm
        vectors = (norm.bias.data, norm.weight.data, norm.running_mean, norm.running_var)
        return [(vector[self.rows], shape[:1]) for vector in vectors] + [(weight, shape)]

    def swap(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the halves of its input channels exchanged where the graphs differ."""
        return weight.roll(weight.shape[1] // 2, 1) if self.swapped and weight.ndim > 1 else weight


@dataclass(frozen=True)
class CfgSection:
    """A section of a `.cfg`, and the convolution that it stands for."""

    kind: str
    options: dict[str, str]
    convolution: DarknetConv | None = None


def cfg_sections(net: CspNet) -> Iterator[CfgSection]:
    """The layers of a net in Darknet's order; the first one is layer 0."""
    if net.name not in DARKNET_NETWORKS:
        raise DarknetFormatError(
            f"Darknet's {net.name} is another graph than timm's, which ours follows; "
            f"only {' and '.join(DARKNET_NETWORKS)} have a Darknet file"
        )

    def conv(name: str, layer: ConvNormAct, rows: slice = ALL, swapped: bool = False) -> CfgSection:
        if getattr(layer.act, "negative_slope", 0.1) != 0.1:
            raise DarknetFormatError(
                f"leaky_slope={layer.act.negative_slope}, Darknet's leaky has 0.1"
            )
        if layer.bn.eps != 1e-5:
            raise DarknetFormatError(f"norm_eps={layer.bn.eps}, Darknet's BatchNorm has 1e-5")
        kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
        options = {
            "batch_normalize": "1",
            "filters": str(len(layer.conv.weight[rows])),
            "size": str(kernel),
            "stride": str(stride),
            "pad": "1",
            "activation": "mish" if isinstance(layer.act, Mish) else "leaky",
        }
        where = DarknetConv(name, layer.conv, layer.bn, rows, swapped)
        return CfgSection("convolutional", options, where)

    def shortcuts(blocks: nn.Sequential, prefix: str) -> Iterator[CfgSection]:
        for number, block in enumerate(blocks):
            yield conv(f"{prefix}.blocks.{number}.conv1", block.conv1)
            yield conv(f"{prefix}.blocks.{number}.conv2", block.conv2)
            yield CfgSection("shortcut", {"from": "-3", "activation": "linear"})

    yield conv("stem.conv1", net.stem.conv1)
    for number, stage in enumerate(net.stages):
        prefix = f"stages.{number}"
        yield conv(f"{prefix}.conv_down", stage.conv_down)
        if not isinstance(stage, CrossStage):
            yield from shortcuts(stage.blocks, prefix)
            continue
        half = stage.conv_transition_b.conv.out_channels
        yield conv(f"{prefix}.conv_exp (cross)", stage.conv_exp, slice(0, half))
        yield CfgSection("route", {"layers": "-2"})
        yield conv(f"{prefix}.conv_exp (main)", stage.conv_exp, slice(half, None))
        yield from shortcuts(stage.blocks, prefix)
        yield conv(f"{prefix}.conv_transition_b", stage.conv_transition_b)
        yield CfgSection("route", {"layers": f"-1,-{3 * len(stage.blocks) + 4}"})
        yield conv(f"{prefix}.conv_transition", stage.conv_transition, swapped=True)
    yield CfgSection("avgpool", {})
    options = {
        "filters": str(net.classes),
        "size": "1",
        "stride": "1",
        "pad": "1",
        "activation": "linear",
    }
    yield CfgSection("convolutional", options, DarknetConv("head.fc", net.head.fc, None, ALL))
    yield CfgSection("softmax", {"groups": "1"})


def to_cfg(net: CspNet, size: int) -> str:
    """The `.cfg` of a net for images of size×size, ready for `darknet classifier predict`."""
    lines = [
        *("[net]", "batch=1", "subdivisions=1"),
        *(f"height={size}", f"width={size}", "channels=3"),
        # What Darknet's parser wants to see; a training run would set its own.
        *("learning_rate=0.1", "policy=poly", "power=4", "max_batches=1200000", "burn_in=1000"),
        *("momentum=0.9", "decay=0.0005"),
    ]
    for section in cfg_sections(net):
        lines += ["", f"[{section.kind}]"]
        lines += [f"{key}={value}" for key, value in section.options.items()]
    return "\n".join(lines) + "\n"


def to_darknet_weights(net: CspNet, seen: int, cut: int | None = None) -> bytes:
    """The `.weights` of a net; with `cut`, of its layers 0 … cut - 1 only and with nothing seen.

    `cut` 105 of cspdarknet53 is a file such as csdarknet53-omega.conv.105, from which Darknet's
    detectors start (src/darknet.c, partial).
    """
    parts = [struct.pack("<iiiQ", *DARKNET_VERSION, 0 if cut is not None else seen)]
    layers = list(cfg_sections(net))
    if cut is not None and not 0 < cut <= len(layers):
        raise DarknetFormatError(
            f"the net has layers 0 … {len(layers) - 1}: --first-layers must be 1 to {len(layers)}"
        )
    for section in layers[:cut]:
        if section.convolution:
            for tensor, _ in section.convolution.blobs():
                value = section.convolution.swap(tensor).float().cpu().contiguous()
                parts.append(value.numpy().astype("<f4").tobytes())
    return b"".join(parts)


def load_darknet_weights(net: CspNet, path: Path) -> int:
    """Fills a net from a `.weights` file; returns the images seen. FormatError on a wrong size."""
    data = path.read_bytes()
    if len(data) < 16:
        raise DarknetFormatError(f"{path} has {len(data)} bytes, less than a header")
    major, minor, _ = struct.unpack_from("<iii", data)
    if not (0 <= major < 1000 and 0 <= minor < 1000):
        raise DarknetFormatError(f"{path} is no .weights file: its version reads {major}.{minor}")
    wide = major * 10 + minor >= 2
    layers = [section.convolution for section in cfg_sections(net) if section.convolution]
    values = sum(int(np.prod(shape)) for layer in layers for _, shape in layer.blobs())
    header = 20 if wide else 16
    if len(data) != header + 4 * values:
        raise DarknetFormatError(
            f"{path} has {len(data):,} bytes; a {net.name} with {net.classes} classes has "
            f"{header + 4 * values:,}. {_size_hint(net, len(data) - header)}"
        )
    (seen,) = struct.unpack_from("<Q" if wide else "<I", data, 12)
    offset = header
    for layer in layers:
        for tensor, shape in layer.blobs():
            count = int(np.prod(shape))
            value = np.frombuffer(data, "<f4", count, offset).astype(np.float32)
            tensor.copy_(layer.swap(torch.from_numpy(value).reshape(shape)).view(tensor.shape))
            offset += 4 * count
    return seen


def _size_hint(net: CspNet, size: int) -> str:
    """What a file with so many bytes after its header may be."""
    total = layers = 0
    for number, section in enumerate(cfg_sections(net), 1):
        if section.convolution:
            if total == size > 0:
                return (
                    f"It holds the first {layers} layers only, a backbone without a classifier: "
                    "give the whole net"
                )
            total += sum(4 * int(np.prod(shape)) for _, shape in section.convolution.blobs())
            layers = number
    if size < total:
        return "It is cut short, or the .cfg is another net's"
    return "It has bytes too many, or the .cfg is another net's"


def parse_cfg(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Sections of a `.cfg` in order, as Darknet reads it: blanks dropped, # and ; are comments.

    Each by its full name. FormatError, OSError.
    """
    parsed: list[tuple[str, dict[str, str]]] = []
    text = path.read_text("utf-8-sig", errors="replace")
    for number, raw in enumerate(text.splitlines(), 1):
        line = "".join(raw.split())
        if not line or line[0] in "#;":
            continue
        if line.startswith("[") and line.endswith("]"):
            parsed.append((ALIASES.get(line[1:-1], line[1:-1]), {}))
        elif "=" in line and parsed:
            key, _, value = line.partition("=")
            parsed[-1][1].setdefault(key, value)  # of two, Darknet finds the first
        else:
            raise DarknetFormatError(
                f"{path}, line {number}: {raw.strip()!r} is no section and no option"
            )
    if not parsed or parsed[0][0] not in ("net", "network"):
        raise DarknetFormatError(f"{path} does not begin with a [net] section")
    return parsed


def net_from_cfg(path: Path) -> tuple[CspNet, int]:
    """The net of ours that a `.cfg` describes, with fresh weights, and its image size.

    FormatError says that it is a detector's or another backbone's, or names the first layer that is
    not that of cspdarknet53 or darknet53.
    """
    (_, options), *layers = parse_cfg(path)
    if layers and layers[-1][0] == "cost":
        del layers[-1]  # the loss of a training run; it passes its input on
    for number, (kind, _) in enumerate(layers):
        if kind in DETECTORS:
            raise DarknetFormatError(
                f"{path} describes a detector: layer {number} is [{kind}]. cspnet reads "
                f"classifiers only, of {' and '.join(DARKNET_NETWORKS)}: give such weights and their .cfg"
            )
    found = [(number, o) for number, (kind, o) in enumerate(layers) if kind == "convolutional"]
    if len(found) < 2:
        raise DarknetFormatError(f"{path} has {len(found)} convolutions: it is not a net of ours")
    size = _number(f"{path}, [net]", options, "width")
    if options.get("height") != str(size):
        given = options.get("height", "nothing")
        raise DarknetFormatError(
            f"{path}, [net]: width={size} and height={given}, images must be square"
        )
    if options.get("channels") != "3":
        given = options.get("channels", "nothing")
        raise DarknetFormatError(f"{path}, [net]: channels={given}, images must have channels=3")
    stem, features, classes = (
        _number(f"{path}, layer {number}", option, "filters")
        for number, option in (found[0], *found[-2:])
    )
    name = "cspdarknet53" if any(kind == "route" for kind, _ in layers) else "darknet53"
    plan = ARCHITECTURES[name]
    full = plan.stages[-1].outputs
    activation = "mish" if found[0][1].get("activation") == "mish" else "leaky"
    differences = []
    # By the last map: the narrow layers of a narrow net are rounded up. Where an odd number of
    # eights is halved, a little less is another net; the stem is there in case the last is wrong.
    for width in dict.fromkeys((features / full, (features - 1) / full, stem / plan.stem)):
        with torch.device("meta"):
            net = create(name, classes=classes, activation=activation, width=width)
        difference = _first_difference(net, layers)
        if difference is None:
            return create(name, classes=classes, activation=activation, width=width), size
        differences.append(difference)
    number, message = max(differences)  # of the net that comes nearest
    if _likeness(layers, net) < 0.9:
        raise DarknetFormatError(
            f"{path} describes another backbone than {' and '.join(DARKNET_NETWORKS)}, which are those "
            f"that cspnet reads; the first difference to {name} is at layer {number}: {message}"
        )
    raise DarknetFormatError(f"{path}, layer {number}: {message}")


def _likeness(layers: list[tuple[str, dict[str, str]]], net: CspNet) -> float:
    """How much of the sequence of a `.cfg`'s layers is also that of a net, from 0 to 1."""

    def shape(kind: str, options: dict[str, str]) -> tuple[str, ...]:
        return kind, *(options.get(key, DEFAULTS[key]) for key in ("size", "stride"))

    found = [shape(kind, options) for kind, options in layers]
    wanted = [shape(section.kind, section.options) for section in cfg_sections(net)]
    return difflib.SequenceMatcher(None, found, wanted, autojunk=False).ratio()


def _number(where: str, options: dict[str, str], key: str) -> int:
    value = options.get(key, "nothing")
    if not re.fullmatch("[1-9][0-9]{0,4}", value):
        raise DarknetFormatError(f"{where}: {key}={value} is no number from 1 to 99999")
    return int(value)


def _first_difference(
    net: CspNet, layers: list[tuple[str, dict[str, str]]]
) -> tuple[int, str] | None:
    """The number of the first layer of a `.cfg` that is not the net's, and what is wrong there."""
    wanted = list(cfg_sections(net))
    for number, (section, (kind, found)) in enumerate(zip(wanted, layers, strict=False)):
        if kind != section.kind:
            return number, f"[{kind}] where {net.name} has [{section.kind}]"
        for key in (*section.options, *found):
            value, given = (
                o.get(key, DEFAULTS.get(key, "nothing")) for o in (section.options, found)
            )
            if given != value:
                return number, f"{key}={given} where {net.name} has {key}={value}"
    if len(layers) != len(wanted):
        number = min(len(layers), len(wanted))
        return number, f"the file has {len(layers)} layers, {net.name} has {len(wanted)}"
    return None
