"""Darknet's `.cfg` files: written for a network, and parsed into one."""

import difflib
import re
from pathlib import Path

import torch

from cspnet.nets.csp import ARCHITECTURES, CspNet, create
from cspnet.weights.darknet_format import DARKNET_NETWORKS, DarknetFormatError, cfg_sections

# Darknet's defaults (src/parser.c).
CFG_DEFAULTS = {"batch_normalize": "0", "size": "1", "stride": "1", "pad": "0", "groups": "1"}
# Darknet's short names of sections (src/parser.c, string_to_layer_type).
SECTION_ALIASES = {"conv": "convolutional", "avg": "avgpool", "soft": "softmax"}
# Only detectors have these sections.
DETECTOR_SECTIONS = {"yolo", "Gaussian_yolo", "region", "detection", "upsample", "reorg", "reorg3d"}

Layer = tuple[str, dict[str, str]]  # the kind of a section, and its options


def to_cfg(net: CspNet, size: int) -> str:
    """The `.cfg` of a network for images of size×size, usable by `darknet classifier predict`."""
    lines = [
        *("[net]", "batch=1", "subdivisions=1"),
        *(f"height={size}", f"width={size}", "channels=3"),
        # Darknet's parser requires these, although only training uses them.
        *("learning_rate=0.1", "policy=poly", "power=4", "max_batches=1200000", "burn_in=1000"),
        *("momentum=0.9", "decay=0.0005"),
    ]
    for section in cfg_sections(net):
        lines += ["", f"[{section.kind}]"]
        lines += [f"{key}={value}" for key, value in section.options.items()]
    return "\n".join(lines) + "\n"


def parse_cfg(path: Path) -> list[Layer]:
    """The sections of a `.cfg` in order, with their full names.

    Like Darknet: whitespace is dropped; a line that starts with # or ; is a comment. OSError;
    DarknetFormatError for a malformed file.
    """
    parsed: list[Layer] = []
    text = path.read_text("utf-8-sig", errors="replace")
    for number, raw in enumerate(text.splitlines(), 1):
        line = "".join(raw.split())
        if not line or line[0] in "#;":
            continue
        if line.startswith("[") and line.endswith("]"):
            parsed.append((SECTION_ALIASES.get(line[1:-1], line[1:-1]), {}))
        elif "=" in line and parsed:
            key, _, value = line.partition("=")
            parsed[-1][1].setdefault(key, value)  # Darknet uses the first of duplicate keys
        else:
            raise DarknetFormatError(
                f"{path}, line {number}: {raw.strip()!r} is neither a section nor an option"
            )
    if not parsed or parsed[0][0] not in ("net", "network"):
        raise DarknetFormatError(f"{path} does not start with a [net] section")
    return parsed


def create_from_cfg(path: Path) -> tuple[CspNet, int]:
    """The network that a `.cfg` describes, with fresh weights, and its image size.

    DarknetFormatError for a detector or an unsupported backbone; otherwise it names the first layer
    that differs from cspdarknet53 or darknet53. OSError.
    """
    (_, net_options), *layers = parse_cfg(path)
    if layers and layers[-1][0] == "cost":
        del layers[-1]  # the training loss; it forwards its input
    for number, (kind, _) in enumerate(layers):
        if kind in DETECTOR_SECTIONS:
            raise DarknetFormatError(
                f"{path} describes a detector: layer {number} is [{kind}]. cspnet reads only "
                f"classifiers ({' and '.join(DARKNET_NETWORKS)}): use their .weights and .cfg"
            )
    convs = [(number, o) for number, (kind, o) in enumerate(layers) if kind == "convolutional"]
    if len(convs) < 2:
        raise DarknetFormatError(
            f"{path} has {len(convs)} convolutional layers: not a supported network"
        )
    size = _image_size(path, net_options)
    stem, features, classes = (
        _positive_int(f"{path}, layer {number}", options, "filters")
        for number, options in (convs[0], *convs[-2:])
    )
    name = "cspdarknet53" if any(kind == "route" for kind, _ in layers) else "darknet53"
    spec = ARCHITECTURES[name]
    last = spec.stages[-1].outputs
    activation = "mish" if convs[0][1].get("activation") == "mish" else "leaky"
    differences = []
    # Derive the width from the last feature map, as the narrow layers of a narrow network are
    # rounded up. Half of an odd multiple of 8 is rounded up, too, hence the second candidate. The
    # third is for a file whose last feature map is wrong.
    for width in dict.fromkeys((features / last, (features - 1) / last, stem / spec.stem)):
        with torch.device("meta"):
            net = create(name, classes=classes, activation=activation, width=width)
        difference = _first_difference(net, layers)
        if difference is None:
            return create(name, classes=classes, activation=activation, width=width), size
        differences.append(difference)
    number, message = max(differences)  # from the most similar candidate
    if _similarity(layers, net) < 0.9:
        raise DarknetFormatError(
            f"{path} describes an unsupported backbone; supported are "
            f"{' and '.join(DARKNET_NETWORKS)}. It first differs from {name} at layer {number}: "
            f"{message}"
        )
    raise DarknetFormatError(f"{path}, layer {number}: {message}")


def _image_size(path: Path, options: dict[str, str]) -> int:
    """The size of the square RGB images that the [net] section asks for."""
    size = _positive_int(f"{path}, [net]", options, "width")
    if (height := options.get("height", "nothing")) != str(size):
        raise DarknetFormatError(
            f"{path}, [net]: width={size} and height={height}, but images must be square"
        )
    if (channels := options.get("channels", "nothing")) != "3":
        raise DarknetFormatError(f"{path}, [net]: channels={channels}, but must be 3")
    return size


def _positive_int(location: str, options: dict[str, str], key: str) -> int:
    value = options.get(key, "nothing")
    if not re.fullmatch("[1-9][0-9]{0,4}", value):
        raise DarknetFormatError(f"{location}: {key}={value} is not an integer from 1 to 99999")
    return int(value)


def _similarity(layers: list[Layer], net: CspNet) -> float:
    """The similarity of the layer sequences of a `.cfg` and a network, from 0 to 1."""

    def shape(kind: str, options: dict[str, str]) -> tuple[str, ...]:
        return kind, *(options.get(key, CFG_DEFAULTS[key]) for key in ("size", "stride"))

    given = [shape(kind, options) for kind, options in layers]
    expected = [shape(section.kind, section.options) for section in cfg_sections(net)]
    return difflib.SequenceMatcher(None, given, expected, autojunk=False).ratio()


def _first_difference(net: CspNet, layers: list[Layer]) -> tuple[int, str] | None:
    """The number of the first layer of a `.cfg` that differs from the network's, and how."""
    expected = list(cfg_sections(net))
    for number, (section, (kind, options)) in enumerate(zip(expected, layers, strict=False)):
        if kind != section.kind:
            return number, f"[{kind}], but {net.name} has [{section.kind}]"
        for key in (*section.options, *options):
            default = CFG_DEFAULTS.get(key, "nothing")
            value, given = section.options.get(key, default), options.get(key, default)
            if given != value:
                return number, f"{key}={given}, but {net.name} has {key}={value}"
    if len(layers) != len(expected):
        number = min(len(layers), len(expected))
        return number, f"the file has {len(layers)} layers, but {net.name} has {len(expected)}"
    return None
