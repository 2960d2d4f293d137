"""A trained net goes where it is needed: safetensors for timm, ONNX, Darknet's files.

Every file is written beside its target and renamed: nothing half-written is left.
"""

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

import cspnet
from cspnet.data.augment import mean_and_std
from cspnet.errors import CspnetError
from cspnet.files import replace_file
from cspnet.recipe.load import recipe_to_yaml
from cspnet.recipe.schema import TIMM_PREFIX
from cspnet.shell import command_line
from cspnet.sources.data_root import display_names
from cspnet.text import printable
from cspnet.weights.darknet import PREPROCESSING_KEYS, PREPROCESSING_MARK, UNNAMED_CLASSES_MARK
from cspnet.weights.darknet_format import DarknetFormatError, to_cfg, to_darknet_weights
from cspnet.weights.timm_code import timm_code
from cspnet.weights.trained import Trained, permute_classes

EXPORT_SUFFIXES = (".safetensors", ".onnx", ".weights")


class ExportError(CspnetError):
    """What was asked for cannot be written, there or at all."""

    exit_code = 2


def check_export_target(to: Path, pyramid: bool = False, cut: int | None = None) -> None:
    """Raises ExportError for what no net can be written to, before one is loaded."""
    if to.suffix not in EXPORT_SUFFIXES:
        raise ExportError(f"{to}: the suffix must be one of {', '.join(EXPORT_SUFFIXES)}")
    if pyramid and to.suffix != ".onnx":
        raise ExportError("--pyramid is for .onnx: the other files hold the whole net anyway")
    if cut is not None and to.suffix != ".weights":
        raise ExportError("--first-layers is for .weights")
    if not to.absolute().parent.is_dir():
        raise ExportError(f"{to}: the folder {to.parent} does not exist")
    if to.is_dir():
        raise ExportError(f"{to} is a folder: name a file")


def export_network(
    trained: Trained, to: Path, pyramid: bool = False, cut: int | None = None
) -> list[str]:
    """Writes a net by the suffix of `to`; returns remarks worth printing. ExportError."""
    check_export_target(to, pyramid, cut)
    if trained.recipe.model.name.startswith(TIMM_PREFIX) and (pyramid or to.suffix == ".weights"):
        raise ExportError(
            f"{trained.net.name} has no Darknet file and no pyramid of cspnet's; "
            ".safetensors and .onnx (logits) can be written"
        )
    trained.net.eval()
    if to.suffix == ".safetensors":
        return _safetensors(trained, to)
    if to.suffix == ".onnx":
        return _onnx(trained, to, pyramid)
    return _darknet(trained, to, cut)


def _replace(to: Path, write: Callable[[Path], object]) -> None:
    """Replaces `to` by the file that `write` creates. Raises ExportError."""
    try:
        replace_file(to, write)
    except OSError as error:
        raise ExportError(f"{printable(str(to))} cannot be written: {error.strerror}") from None


def _facts(trained: Trained) -> dict:
    """What a file of ours says of itself: enough to evaluate it."""
    return {
        "cspnet": cspnet.__version__,
        "recipe": recipe_to_yaml(trained.recipe),
        "classes": trained.classes,
        "count": trained.net.classes,
        "order": trained.order,
        "unordered": trained.unordered,
        "inferred": trained.inferred,
        "step": trained.step,
        "seen": trained.seen,
        "averaged": trained.averaged,
    }


def _safetensors(trained: Trained, to: Path) -> list[str]:
    state = {name: tensor.contiguous() for name, tensor in trained.net.state_dict().items()}
    metadata = {"format": "pt", "cspnet": json.dumps(_facts(trained))}
    # Not save_file: it makes files that only their owner can read, and no name but UTF-8.
    content = save(state, metadata)
    _replace(to, lambda path: path.write_bytes(content))
    model = trained.recipe.model
    if model.width != 1 and not model.name.startswith(TIMM_PREFIX):
        return [f"timm has no {model.name} of width {model.width:g}: the file is for cspnet"]
    return ["in timm, with the same view of images:", *timm_code(trained, to)]


class _Pyramid(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.net.pyramid(images))


