"""Export of a trained network: safetensors for timm, ONNX, Darknet's files.

Every file is written to a temporary file and renamed, so no partial file remains.
"""

import copy
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import cspnet
from cspnet.data.augment import mean_and_std
from cspnet.errors import CspnetError
from cspnet.files import replace_file
from cspnet.nets.csp import CspNet
from cspnet.nets.layers import ConvNormAct
from cspnet.recipe.load import recipe_to_yaml
from cspnet.recipe.schema import TIMM_PREFIX
from cspnet.shell import command_line
from cspnet.sources.data_root import display_names
from cspnet.text import printable
from cspnet.weights.darknet import PREPROCESSING_KEYS, PREPROCESSING_MARK, UNNAMED_CLASSES_MARK
from cspnet.weights.darknet_cfg import to_cfg
from cspnet.weights.darknet_format import DarknetFormatError, to_darknet_weights
from cspnet.weights.timm_code import timm_code
from cspnet.weights.trained import Trained, permute_classes

EXPORT_SUFFIXES = (".safetensors", ".onnx", ".weights")
MAX_ONNX_ERROR = 1e-3  # of the largest output


class ExportError(CspnetError):
    """The network cannot be exported as requested."""

    exit_code = 2


def check_export_target(
    output: Path, pyramid: bool = False, first_layers: int | None = None
) -> None:
    """Check a target and options before a network is loaded. ExportError."""
    if output.suffix not in EXPORT_SUFFIXES:
        raise ExportError(f"{output}: the suffix must be one of {', '.join(EXPORT_SUFFIXES)}")
    if pyramid and output.suffix != ".onnx":
        raise ExportError("--pyramid requires .onnx: other files contain the whole network anyway")
    if first_layers is not None and output.suffix != ".weights":
        raise ExportError("--first-layers requires .weights")
    if not output.absolute().parent.is_dir():
        raise ExportError(f"{output}: the folder {output.parent} does not exist")
    if output.is_dir():
        raise ExportError(f"{output} is a folder: give a file")


def export_network(
    trained: Trained, output: Path, pyramid: bool = False, first_layers: int | None = None
) -> list[str]:
    """Write a network in the format of the suffix of `output`; returns remarks to print.

    `pyramid`: an .onnx that returns the three feature maps for a detector instead of logits.
    `first_layers`: a .weights file with only that many layers. ExportError.
    """
    check_export_target(output, pyramid, first_layers)
    net = trained.net.eval()
    if output.suffix == ".safetensors":
        return _write_safetensors(trained, output)
    if output.suffix == ".onnx" and not pyramid:
        return _write_onnx(trained, output, net, ["logits"])
    if not isinstance(net, CspNet):
        raise ExportError(
            f"{net.name} has no feature pyramid and no Darknet format; export it to .safetensors "
            "or to .onnx without --pyramid"
        )
    if pyramid:
        outputs = [f"p{stride}" for stride in net.strides]
        return _write_onnx(trained, output, _Pyramid(net).eval(), outputs)
    return _write_darknet(trained, net, output, first_layers)


def _replace(output: Path, write: Callable[[Path], object]) -> None:
    """Replace `output` by the file that `write` creates. Raises ExportError."""
    try:
        replace_file(output, write)
    except OSError as error:
        raise ExportError(f"{printable(str(output))} cannot be written: {error.strerror}") from None


def _metadata(trained: Trained) -> dict[str, Any]:
    """The metadata in our exported files, sufficient for an evaluation."""
    return {
        "cspnet": cspnet.__version__,
        "recipe": recipe_to_yaml(trained.recipe),
        "classes": trained.classes,
        "count": trained.net.classes,
        "order": trained.file_order,
        "unordered": trained.order_unknown,
        "inferred": trained.inferred,
        "step": trained.step,
        "seen": trained.images_seen,
        "averaged": trained.averaged,
    }


def _write_safetensors(trained: Trained, output: Path) -> list[str]:
    state = {name: tensor.contiguous() for name, tensor in trained.net.state_dict().items()}
    # save_file would create files with mode 600, and accepts only UTF-8 paths.
    content = save(state, {"format": "pt", "cspnet": json.dumps(_metadata(trained))})
    _replace(output, lambda path: path.write_bytes(content))
    model = trained.recipe.model
    if model.width != 1 and not model.name.startswith(TIMM_PREFIX):
        return [f"timm has no {model.name} of width {model.width:g}: only cspnet can load the file"]
    return ["in timm, with the same preprocessing:", *timm_code(trained, output)]


class _Pyramid(nn.Module):
    def __init__(self, net: CspNet):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.net.pyramid(images))


