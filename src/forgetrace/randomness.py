"""Random numbers by name: equal arguments give equal numbers on every machine, in any order.

Philox is counter-based, so a stream costs nothing to open at any place: the draws of training step
1,234 or of image 'digit-0007' need none of the draws before them.
"""

import hashlib

import numpy as np


def generator(seed: int, *name: object) -> np.random.Generator:
    """An independent random stream for (seed, name).

    Args:
        seed: the experiment's or a training's seed.
        name: what the numbers are for, such as ``("train", step)``; compared by text.
    """
    digest = hashlib.sha256(repr((int(seed), *map(str, name))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
