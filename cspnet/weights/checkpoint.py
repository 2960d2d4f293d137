"""A trained network in a run's checkpoint, `.pt`."""

from pathlib import Path

from cspnet.recipe.load import recipe_from_yaml
from cspnet.run.checkpoint import load_checkpoint
from cspnet.weights.trained import Trained, build_net, load_strict


def from_checkpoint(path: Path, origin: str) -> Trained:
    """The EMA weights of a run, or the raw weights if it has no EMA. CheckpointError."""
    saved = load_checkpoint(path)
    recipe = recipe_from_yaml(saved["recipe"])
    net = build_net(recipe, len(saved["classes"]))
    averaged = saved["state_dict_ema"] is not None
    load_strict(net, saved["state_dict_ema" if averaged else "state_dict"], origin)
    step = saved["step"]
    return Trained(net, recipe, saved["classes"], step, averaged, images_seen=step * recipe.batch)
