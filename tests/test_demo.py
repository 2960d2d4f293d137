"""The recipes' promised accuracies, where minutes of CPU can tell; `make test-slow`."""

import pytest
from rich.console import Console

from cspnet.recipe import load as recipes
from cspnet.runtime.options import RunOptions
from cspnet.train import loop


@pytest.mark.slow
def test_the_demo_keeps_its_promise(tmp_path):
    recipe = recipes.load_recipe(recipes.find_recipe("digits"), [])
    scores = loop.train(recipe, RunOptions(tmp_path / "run", device="cpu"), Console(quiet=True))
    assert scores.top1 >= 98.0 and scores.images == 359
