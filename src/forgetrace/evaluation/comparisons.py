"""Pairs of methods on the same queries, with the tests of one family corrected for their number."""

from typing import NamedTuple

import numpy as np

from forgetrace.evaluation.statistics import holm, sign_flip_test

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
        interval: 95% interval of its mean.
    """

    a: str
    b: str
    difference: np.ndarray
    interval: tuple[float, float]


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
        queries, mean = len(pair.difference), pair.difference.mean()
        rows.append((k, metric, pair.a, pair.b, queries, mean, *pair.interval, own, corrected))
    return rows
