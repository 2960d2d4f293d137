"""The endless stream of training images, addressed by position; pure functions.

Step s takes positions s*batch … (s+1)*batch - 1; its groups are consecutive runs of them. Position
p is place p % N of epoch p // N, and an epoch is a permutation of the N images. Every random number
is a function of the seed and of an address, so that any batch can be the first one.
"""

from functools import lru_cache

import numpy as np

# One domain for each use of random numbers: two uses at the same address stay independent.
ORDER_DOMAIN, VIEW_DOMAIN, GROUP_DOMAIN, ATTACK_DOMAIN = range(4)


def rng_for(seed: int, domain: int, major: int, minor: int = 0) -> np.random.Generator:
    """The random numbers that belong to (seed, domain, major, minor).

    Philox counts (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the address
    is the upper part of its counter, which leaves 2^64 blocks of numbers for each address.
    """
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, domain], np.uint64), counter=[0, minor, major, 0])
    )


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """Order of the images in an epoch: uint32 [images], each index once.

    Sorted raw 64-bit words rather than Generator.permutation, whose algorithm numpy may change.
    """
    words = rng_for(seed, ORDER_DOMAIN, epoch).bit_generator.random_raw(images)
    return np.argsort(words, kind="stable").astype(np.uint32)


def index_at(seed: int, position: int, images: int) -> int:
    """Index of the image at a position of the stream."""
    epoch, place = divmod(position, images)
    return int(permutation(seed, epoch, images)[place])


def group_positions(step: int, group: int, batch: int, group_size: int) -> range:
    """Positions of a group of a step; `step` counts from 0."""
    start = step * batch + group * group_size
    return range(start, start + group_size)
