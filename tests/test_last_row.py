"""The last row of an evaluation view, almost black in Darknet at some image heights."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cspnet.images.decode import evaluation_view
from cspnet.recipe.schema import Evaluate
from tests.conftest import ROOT, picture

CORNERS = Evaluate(crop_pct=1.0, interpolation="align_corners")
HEIGHTS = np.arange(2, 4097)


def lost(height: int) -> np.ndarray:
    """Image heights whose last row Darknet's float32 loses at a target height, up to 4,096."""
    scale = (HEIGHTS - 1).astype(np.float32) / np.float32(height - 1)
    return HEIGHTS[np.float32(height - 1) * scale < (HEIGHTS - 1).astype(np.float32)]


@pytest.mark.parametrize("height", [1024, 2046, 2047, 2048])
def test_our_last_row_is_that_of_the_image(height):
    assert height in lost(256)
    image = np.ascontiguousarray(picture(1, height, height))
    image[-2:] = 255  # both rows that the last one is mixed from: white, and not black
    view = evaluation_view(image, 256, CORNERS)
    assert (view[-1] == 255).all()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    whole = F.interpolate(pixels, (256, 256), mode="bilinear", align_corners=True)[0]
    assert np.array_equal(view[-1], whole[:, -1].T.round().byte().numpy())


def test_the_documented_heights_are_those_of_float32():
    assert lost(256).tolist() == [1024, 2046, 2047, 2048, *range(4090, 4097)]
    assert lost(128).min() == 2038
    text = (ROOT / "docs" / "recipe-sources.md").read_text()
    assert re.search(r"H = 1024, 2046 to 2048 and 4090 to 4096", text)
    for height, share in ((96, "8.1"), (224, "5.6")):
        assert f"{100 * len(lost(height)) / len(HEIGHTS):.1f}" == share
        assert re.search(rf"{height} for {share} %", text)


def test_the_lost_row_is_almost_black():
    """Of the row before the last, all that Darknet keeps is this share."""
    for target in (96, 224, 256):
        for height in lost(target):
            scale = np.float32(height - 1) / np.float32(target - 1)
            place = np.float32(target - 1) * scale
            assert 255 * (1 - (place - np.floor(place))) < 0.1
