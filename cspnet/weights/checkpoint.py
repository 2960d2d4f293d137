"""A trained net in a run's checkpoint, `.pt`."""

from pathlib import Path

from cspnet.recipe import from_text
from cspnet.train.checkpoint import load as load_checkpoint
from cspnet.weights.trained import Trained, build_net, fill


def from_checkpoint(path: Path, origin: str) -> Trained:
    """The averaged weights of a run, if it keeps them. CheckpointError."""
    saved = load_checkpoint(path)
    recipe = from_text(saved["recipe"])
    net = build_net(recipe, len(saved["classes"]))
    averaged = saved["state_dict_ema"] is not None
    fill(net, saved["state_dict_ema" if averaged else "state_dict"], origin)
    seen = saved["step"] * recipe.batch
    return Trained(net, recipe, saved["classes"], saved["step"], averaged, seen)
