"""A seeded random projection P of named gradients to few dimensions, itself never held.

P is a count sketch, the sparse Johnson-Lindenstrauss transform with one entry per column (Charikar, Chen and
Farach-Colton 2002; Kane and Nelson 2014): number i of a gradient is added to bucket h(i) with a random sign. Here
h shifts every run of ``dimension`` consecutive numbers by its own random amount and wraps around, so that a run is
added up as it lies in memory: a multiplication per number, no scattered addition, hence the same sum on every
device whatever the batch. Two numbers of one run never share a bucket, two of different runs do with probability
1 / dimension. That and independent signs are all that these need:

    E ⟨Pa, Pb⟩ = ⟨a, b⟩,    Var ⟨Pa, Pb⟩ ≤ (‖a‖²‖b‖² + ⟨a, b⟩²) / dimension,

the variance of a dense matrix of random signs. More entries per column would make no difference to it. With 4,096
dimensions an inner product is off by 1.6% of ‖a‖‖b‖ (one standard deviation, a and b orthogonal; 2.2%, a = b).
"""

import functools
from collections.abc import Iterable

import numpy as np
import torch

from forgetrace.randomness import generator


def project(
    gradients: Iterable[tuple[str, slice, torch.Tensor]], count: int, dimension: int, seed: int
) -> torch.Tensor:
    """P g for each of several examples, whose gradients come weight by weight and some examples at a time.

    Args:
        gradients: what :func:`forgetrace.curvature.per_example.per_example_gradients` yields; P's columns belong
            to a weight's name and to the places of its numbers.
        count: B, the examples.
        dimension: of the result.
        seed: of P.

    Returns:
        (B, dimension), float32 like the gradients, on their device.
    """
    wide = None
    for name, rows, gradient in gradients:
        if wide is None:
            # Twice as wide as needed, so that a shifted run lies in one piece; the wrapped half is added at the end.
            wide = gradient.new_zeros(count, 2 * dimension)
        # Convolutions channels last, as their gradients lie in memory: nothing is copied.
        flat = (gradient.movedim(2, -1) if gradient.ndim == 5 else gradient).reshape(len(gradient), -1)
        signs, shifts = _columns(seed, name, flat.shape[1], dimension, flat.device)
        buckets = wide[rows]
        for run, sign, shift in zip(flat.split(dimension, dim=1), signs.split(dimension), shifts, strict=True):
            buckets[:, shift : shift + len(sign)].addcmul_(run, sign)
    return wide[:, :dimension] + wide[:, dimension:]


# The chunks of a weight come one after the other: only the signs of the current one are kept.
@functools.lru_cache(maxsize=1)
def _columns(seed: int, name: str, size: int, dimension: int, device: torch.device) -> tuple[torch.Tensor, list[int]]:
    """Of one weight: the sign of each of its numbers, (size,), float32, and the shift of each run of them."""
    stream = generator(seed, "projection", name)
    shifts = stream.integers(dimension, size=-(-size // dimension)).tolist()
    bits = np.unpackbits(np.frombuffer(stream.bytes(-(-size // 8)), dtype=np.uint8), count=size)
    return torch.from_numpy(bits).to(device, torch.float32).mul_(2).sub_(1), shifts
