"""Narrowing: a few draws of (t, ε) for every image, many for those whose place in the ranking is in doubt.

A score is the mean of small noisy differences, and its ranking is used at a few places: who is among the top
K, who is shown. An image far from these boundaries needs few draws. After a first look at all images, each round
gives more draws to those whose mean lies fewest standard errors from a boundary, until the budget is spent
(in the spirit of the fixed-budget allocation of Chen, He, Fu and Lee 2008, OCBA-m; no probability of error is
claimed). Every image goes through the draws in the same order, so two images share those they both had.
"""

from collections.abc import Callable, Iterator

import numpy as np

from forgetrace.artifacts import UserError
from forgetrace.config import Narrowing

STEP, GROUP = 4, 50  # draws more per round, for at least so many images: a batch of 200 evaluations
SWEEPS = 4


def narrow(
    settings: Narrowing, before: np.ndarray, after: np.ndarray, evaluate: Callable[[np.ndarray, np.ndarray], None]
) -> None:
    """Fill in the losses a ranking needs. Killed and started again on what it left, it ends the same.

    Args:
        settings: the first look, the budget and the boundaries.
        before: losses under θ0, (N, T), T = ``settings.most`` draws.
        after: losses under θ_Q, (N, T), NaN where missing; filled in place, as far as asked for.
        evaluate: fills in ``after`` where it is missing, for images (n,) and the draws (n, w) of each.

    Raises:
        UserError: a loss is NaN or infinite.
    """
    known, there = np.zeros(after.shape), np.zeros(after.shape)
    for rows, draws in _rounds(settings, known, there):
        evaluate(rows, draws)
        cells = rows[:, None], draws
        # Of what an interrupted run left in ``after``, nothing counts before it is asked for again.
        known[cells] = after[cells].astype(float) - before[cells]
        there[cells] = 1
        if not np.isfinite(known[cells]).all():
            raise UserError("A loss under the unlearned weights is not finite: lower the variant's step_size.")


def _rounds(settings: Narrowing, known: np.ndarray, there: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and the draws each gets next; looks at the increases so far and where there are any."""
    images = len(known)
    yield np.arange(images), np.tile(np.arange(settings.first), (images, 1))
    had = np.full(images, settings.first)
    group = max(GROUP, images // 100)  # so that the number of rounds does not grow with N
    while had.sum() < settings.mean * images:
        last = had.max()
        doubtful = _distance(_fit(known[:, :last], there[:, :last]), had, settings.tops)
        doubtful[had + STEP > settings.most] = np.inf
        rows = np.argsort(doubtful, kind="stable")[:group]
        rows = np.sort(rows[np.isfinite(doubtful[rows])])
        if not len(rows):
            return
        yield rows, had[rows, None] + np.arange(STEP)
        had[rows] += STEP


def _distance(means: np.ndarray, had: np.ndarray, tops: list[int]) -> np.ndarray:
    """How far each mean is from the nearest boundary, in standard errors up to a common factor."""
    falling = -np.sort(-means)
    inside = [top for top in tops if top < len(means)]
    boundaries = np.array([(falling[top - 1] + falling[top]) / 2 for top in inside])
    if not len(boundaries):
        return np.full(len(means), np.inf)
    return np.abs(means[:, None] - boundaries).min(axis=1) * np.sqrt(had)


def balanced_means(values: np.ndarray) -> np.ndarray:
    """Mean of each image over its draws, freed of how its draws differ from those of others.

    The least-squares fit of ``image + draw``, by alternating projections; the plain mean where nothing is missing.

    Args:
        values: (N, T), NaN from the draw on that an image no longer had.

    Returns:
        (N,), float64; NaN for an image with a gap before its last draw.
    """
    there = ~np.isnan(values)
    gap = (there[:, 1:] > there[:, :-1]).any(axis=1)
    return np.where(gap, np.nan, _fit(np.where(there, values, 0.0), there.astype(float)))


def _fit(known: np.ndarray, there: np.ndarray) -> np.ndarray:
    """The images' part of ``image + draw``; known values (N, T), 0 where ``there`` is 0 -> (N,)."""
    per_image, per_draw = there.sum(axis=1), np.maximum(there.sum(axis=0), 1)
    image_sums, draw_sums = known.sum(axis=1), known.sum(axis=0)
    draws = np.zeros(known.shape[1])
    for _ in range(SWEEPS):
        images = (image_sums - there @ draws) / per_image
        draws = (draw_sums - images @ there) / per_draw
    return images
