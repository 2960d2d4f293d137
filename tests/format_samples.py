"""Expected pixels of image files: sample scaling, and orientations as EXIF defines them."""

import numpy as np

from tests.conftest import picture

RNG = np.random.default_rng(0)
SHAPE = (40, 48)
SMOOTH = picture(3, *SHAPE)  # for lossy formats
INDICES = RNG.integers(0, 4, SHAPE, np.uint8)
COLOURS = np.array([[10, 20, 30], [40, 250, 60], [70, 80, 90], [1, 2, 203]], np.uint8)
PAINTED = COLOURS[INDICES]
QUADS = np.pad(COLOURS[:, ::-1], [(0, 0), (0, 1)]).tobytes()  # BMP's palette
ALPHA = RNG.integers(0, 256, (*SHAPE, 1), np.uint8)
ALPHA[:9] = 0


def noise(bits, channels=3):
    """Random samples of `bits` bits, [H, W, C], including the extremes."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (*SHAPE, channels))
    values[0, 0], values[0, 1] = 0, 2**bits - 1
    return values


def scaled(samples, top):
    """255 × sample / top, rounded, for every depth."""
    image = np.floor(255 * samples.astype(float) / top + 0.5).astype(np.uint8)
    return np.repeat(image, 3, 2) if image.shape[2] == 1 else image


def plain(samples):
    """8-bit samples, unchanged."""
    return scaled(samples, 255)


def orient(image, orientation):
    """EXIF's definition: on which side the first row and the first column are displayed."""
    return {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.transpose(1, 0, 2),
        6: image[::-1].transpose(1, 0, 2),
        7: image[::-1, ::-1].transpose(1, 0, 2),
        8: image[:, ::-1].transpose(1, 0, 2),
    }[orientation]


def with_alpha(samples, top=255):
    alpha = ALPHA.astype(np.int64) * top // 255
    return np.concatenate([samples, alpha], 2)