def _write_onnx(
    trained: Trained, output: Path, net: nn.Module, output_names: list[str]
) -> list[str]:
    try:
        import onnx
        import onnxscript  # noqa: F401  required by torch's exporter
    except ImportError:
        raise ExportError(
            "ONNX export needs more packages: run pip install '.[onnx]' in cspnet's folder"
        ) from None
    size = trained.recipe.data.image_size
    images = torch.randn(2, 3, size, size)
    program = torch.onnx.export(
        net,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=output_names,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None  # only without dynamo
    for key, value in _metadata(trained).items():
        text = value if isinstance(value, str) else json.dumps(value)
        # Protobuf requires UTF-8; a data root may contain any bytes.
        program.model.metadata_props[key] = text.encode(errors="backslashreplace").decode()
    _replace(output, lambda path: onnx.save(program.model_proto, str(path), "protobuf"))
    return _check_onnx(net, images, output)


def _check_onnx(net: nn.Module, images: Tensor, path: Path) -> list[str]:
    """Compare an ONNX file with torch on random images, at the traced batch size and another."""
    try:
        import onnxruntime
    except ImportError:
        return ["not verified: onnxruntime is not installed"]
    content = path.read_bytes()  # onnxruntime accepts only UTF-8 paths
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (images, images[:1]):
        with torch.no_grad():
            expected = net(batch)
        expected = expected if isinstance(expected, tuple) else (expected,)
        outputs = session.run(None, {"images": batch.numpy()})
        for ours, theirs in zip(expected, outputs, strict=True):
            difference = (ours - torch.from_numpy(theirs)).abs().max()
            worst = max(worst, float(difference / ours.abs().max().clamp(min=1e-6)))
    if worst > MAX_ONNX_ERROR:
        raise ExportError(
            f"{path}: onnxruntime differs from torch by {worst:.1e} of the largest value. The file "
            "is wrong: do not use it"
        )
    return [f"verified: onnxruntime agrees with torch within {worst:.0e} of the largest value"]


def _write_darknet(
    trained: Trained, net: CspNet, output: Path, first_layers: int | None
) -> list[str]:
    """Write `.weights`; for a whole network also `.cfg`, `.data`, `.names` and `.labels`."""
    model, remarks = trained.recipe.model, []
    if model.activation == "leaky" and model.leaky_slope != 0.1:
        raise ExportError(
            f"the network's leaky_slope is {model.leaky_slope:g}, but Darknet's is always 0.1"
        )
    if model.norm_eps != 1e-5:
        raise ExportError(f"the network's norm_eps is {model.norm_eps:g}, but Darknet's is 1e-5")
    net, labels = copy.deepcopy(net), trained.classes
    if first_layers is None and labels:
        _require_lines(labels)
    if trained.file_order:
        original_order = sorted(range(net.classes), key=trained.file_order.__getitem__)
        permute_classes(net, original_order)
        labels = labels and [labels[index] for index in original_order]
        remarks.append("the classes are in the order of the original file")
    if trained.recipe.data.normalize != "none":
        mean, std = mean_and_std(trained.recipe.data)
        _fold_normalization(net, torch.tensor(mean), torch.tensor(std))
        remarks.append(
            "mean and standard deviation are folded into the first convolution. This is exact "
            "except at image borders, which Darknet pads with black, and training padded with gray"
        )
    try:
        weights = to_darknet_weights(net, trained.images_seen, first_layers)
    except DarknetFormatError as error:
        raise ExportError(str(error)) from None
    files = {output: weights}
    if first_layers is None:
        files |= _darknet_lists(output, net.classes, labels, remarks)
        # Darknet ignores comments; ours stores the preprocessing of an evaluation.
        view = " ".join(
            f"evaluate.{k}={getattr(trained.recipe.evaluate, k)}" for k in PREPROCESSING_KEYS
        )
        cfg = output.with_suffix(".cfg")
        text = f"{PREPROCESSING_MARK}{view}\n{to_cfg(net, trained.recipe.data.image_size)}"
        files[cfg] = text.encode()
        remarks.append(
            command_line(
                "darknet", "classifier", "predict", output.with_suffix(".data"), cfg, output
            )
        )
    for path, content in reversed(files.items()):  # the weights last, so that the set is complete
        _replace(path, partial(Path.write_bytes, data=content))
    return remarks


def _darknet_lists(
    output: Path, classes: int, labels: list[str] | None, remarks: list[str]
) -> dict[Path, bytes]:
    """The contents of `.data` and its lists; adds to the remarks.

    Paths are absolute, because Darknet resolves relative ones against its working folder. `.names`
    is for display; it has indices if the classes are unnamed.
    """
    data, labels_file, names = (output.with_suffix(end) for end in (".data", ".labels", ".names"))
    if {"\n", "\r"} & set(path := str(data.absolute())):
        raise ExportError(f"{path!a} has a line break, which a path in a .data file cannot have")
    lines = [b"classes=%d" % classes]
    files = {}
    if labels:
        files[labels_file] = b"".join(os.fsencode(label) + b"\n" for label in labels)
        lines.append(b"labels=" + os.fsencode(labels_file.absolute()))
        shown = [printable(name) for name in display_names(labels)]
    else:
        lines.insert(0, UNNAMED_CLASSES_MARK.encode())
        shown = [str(number) for number in range(classes)]
        remarks.append(
            f"no class names, so no .labels, and {names.name} contains indices. Use --labels FILE "
            "to name the classes"
        )
    files[names] = "".join(f"{name}\n" for name in shown).encode()
    lines += [b"names=" + os.fsencode(names.absolute()), b"top=5"]
    files[data] = b"\n".join(lines) + b"\n"
    if any(character.isspace() for character in str(data.absolute())):
        remarks.append(
            f"Darknet removes spaces from the paths in {printable(data.name)}, so it will not find "
            "the lists: move the files to a folder without spaces, and correct the paths"
        )
    return files


def _require_lines(labels: list[str]) -> None:
    """ExportError unless every class name can be a line of a list."""
    for label in labels:
        if not label or "\n" in label or "\r" in label:
            raise ExportError(
                f"the class name {label!a} cannot be a line of .labels. Rename the class; or use "
                ".safetensors or .onnx, which allow any name, or --first-layers N, which writes a "
                "backbone without classes"
            )


def _fold_normalization(net: CspNet, mean: Tensor, std: Tensor) -> None:
    """Turn a network for (RGB - mean) / std into one for RGB in [0, 1]; mean and std are [3]."""
    first = net.stem.conv1
    assert isinstance(first, ConvNormAct)
    with torch.no_grad():
        first.conv.weight /= std[:, None, None]
        # Subtract the contribution of the mean through BatchNorm's running mean.
        first.bn.running_mean += (first.conv.weight * mean[:, None, None]).sum((1, 2, 3))
