"""timm's pretrained nets, from the network: `timm:NAME`."""

from dataclasses import replace

from cspnet.errors import CheckpointError
from cspnet.nets.csp import ARCHITECTURES
from cspnet.recipe.load import load_recipe
from cspnet.recipe.schema import TIMM_PREFIX
from cspnet.weights import config
from cspnet.weights.tensors import from_state_dict, imagenet_names
from cspnet.weights.trained import Trained


def from_timm(name: str) -> Trained:
    """A net as timm fetches it, with timm's view of images. CheckpointError."""
    import timm

    origin, architecture = f"timm:{name}", name.partition(".")[0]
    if not timm.is_model(architecture):
        raise CheckpointError(f"{origin}: timm has no net of this name")
    try:
        net = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client has a dozen of its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{origin} could not be fetched ({first[:160]}). It needs the network once; without "
            "one, give a file that was fetched elsewhere."
        ) from None
    if architecture in ARCHITECTURES:
        return from_state_dict(net.state_dict(), origin, None)
    view = config.preprocessing_overrides(net.default_cfg, origin)
    wanted = load_recipe(None, [f"model.name={TIMM_PREFIX}{architecture}", *view])
    found = from_state_dict(net.state_dict(), origin, wanted)
    remark = f"{origin}: images as timm prepares them"
    return replace(
        found, classes=imagenet_names(found.net.classes), remarks=[remark], inferred=False
    )
