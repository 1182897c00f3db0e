"""Narrowing: a few draws of (t, ε) for every image, many for those whose place in the ranking is in doubt.

A score is the mean of small noisy differences, and its ranking is used at a few places: who is among the top
K, who is shown. An image far from these boundaries needs few draws. After a first look at all images, each round
gives more draws to those whose mean lies fewest standard errors from a boundary, until the budget is spent
(in the spirit of the fixed-budget allocation of Chen, He, Fu and Lee 2008, OCBA-m; no probability of error is
claimed). Every image goes through the draws in the same order, so two images share those they both had.

Only who is above the boundaries is meant to be used. Images are chosen by their noise as much as by their score, so
the scores of those with many draws are not on one scale with those of the rest.
"""

from collections.abc import Callable, Iterator

import numpy as np

from forgetrace.artifacts import UserError
from forgetrace.config import STEP, Narrowing

GROUP = 50  # images of a round, at least: with STEP draws a batch of 200 evaluations
PRIOR_DRAWS, NEIGHBOURS, SWEEPS = 10, 25, 4


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
        UserError: a loss is NaN or infinite, or a boundary is not below N.
    """
    if max(settings.tops) >= len(after):
        raise UserError(f"scan.narrowing.tops: {max(settings.tops)} is not less than the {len(after)} training images.")
    if not np.isfinite(before).all():
        raise UserError("The scan of θ0 holds losses that are missing or not finite: delete it and run again.")
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
        distances = _distances(known[:, :last], there[:, :last], settings.tops)
        distances[:, had + STEP > settings.most] = np.inf
        # Every boundary gets its share: the noise of the leaders, who differ most, is larger than that of the rest.
        nearest = np.argsort(distances, axis=1, kind="stable")[:, : max(1, group // len(settings.tops))]
        rows = np.unique(nearest[np.isfinite(np.take_along_axis(distances, nearest, axis=1))])
        if not len(rows):
            return
        yield rows, had[rows, None] + np.arange(STEP)
        had[rows] += STEP


def _distances(known: np.ndarray, there: np.ndarray, tops: list[int]) -> np.ndarray:
    """Standard errors between each image's mean and each boundary; (N, T) and (N, T) -> (boundaries, N).

    Noise grows with the score, a hundredfold over the images, but few draws tell little of an image's own: its variance
    is pulled to the average one of the images ranked next to it, with the weight of some draws.
    """
    had, means = there.sum(axis=1), _fit(known, there)
    draws = (known - there * means[:, None]).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    squares = (there * (known - means[:, None] - draws) ** 2).sum(axis=1)
    falling = np.argsort(-means, kind="stable")
    usual = np.empty(len(means))
    usual[falling] = _moving_average((squares / (had - 1))[falling], NEIGHBOURS)
    errors = np.sqrt((PRIOR_DRAWS * usual + squares) / (PRIOR_DRAWS + had - 1) / had)
    boundaries = np.array([means[falling[top - 1 : top + 1]].mean() for top in tops])
    return np.abs(means - boundaries[:, None]) / np.maximum(errors, np.finfo(np.float32).tiny)


def _moving_average(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and ``reach`` on either side, as far as there are any; (N,) -> (N,)."""
    sums, places = np.concatenate([[0], np.cumsum(values)]), np.arange(len(values))
    start, stop = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def balanced_means(values: np.ndarray) -> np.ndarray:
    """Mean of each image over its draws, corrected for how its draws differ from those of others.

    Four alternating projections towards the least-squares fit of ``image + draw``; the plain mean where nothing is
    missing. The fit itself would be no better: images with many draws were chosen for what the first ones said.

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
