"""The recipes' promised accuracies, where minutes of CPU can tell; `make test-slow`."""

import pytest
from rich.console import Console

from cspnet import recipe as recipes
from cspnet.train import loop
from cspnet.train.runtime import Place


@pytest.mark.slow
def test_the_demo_keeps_its_promise(tmp_path):
    recipe = recipes.load(recipes.find("digits"), [])
    scores = loop.train(recipe, Place(tmp_path / "run", device="cpu"), Console(quiet=True))
    assert scores.top1 >= 98.0 and scores.images == 359