def _onnx(trained: Trained, to: Path, pyramid: bool) -> list[str]:
    try:
        import onnx
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError:
        raise ExportError(
            "ONNX needs more packages: pip install '.[onnx]' in cspnet's folder"
        ) from None
    net = _Pyramid(trained.net).eval() if pyramid else trained.net
    size = trained.recipe.data.image_size
    images = torch.randn(2, 3, size, size)
    outputs = [f"p{stride}" for stride in trained.net.strides] if pyramid else ["logits"]
    program = torch.onnx.export(
        net,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=outputs,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    for key, value in _facts(trained).items():
        text = value if isinstance(value, str) else json.dumps(value)
        # Protobuf wants UTF-8; a data root may be any bytes.
        program.model.metadata_props[key] = text.encode(errors="backslashreplace").decode()
    _replace(to, lambda path: onnx.save(program.model_proto, str(path), "protobuf"))
    return _check_onnx(net, images, to)


def _check_onnx(net: nn.Module, images: torch.Tensor, path: Path) -> list[str]:
    """Compares the file with the net on random images, at another batch size than it was traced."""
    try:
        import onnxruntime
    except ImportError:
        return ["not checked: onnxruntime is not installed"]
    content = path.read_bytes()  # onnxruntime takes no name but UTF-8
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = net(batch)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, theirs in zip(
            expected, session.run(None, {"images": batch.numpy()}), strict=True
        ):
            difference = (ours - torch.from_numpy(theirs)).abs().max()
            worst = max(worst, float(difference / ours.abs().max().clamp(min=1e-6)))
    if worst > 1e-3:
        raise ExportError(f"{path}: onnxruntime differs from torch by {worst:.1e}; do not use it")
    return [f"onnxruntime agrees with torch to {worst:.0e} of the largest value"]


def _darknet(trained: Trained, to: Path, cut: int | None) -> list[str]:
    """`.weights`; beside it `.cfg`, `.data`, `.names` and `.labels` unless it is `cut`."""
    model, remarks = trained.recipe.model, []
    if model.activation == "leaky" and model.leaky_slope != 0.1:
        raise ExportError(
            f"the net's leaky slope is {model.leaky_slope:g}; Darknet's is 0.1 and cannot be set"
        )
    if model.norm_eps != 1e-5:
        raise ExportError(f"the net's norm_eps is {model.norm_eps:g}; Darknet's is 1e-5")
    net, labels = copy.deepcopy(trained.net), trained.classes
    if cut is None and labels:
        _require_lines(labels)
    if trained.order:
        there = sorted(range(net.classes), key=trained.order.__getitem__)
        permute_classes(net, there)
        labels = labels and [labels[ours] for ours in there]
        remarks.append("the classes are in the order of the file that they came from")
    mean, std = mean_and_std(trained.recipe.data)
    if trained.recipe.data.normalize != "none":
        _fold_normalization(net, torch.tensor(mean), torch.tensor(std))
        remarks.append(
            "mean and standard deviation were folded into the first convolution, which is exact "
            "but at the image's border: Darknet pads with black, the training did with grey"
        )
    try:
        data = to_darknet_weights(net, trained.seen, cut)
    except DarknetFormatError as error:
        raise ExportError(str(error)) from None
    files = {to: data}
    if cut is None:
        files |= _darknet_lists(to, net.classes, labels, remarks)
        # Darknet skips comments; ours says how the images of a validation were prepared.
        view = " ".join(
            f"evaluate.{k}={getattr(trained.recipe.evaluate, k)}" for k in PREPROCESSING_KEYS
        )
        cfg = f"{PREPROCESSING_MARK}{view}\n{to_cfg(net, trained.recipe.data.image_size)}"
        files[to.with_suffix(".cfg")] = cfg.encode()
        files_of_it = (to.with_suffix(".data"), to.with_suffix(".cfg"), to)
        remarks.append(command_line("darknet", "classifier", "predict", *files_of_it))
    for path, content in reversed(files.items()):  # the weights last: they are what one looks for
        _replace(path, partial(Path.write_bytes, data=content))
    return remarks


def _darknet_lists(
    to: Path, classes: int, labels: list[str] | None, remarks: list[str]
) -> dict[Path, bytes]:
    """The contents of `.data` and of the lists that it names, by absolute paths: Darknet looks for
    relative ones in its working folder. `.names` is for display, and numbers the nameless classes.
    """
    data, listed, names = (to.with_suffix(end) for end in (".data", ".labels", ".names"))
    if {"\n", "\r"} & set(path := str(data.absolute())):
        raise ExportError(f"{path!a} has a line break, which the paths in a .data cannot have")
    lines = [b"classes=%d" % classes]
    files = {}
    if labels:
        files[listed] = b"".join(os.fsencode(label) + b"\n" for label in labels)
        lines.append(b"labels=" + os.fsencode(listed.absolute()))
        shown = [printable(name) for name in display_names(labels)]
    else:
        lines.insert(0, UNNAMED_CLASSES_MARK.encode())
        shown = [str(number) for number in range(classes)]
        remarks.append(
            f"no class names, so no .labels; {names.name} holds indices. --labels FILE names them"
        )
    files[names] = "".join(f"{name}\n" for name in shown).encode()
    lines += [b"names=" + os.fsencode(names.absolute()), b"top=5"]
    files[data] = b"\n".join(lines) + b"\n"
    if any(sign.isspace() for sign in str(data.absolute())):
        remarks.append(
            f"Darknet drops blanks from the paths in {printable(data.name)}, and will not find the "
            "lists: put the files into a folder without blanks, and correct the paths"
        )
    return files


def _require_lines(labels: list[str]) -> None:
    """Raises ExportError unless each class name can be a line of a list."""
    for label in labels:
        if not label or "\n" in label or "\r" in label:
            raise ExportError(
                f"the class name {label!a} cannot be a line of .labels. --first-layers N writes a "
                "backbone without classes; .safetensors and .onnx take any name"
            )


def _fold_normalization(net: nn.Module, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Makes a net that took (RGB - mean) / std take RGB in [0, 1]; mean and std are [3]."""
    first = net.stem.conv1
    with torch.no_grad():
        first.conv.weight /= std[:, None, None]
        # What the mean adds to every output goes out of BatchNorm's running mean.
        first.bn.running_mean += (first.conv.weight * mean[:, None, None]).sum((1, 2, 3))
