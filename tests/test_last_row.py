"""The last row of an evaluation view, which Darknet makes almost black at certain heights."""

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
def test_last_row_of_the_view_is_the_last_row_of_the_image(height):
    assert height in lost(256)
    image = np.ascontiguousarray(picture(1, height, height))
    image[-2:] = 255  # the two rows that are interpolated to the last one
    view = evaluation_view(image, 256, CORNERS)
    assert (view[-1] == 255).all()
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    whole = F.interpolate(pixels, (256, 256), mode="bilinear", align_corners=True)[0]
    assert np.array_equal(view[-1], whole[:, -1].T.round().byte().numpy())


def test_documented_heights_match_float32_rounding():
    assert lost(256).tolist() == [1024, 2046, 2047, 2048, *range(4090, 4097)]
    assert lost(128).min() == 2038
    text = " ".join((ROOT / "docs" / "recipe-sources.md").read_text().split())
    assert re.search(r"H = 1024, 2046 to 2048 and 4090 to 4096", text)
    for height, share in ((96, "8.1"), (224, "5.6")):
        assert f"{100 * len(lost(height)) / len(HEIGHTS):.1f}" == share
        assert re.search(rf"{height} for {share} %", text)


def test_row_lost_by_darknet_is_almost_black():
    """Darknet weights the row before the last with almost 0, and adds nothing else."""
    for target in (96, 224, 256):
        for height in lost(target):
            scale = np.float32(height - 1) / np.float32(target - 1)
            position = np.float32(target - 1) * scale
            assert 255 * (1 - (position - np.floor(position))) < 0.1
