"""timm's pretrained networks, downloaded: `timm:NAME`."""

from dataclasses import replace
from typing import Any, cast

from cspnet.errors import CheckpointError
from cspnet.nets.csp import ARCHITECTURES
from cspnet.recipe.load import load_recipe
from cspnet.recipe.schema import TIMM_PREFIX
from cspnet.weights import config
from cspnet.weights.tensors import from_state_dict, imagenet_names
from cspnet.weights.trained import Trained


def from_timm(name: str) -> Trained:
    """A pretrained network as timm downloads it, with timm's preprocessing. CheckpointError."""
    import timm

    origin, architecture = f"timm:{name}", name.partition(".")[0]
    if not timm.is_model(architecture):
        raise CheckpointError(f"{origin}: timm has no network of this name")
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client has a dozen error types
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{origin} could not be downloaded ({lines[0][:160]}). The first use needs internet "
            "access; without it, give a file that was downloaded elsewhere."
        ) from None
    if architecture in ARCHITECTURES:
        return from_state_dict(model.state_dict(), origin, None)
    overrides = config.preprocessing_overrides(cast(dict[str, Any], model.default_cfg), origin)
    recipe = load_recipe(None, [f"model.name={TIMM_PREFIX}{architecture}", *overrides])
    trained = from_state_dict(model.state_dict(), origin, recipe)
    remark = f"{origin}: preprocessing as in timm"
    return replace(
        trained, classes=imagenet_names(trained.net.classes), remarks=[remark], inferred=False
    )
