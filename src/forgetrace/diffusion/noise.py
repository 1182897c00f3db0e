"""Noise that depends on what it is for and on nothing else.

The noise of a scan must not change with batching, order, sharding, threads or device, or scores of
two runs cannot be compared. A bank gives (t, ε) for (image id, draw index); draws are made by a
counter-based generator on the CPU and moved where they are needed.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from forgetrace.randomness import generator

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class NoiseBank:
    """Timesteps with noise.

    Attributes:
        seed: the experiment's seed.
        purpose: keeps the banks of different stages apart.
        timesteps: timestep of each draw, shape (T,), int64.
        latent_shape: (C, H, W).
        shared: draw i has one noise for all images; otherwise one per image.
    """

    seed: int
    purpose: str
    timesteps: np.ndarray
    latent_shape: tuple[int, int, int]
    shared: bool = True
    # Its noise is the same on every kind of device; see ReleaseNoise.
    drawn_on: ClassVar[tuple[str, ...]] = ()

    def noise(self, image_id: str, draw: int) -> np.ndarray:
        """Standard normal noise (C, H, W), float32."""
        owner = "" if self.shared else image_id
        stream = generator(self.seed, "noise", self.purpose, owner, draw)
        return stream.standard_normal(self.latent_shape, dtype=np.float32)

    def draws(self) -> np.ndarray:
        """The shared noises of all draws; (T, C, H, W), float32."""
        return np.stack([self.noise("", draw) for draw in range(len(self.timesteps))])

    def of(self, image_ids: list[str], draws: np.ndarray) -> np.ndarray:
        """Noise of w draws for each of n images, (n, w) -> (n · w, C, H, W), images outermost; float32."""
        if self.shared:
            return self._shared[draws.reshape(-1)]
        pairs = zip(image_ids, draws.tolist(), strict=True)
        return np.stack([self.noise(image_id, draw) for image_id, row in pairs for draw in row])

    @functools.cached_property
    def _shared(self) -> np.ndarray:
        return self.draws()


def spaced_timesteps(count: int, length: int) -> np.ndarray:
    """``count`` evenly spaced timesteps from 0; 20 of 1,000 are 0, 50, …, 950. Shape (count,), int64."""
    return np.arange(count, dtype=np.int64) * length // count


def even_timesteps(seed: int, purpose: str, count: int, length: int) -> np.ndarray:
    """Timesteps every prefix of which is spread evenly: a random start, then steps of the golden ratio.

    Each is uniform over the schedule, so that a mean over any number of them estimates the mean over all.

    Args:
        seed: the experiment's seed.
        purpose: keeps the timesteps of different stages apart.
        count: how many.
        length: timesteps of the schedule.

    Returns:
        Timesteps (count,), int64.
    """
    start = generator(seed, purpose, "timesteps").random()
    return ((start + np.arange(count) * GOLDEN) % 1 * length).astype(np.int64)


def monte_carlo(
    seed: int, purpose: str, draws: range, length: int, latent_shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Draws of (t, ε) for an expectation, each a function of its own number.

    Timesteps are stratified: every run of ``length`` draws visits each timestep once.

    Args:
        seed: the experiment's seed.
        purpose: keeps the draws of different stages apart.
        draws: numbers of the wanted draws.
        length: timesteps of the schedule.
        latent_shape: (C, H, W).

    Returns:
        Timesteps (n,), int64, and noise (n, C, H, W), float32.
    """
    rounds = {i // length: None for i in draws}
    orders = {r: generator(seed, purpose, "timesteps", r).permutation(length) for r in rounds}
    timesteps = np.array([orders[i // length][i % length] for i in draws], dtype=np.int64)
    noise = [generator(seed, purpose, "noise", i).standard_normal(latent_shape, dtype=np.float32) for i in draws]
    return timesteps, np.stack(noise)
