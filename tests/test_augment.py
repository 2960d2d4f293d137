import colorsys

import numpy as np
import pytest
import torch

from cspnet.data import augment, stream
from cspnet.data.augment import AugmentParams
from cspnet.recipe.schema import Augment, Mix
from tests.conftest import picture


def coloured(hue, saturation, value):
    """Parameters that only change colours."""
    images = len(hue)
    return AugmentParams(
        *(torch.tensor(factors, dtype=torch.float32) for factors in (hue, saturation, value)),
        torch.zeros(images, 3, dtype=torch.int64),
        torch.zeros(images, 3, 4, dtype=torch.int64),
    )


def slow_colour(pixel, hue, saturation, value):
    """Darknet's distort_image for one pixel, in float64, by sextants (src/image.c)."""
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    h = (h + hue) % 1
    s, v = s * saturation, v * value
    sextant = h * 6
    i = int(sextant) % 6
    f = sextant - int(sextant)
    p, q, t = v * (1 - s), v * (1 - s * f), v * (1 - s * (1 - f))
    rgb = [(v, t, p), (q, v, p), (p, v, t), (p, q, v), (t, p, v), (v, p, q)][i]
    return [min(max(channel, 0), 1) for channel in rgb]


@pytest.mark.parametrize(
    "hue, saturation, value",
    [(0, 1, 1), (0.1, 1, 1), (-0.1, 1.33, 0.75), (0.07, 0.75, 1.33), (0.5, 1.2, 1.2)],
)
def test_colour_jitter_matches_darknet(hue, saturation, value):
    image = picture(1, 20, 24)
    image[0, :8] = [[0, 0, 0], [255, 255, 255], [9, 9, 9], [255, 0, 0]] * 2
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    changed = augment.distort_colour(pixels, coloured([hue], [saturation], [value]))[0].permute(
        1, 2, 0
    )
    expected = [[slow_colour(p / 255, hue, saturation, value) for p in row] for row in image]
    assert np.abs(changed.numpy() - expected).max() <= 1 / 255


def test_grey_stays_grey_and_black_stays_black():
    grey = torch.rand(2, 1, 8, 8).expand(2, 3, 8, 8).clone()
    grey[:, :, :2] = 0
    changed = augment.distort_colour(grey, coloured([0.1, -0.1], [1.3, 0.8], [1.2, 0.9]))
    assert torch.equal(changed[:, 0], changed[:, 1]) and torch.equal(changed[:, 0], changed[:, 2])
    assert changed[:, :, :2].abs().max() == 0


def draws_of(groups, size=256, group=32, mix=None, seed=0):
    partners, boxes = [], []
    for number in range(groups):
        rng = stream.rng_for(seed, stream.GROUP_DOMAIN, number)
        drawn = augment._sample_mix(rng, group, size, mix or Mix())
        partners.append(drawn[0])
        boxes.append(drawn[1])
    return np.concatenate(partners), np.concatenate(boxes)


def areas(boxes):
    return (boxes[..., 1] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 2])


def test_mixing_probabilities():
    """Per image 50 % clean, 25 % CutMix, 25 % Mosaic; mean CutMix area 0.299."""
    _, boxes = draws_of(2500)  # 20,000 images
    filled = areas(boxes) > 0  # [B, 3]
    clean, mosaic = ~filled.any(1), filled.all(1)
    cutmix = filled[:, 0] & ~filled[:, 1]
    assert (clean | mosaic | cutmix).all()
    assert abs(clean.mean() - 0.50) < 0.015
    assert abs(mosaic.mean() - 0.25) < 0.015
    assert abs(cutmix.mean() - 0.25) < 0.015
    assert abs((areas(boxes)[cutmix, 0] / 256**2).mean() - 0.299) <= 0.005


def test_four_consecutive_images_share_one_decision():
    _, boxes = draws_of(200)
    mixed = (areas(boxes) > 0).any(1).reshape(-1, 4)
    assert (mixed.all(1) | ~mixed.any(1)).all()
    halves = mixed[:, 0].reshape(-1, 2)
    assert 0.4 < (halves[:, 0] == halves[:, 1]).mean() < 0.6, "decisions are independent"


def test_ranges_of_boxes_and_splits():
    _, boxes = draws_of(2000)
    filled = areas(boxes) > 0
    cut = boxes[filled[:, 0] & ~filled[:, 1], 0]
    for low, high in ((cut[:, 0], cut[:, 1]), (cut[:, 2], cut[:, 3])):
        assert (high - low).min() == 76 and (high - low).max() == 204  # trunc(0.3, 0.8 × 256)
        assert low.min() == 0 and high.max() == 255  # Darknet's corner ends at 256 - cut - 1
    mosaic = boxes[filled.all(1)]
    cut_x, cut_y = mosaic[:, 0, 2], mosaic[:, 1, 0]
    for split in (cut_x, cut_y):
        assert split.min() == 51 and split.max() == 204
        assert abs(split.mean() - 127.5) < 2


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_group_that_is_not_a_multiple_of_four(probability):
    _, boxes = draws_of(50, group=6, mix=Mix(probability=probability))
    assert len(boxes) == 300
    assert (areas(boxes) > 0).any() == (probability > 0)


