"""The endless stream of training images, addressed by position. Pure functions.

Step s consumes positions s*batch … (s+1)*batch - 1. Its groups are consecutive ranges of them.
Position p is element p % N of epoch p // N, and each epoch is a permutation of the N images. Every
random number is a function of the seed and an address, so that a run can resume at any step.
"""

from functools import lru_cache

import numpy as np

# One domain per use of random numbers, so that two uses at the same address are independent.
ORDER_DOMAIN, VIEW_DOMAIN, GROUP_DOMAIN, ATTACK_DOMAIN = range(4)


def rng_for(seed: int, domain: int, major: int, minor: int = 0) -> np.random.Generator:
    """The random number generator of the address (seed, domain, major, minor).

    It uses Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The address
    is the upper part of its counter, which leaves 2^64 blocks of numbers per address.
    """
    return np.random.Generator(
        np.random.Philox(key=np.array([seed, domain], np.uint64), counter=[0, minor, major, 0])
    )


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """Order of the images in an epoch: uint32 [images], each index once.

    It sorts raw 64-bit words instead of calling Generator.permutation, because numpy may change the
    algorithm of the latter.
    """
    words = rng_for(seed, ORDER_DOMAIN, epoch).bit_generator.random_raw(images)
    return np.argsort(words, kind="stable").astype(np.uint32)


def index_at(seed: int, position: int, images: int) -> int:
    """Index of the image at a position of the stream."""
    epoch, offset = divmod(position, images)
    return int(permutation(seed, epoch, images)[offset])


def group_positions(step: int, group: int, batch: int, group_size: int) -> range:
    """Stream positions of a group. Steps and groups count from 0."""
    start = step * batch + group * group_size
    return range(start, start + group_size)
