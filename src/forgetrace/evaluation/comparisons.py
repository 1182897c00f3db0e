"""Pairs of methods on the same queries, with the tests of one family corrected for their number."""

from typing import NamedTuple

import numpy as np

from forgetrace.evaluation.statistics import holm, interval, sign_flip_test

COMPARISONS = [
    "k", "metric", "method_a", "method_b", "n_queries",
    "mean_difference", "ci_low", "ci_high", "p", "p_holm",
]  # fmt: skip


class Pair(NamedTuple):
    """Two methods on the queries that both have.

    Attributes:
        a: a method.
        b: another one.
        difference: a less b, one per query, shape (queries,).
        resampled: bootstrap means of the difference, shape (resamples,).
    """

    a: str
    b: str
    difference: np.ndarray
    resampled: np.ndarray


def family(k: int, metric: str, pairs: list[Pair], seed: int) -> list[tuple]:
    """Rows of ``comparisons.csv`` for all pairs of one K and metric, a family of Holm's correction.

    Args:
        k: images left out; 0 where it is no matter of K.
        metric: what the differences are of.
        pairs: those of the family.
        seed: of the random patterns of the sign-flip test, which is two-sided and over queries.
    """
    p = np.array([sign_flip_test(pair.difference, seed) for pair in pairs])
    rows = []
    for pair, own, corrected in zip(pairs, p, holm(p), strict=True):
        queries = len(pair.difference)
        low, high = interval(pair.resampled, queries)
        rows.append((k, metric, pair.a, pair.b, queries, pair.difference.mean(), low, high, own, corrected))
    return rows