def test_partners_are_three_distinct_images_of_the_group():
    partners, _ = draws_of(50, group=8)
    for image, three in enumerate(partners):
        assert len({image % 8, *three}) == 4 and three.max() < 8
    pairs, _ = draws_of(5, group=2, mix=Mix(mosaic=False, images_per_draw=2))
    assert (pairs[:, 0] == np.tile([1, 0], 5)).all()


def test_mixed_pixels_and_label_weights_match_the_areas(tiny):
    """Each image has a single colour, so that counting colours gives the areas."""
    recipe = tiny("data.image_size=64", "group=16", "mix.probability=1")
    images, classes = 16, 16
    draws = augment.sample_params(recipe, step=3, groups=range(1))
    flat = torch.arange(images).float()[:, None, None, None].expand(images, 3, 64, 64)
    mixed = augment.mix_images(flat, draws)
    labels = torch.arange(images)
    targets = augment.soft_targets(labels, draws, 64, classes, smoothing=0.0)
    seen_mosaic = False
    for image in range(images):
        expected = np.full((64, 64), image)
        for (y0, y1, x0, x1), partner in zip(
            draws.boxes[image].tolist(), draws.partners[image].tolist(), strict=True
        ):
            expected[y0:y1, x0:x1] = partner
        assert (mixed[image, 1].numpy() == expected).all()
        counted = np.bincount(expected.ravel(), minlength=classes) / 64**2
        np.testing.assert_allclose(targets[image].numpy(), counted, atol=1e-7)
        seen_mosaic |= (counted > 0).sum() == 4
        assert expected[0, 0] == image or (counted > 0).sum() == 2, (
            "Mosaic keeps the top left corner"
        )
    assert seen_mosaic


def test_smoothing_commutes_with_mixing(tiny):
    recipe = tiny("mix.probability=1", "group=16")
    draws = augment.sample_params(recipe, 0, range(1))
    labels = torch.randint(0, 10, (16,), generator=torch.Generator().manual_seed(0))
    smooth = torch.full((16, 10), 0.1 / 9)
    smooth[torch.arange(16), labels] = 0.9
    weights = augment.label_weights(draws, 32)
    expected = weights[:, :1] * smooth
    for rectangle in range(3):
        expected += weights[:, rectangle + 1 : rectangle + 2] * smooth[draws.partners[:, rectangle]]
    targets = augment.soft_targets(labels, draws, 32, 10, 0.1)
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(targets.sum(1), torch.ones(16))


def test_weights_of_images_of_one_class_add_up():
    draws = coloured([0.0, 0.0], [1.0, 1.0], [1.0, 1.0])
    draws.boxes[0, 0] = torch.tensor([0, 16, 0, 32])
    draws.partners[0, 0] = 1
    targets = augment.soft_targets(torch.tensor([2, 2]), draws, 32, 4, 0.0)
    assert targets[0].tolist() == [0, 0, 1, 0]


def test_augmentation_does_not_depend_on_the_micro_batch(tiny):
    recipe = tiny("mix.probability=0.5")
    images = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (16,))
    together = augment.augment(
        images, labels, augment.sample_params(recipe, 5, range(2)), recipe, 10
    )
    for group in range(2):
        rows = slice(8 * group, 8 * group + 8)
        draws = augment.sample_params(recipe, 5, range(group, group + 1))
        alone = augment.augment(images[rows], labels[rows], draws, recipe, 10)
        assert torch.equal(alone[0], together[0][rows])
        assert torch.equal(alone[1], together[1][rows])


def test_colour_parameters_cover_their_ranges():
    rng = stream.rng_for(0, stream.GROUP_DOMAIN, 0)
    hue, saturation, value = augment._sample_colours(rng, 20_000, Augment())
    assert -0.1 <= hue.min() < -0.099 and 0.099 < hue.max() <= 0.1
    for factor in (saturation, value):
        assert 0.75 <= factor.min() < 0.751 and 1.33 < factor.max() <= 4 / 3 + 1e-9
        assert abs((factor < 1).mean() - 0.5) < 0.02
        low = factor[factor < 1]
        assert abs(low.mean() - 0.875) < 0.005, "uniform below 1"
    assert abs(np.corrcoef(saturation, value)[0, 1]) < 0.03


def test_output_layout_and_types(tiny):
    recipe = tiny()
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    draws = augment.sample_params(recipe, 0, range(1))
    pixels, targets = augment.augment(images, torch.arange(8), draws, recipe, 10)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert pixels.dtype == targets.dtype == torch.float32
    assert pixels.min() >= 0 and pixels.max() <= 1
    assert augment.normalize(pixels, recipe.data) is pixels
    values = ("data.mean=[0.5,0.25,0.5]", "data.std=[1,0.5,1]")
    for kind, more, mean, std in (
        ("imagenet", (), 0.456, 0.224),
        ("custom", values, 0.25, 0.5),
    ):
        centred = augment.normalize(pixels, tiny(f"data.normalize={kind}", *more).data)
        torch.testing.assert_close(centred[0, 1, 2, 3], (pixels[0, 1, 2, 3] - mean) / std)
