"""Statistics over queries: standard errors, bootstrap intervals, paired tests.

A method's values form a matrix (queries, draws): one draw for a method whose models belong to one
query each, several for ``random``, whose models are shared by all queries. The quantity of interest
is always the mean of that matrix.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
EXACT_QUERIES = 16  # up to here all 2ⁿ sign patterns are enumerated
MONTE_CARLO_PATTERNS = 2**EXACT_QUERIES


def standard_error(values: np.ndarray) -> float:
    """Standard error of a mean: sample standard deviation (n - 1) over the square root of n.

    Args:
        values: one per query, shape (n,).

    Returns:
        NaN for a single value.
    """
    if len(values) < 2:
        return float("nan")
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def bootstrap_means(samples: Sequence[np.ndarray], resamples: int, seed: int) -> np.ndarray:
    """Bootstrap means of several methods on the same queries.

    Queries are resampled jointly, so a difference of two rows is a paired one; draws are resampled
    for each method on their own, independently of the queries (the pigeonhole bootstrap for crossed
    factors, Owen 2007). Few draws tell little about the spread of draws: R of them understate its
    variance by the factor (R - 1) / R.

    Args:
        samples: matrices (queries, draws) with equally many rows; draws may differ.
        resamples: how many bootstrap samples.
        seed: equal seeds give equal samples.

    Returns:
        Shape (len(samples), resamples).
    """
    random = np.random.default_rng(seed)
    queries = len(samples[0])
    query_weights = resampling_counts(queries, resamples, random) / queries
    means = np.empty((len(samples), resamples))
    for row, values in enumerate(samples):
        draws = values.shape[1]
        draw_weights = resampling_counts(draws, resamples, random) / draws
        means[row] = ((query_weights @ values) * draw_weights).sum(axis=1)
    return means


def interval(means: np.ndarray, queries: int) -> tuple[float, float]:
    """95% interval from bootstrap means: expanded percentiles.

    A plain percentile interval is too short for few queries: it uses n instead of n - 1 and normal
    instead of Student quantiles. Moving its two levels outwards until, for normal data, it equals
    the t interval repairs both (Hesterberg 2015, sec. 5.3). With fewer than six queries the levels
    reach the ends of the bootstrap distribution, and the interval stays somewhat too short.

    Args:
        means: bootstrap means, shape (resamples,).
        queries: how many queries they resample.

    Returns:
        Lower and upper end; NaN for a single query.
    """
    if queries < 2:
        return float("nan"), float("nan")
    quantile = stats.t.ppf(0.5 + CONFIDENCE / 2, queries - 1)
    level = stats.norm.cdf(-np.sqrt(queries / (queries - 1)) * quantile)
    low, high = np.quantile(means, [level, 1 - level])
    return float(low), float(high)


def crossed_interval(values: np.ndarray, resampled: np.ndarray) -> tuple[float, float, float]:
    """Standard error and 95% interval of a mean over queries that share a second sample, such as random halves.

    The spread of the values over queries, s²/n, holds what differs between queries and each query's own share of the
    second sample's noise, but not what a different second sample would move in all queries alike. That is the mean
    covariance c of two queries when the second sample is resampled, so the variance of the mean is s²/n + c. (To
    resample both factors at once, as :func:`bootstrap_means` does for draws, counts every query's own noise twice:
    where that is large, as here, intervals become half again as wide as they should be.) The interval is Student's,
    with n - 1 degrees of freedom.

    Args:
        values: one per query, shape (n,).
        resampled: the same in bootstrap samples of the second factor, shape (resamples, n).

    Returns:
        Standard error, lower and upper end; NaN for a single query.
    """
    queries = len(values)
    if queries < 2:
        return float("nan"), float("nan"), float("nan")
    of_sum, of_each = resampled.sum(axis=1).var(ddof=1), resampled.var(axis=0, ddof=1).sum()
    covariance = (of_sum - of_each) / (queries * (queries - 1))
    error = np.sqrt(standard_error(values) ** 2 + max(covariance, 0.0))
    reach = stats.t.ppf(0.5 + CONFIDENCE / 2, queries - 1) * error
    return float(error), float(values.mean() - reach), float(values.mean() + reach)


def sign_flip_test(differences: np.ndarray, seed: int) -> float:
    """Two-sided p of a paired permutation test of mean difference zero (Fisher 1935).

    Under the hypothesis each query's difference is as likely as its negative. All 2ⁿ sign patterns
    are enumerated for up to 16 queries; beyond, 65,536 random ones are drawn and the observed one
    is added to both counts (Phipson and Smyth 2010). The smallest p of n queries is 2 / 2ⁿ: four
    queries cannot show p < 0.05, six can.

    Args:
        differences: one per query, shape (n,).
        seed: of the random patterns.
    """
    if len(differences) < 2:
        return 1.0  # a difference and its negative are equally extreme
    result = stats.permutation_test(
        (differences,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=MONTE_CARLO_PATTERNS,
        alternative="two-sided",
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction: the chance of any false finding in the family stays below p.

    The i-th smallest of m values is multiplied by m - i + 1, made monotone and cut off at 1. NaN, which stands for no
    test, does not count and stays.

    Args:
        p: values of one family, shape (m,).

    Returns:
        Corrected values in the same order, shape (m,).
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")[: np.isfinite(p).sum()]  # NaN sorts last
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return corrected


def spearman(x: np.ndarray, y: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
    """Spearman's rank correlation of n pairs in samples that repeat some and lack others.

    Equal values share the mean of their ranks, and so do the copies of a pair. Where all x or all y of a sample are
    equal, nothing is predicted: 0.

    Args:
        x: shape (n,).
        y: shape (n,).
        counts: how often each pair is in each sample, shape (resamples, n), rows sum to n; by default once in one.

    Returns:
        Shape (resamples,), in [-1, 1].
    """
    counts = np.ones((1, len(x))) if counts is None else counts
    a, b = _centred_ranks(x, counts), _centred_ranks(y, counts)
    scale = np.sqrt((counts * a * a).sum(axis=1) * (counts * b * b).sum(axis=1))
    return np.divide((counts * a * b).sum(axis=1), scale, out=np.zeros(len(counts)), where=scale > 0)


def _centred_ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Ranks of n values in each sample of :func:`spearman`, less their mean; shape (resamples, n).

    The rank of a value is the number of those below it and half of those equal to it, itself among them: a matrix
    product instead of a sort per sample, exact because ranks are multiples of a half.
    """
    below = (values < values[:, None]) + 0.5 * (values == values[:, None])
    return counts @ below.T - len(values) / 2


def resampling_counts(size: int, resamples: int, random: np.random.Generator) -> np.ndarray:
    """How often each of n items is in samples of n with replacement, shape (resamples, n), float64."""
    return random.multinomial(size, np.full(size, 1 / size), size=resamples).astype(float)
