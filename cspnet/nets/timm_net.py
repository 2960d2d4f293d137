"""timm's networks by name, as `Network`s."""

from typing import Any, cast

import torch
from torch import nn

from cspnet.nets.network import Network
from cspnet.text import did_you_mean


def create_timm_network(name: str, *, classes: int, size: int) -> Network:
    """The timm network `timm/NAME`, initialized by timm, for images of size×size.

    It has no pyramid and no stages to freeze. Its BatchNorm computes statistics over the whole
    micro-batch. ValueError if timm does not have the network, or if the network does not accept
    images of this size.
    """
    import timm  # takes seconds

    short = name.partition("/")[2]
    if not timm.is_model(short):
        hint = did_you_mean(short, timm.list_models(), count=3)
        raise ValueError(f"timm has no network {short!r}.{hint}")
    model = timm.create_model(short, num_classes=classes)
    config = cast(dict[str, Any], model.default_cfg)
    training = model.training
    try:
        with torch.no_grad():
            shape = model.eval()(torch.zeros(1, 3, size, size)).shape
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} does not accept images of {size}×{size} ({first_line}); its default size is "
            f"{config['input_size'][-1]}"
        ) from None
    if shape != (1, classes):
        raise ValueError(
            f"{name} returns {list(shape)}, not one logit for each of {classes} classes"
        )
    model.train(training)
    layers = config["classifier"]
    layers = [layers] if isinstance(layers, str) else layers
    return _as_network(model, name, classes, tuple(f"{layer}." for layer in layers))


def _as_network(model: nn.Module, name: str, classes: int, prefixes: tuple[str, ...]) -> Network:
    """Make a timm model an instance of `Network`, too, in place.

    A wrapper would prefix every parameter name.
    """
    timm_class = type(model)
    model.__class__ = type(timm_class.__name__, (timm_class, Network), {})
    network = cast(Network, model)
    network.name, network.classes, network.classifier_prefixes = name, classes, prefixes
    return network
