"""Nets of timm's by name, with what the rest of the program asks of a net."""

import difflib

import torch
from torch import nn


def create_timm_network(name: str, *, classes: int, size: int) -> nn.Module:
    """timm's net of a name, freshly initialised by timm, for images of size×size.

    It has `name`, `classes` and `classifier_prefixes` as `CspNet` has them, and no pyramid. Its
    BatchNorm takes in all images of a pass. ValueError: timm has no such net, or it does not take
    images of this size.
    """
    import timm  # seconds to import

    short = name.partition("/")[2]
    if not timm.is_model(short):
        near = difflib.get_close_matches(short, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"timm has no net {short!r}{hint}")
    net = timm.create_model(short, num_classes=classes)
    mode = net.training
    try:
        with torch.no_grad():
            shape = net.eval()(torch.zeros(1, 3, size, size)).shape
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        first = str(error).strip().partition("\n")[0]
        wanted = net.default_cfg["input_size"][-1]
        raise ValueError(
            f"{name} does not take images of {size}×{size} ({first}); timm's own size is {wanted}"
        ) from None
    if shape != (1, classes):
        raise ValueError(f"{name} answers {list(shape)}, not a logit for each of {classes} classes")
    net.train(mode)
    classifier = net.default_cfg["classifier"]
    net.name, net.classes = name, classes
    names = [classifier] if isinstance(classifier, str) else classifier
    net.classifier_prefixes = tuple(f"{part}." for part in names)
    return net
