"""Common random numbers: what a training draws at a step, whatever images were removed.

Every step draws images, timesteps, noise and dropped captions from (seed, step) over the whole of
D; where a removed image comes up, that slot alone is drawn again. A leave-K-out model then differs
from θ0 by what was removed, not by a reshuffled order.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np

from forgetrace.randomness import generator


@dataclass(frozen=True)
class StepDraw:
    """One step's batch.

    Attributes:
        rows: images, (B,), int64.
        timesteps: (B,), int64.
        noise: (B, C, H, W), float32.
        dropped: where the caption is replaced by the empty one, (B,), bool.
        picks: choose a view of each image, as :meth:`forgetrace.encoding.store.Encoded.views` has it, (B, 2), float64;
            from a stream of their own, so that all else is the same where images have one view.
    """

    rows: np.ndarray
    timesteps: np.ndarray
    noise: np.ndarray
    dropped: np.ndarray
    picks: np.ndarray


def draw_step(
    seed: int,
    step: int,
    removed: np.ndarray,
    batch_size: int,
    length: int,
    latent_shape: tuple[int, ...],
    caption_dropout: float,
) -> StepDraw:
    """The batch of a step.

    Args:
        seed: the training's seed.
        step: from 0.
        removed: which of the N images are left out, (N,), bool.
        batch_size: B.
        length: number of timesteps of the schedule.
        latent_shape: (C, H, W).
        caption_dropout: share of dropped captions.
    """
    common = _common(seed, step, len(removed), batch_size, length, latent_shape, caption_dropout)
    return replace(common, rows=_redraw(common.rows, removed, seed, step))


# Models that are trained as one ask for the same draws one after another.
@functools.lru_cache(maxsize=4)
def _common(
    seed: int,
    step: int,
    images: int,
    batch_size: int,
    length: int,
    latent_shape: tuple[int, ...],
    caption_dropout: float,
) -> StepDraw:
    """The batch of a step where nothing is removed."""
    stream = generator(seed, "train", step)
    rows = stream.integers(images, size=batch_size)
    timesteps = stream.integers(length, size=batch_size)
    dropped = stream.random(batch_size) < caption_dropout
    noise = stream.standard_normal((batch_size, *latent_shape), dtype=np.float32)
    picks = generator(seed, "view", step).random((batch_size, 2))
    return StepDraw(rows, timesteps, noise, dropped, picks)


def _redraw(rows: np.ndarray, removed: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Replace removed images; every slot has its own sequence of substitutes."""
    if removed.all():
        raise ValueError("every training image is removed")
    rows = rows.copy()
    stream = generator(seed, "redraw", step)
    while (gone := removed[rows]).any():
        substitutes = stream.integers(len(removed), size=len(rows))
        rows[gone] = substitutes[gone]
    return rows
