import numpy as np
import pytest
from scipy import stats

from forgetrace.evaluation.statistics import (
    bootstrap_means,
    crossed_interval,
    holm,
    interval,
    resampling_counts,
    sign_flip_test,
    spearman,
    standard_error,
)


def test_standard_error_is_the_textbook_formula():
    # Deviations from the mean 5 are -3, -1, 1, 3: variance 20/3, standard error sqrt(20/3/4).
    assert standard_error(np.array([2.0, 4.0, 6.0, 8.0])) == pytest.approx(np.sqrt(20 / 12))


def test_one_query_has_no_standard_error_and_no_interval():
    assert np.isnan(standard_error(np.array([1.0])))
    assert np.isnan(interval(np.ones(10), queries=1)).all()


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0], 1.0),  # both patterns are as extreme
        ([1.0, 1.0], 0.5),  # ++ and -- of four
        ([1.0, 2.0, 3.0], 0.25),  # +++ and --- of eight
        ([1.0, 2.0, -3.0], 1.0),  # the sum is 0: every pattern is as extreme
        ([-1.0, 2.0, 3.0], 0.5),  # |sum| 4 or 6: four of eight
        ([0.0, 0.0, 0.0, 0.0], 1.0),
        ([0.1, 0.2, 0.3, 0.3], 0.125),  # all of one sign: 2 of 16
    ],
)
def test_sign_flip_p_by_hand(differences, p):
    assert sign_flip_test(np.array(differences), seed=0) == pytest.approx(p)


def test_sign_flip_is_two_sided_and_ignores_order_and_scale():
    differences = np.array([0.3, -0.1, 0.7, 0.2, 0.4])
    expected = sign_flip_test(differences, seed=0)
    assert sign_flip_test(-differences, seed=1) == expected
    assert sign_flip_test(differences[::-1], seed=2) == expected
    assert sign_flip_test(1e-6 * differences, seed=3) == expected


def test_sign_flip_of_sixteen_queries_is_exact():
    assert sign_flip_test(np.ones(16), seed=0) == pytest.approx(2 / 2**16)


def test_sign_flip_beyond_enumeration_is_never_zero_and_near_the_t_test():
    differences = np.random.default_rng(5).normal(0.4, 1, 30)
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert sign_flip_test(differences, seed=0) == pytest.approx(expected, abs=0.01)
    assert 0 < sign_flip_test(np.ones(60), seed=0) < 1e-4


def test_sign_flip_keeps_its_level():
    random = np.random.default_rng(0)
    p = [sign_flip_test(random.normal(size=8), seed=0) for _ in range(400)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_holm_by_hand():
    # Sorted: .005·4 = .02, .01·3 = .03, .03·2 = .06, .04·1 = .04, raised to .06.
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_cuts_off_at_one_and_leaves_a_single_test_alone():
    assert holm(np.array([0.6, 0.7])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([0.03])) == pytest.approx([0.03])
    assert len(holm(np.array([]))) == 0


def test_holm_does_not_count_what_was_not_tested():
    corrected = holm(np.array([np.nan, 0.04, np.nan, 0.03]))
    assert corrected == pytest.approx([np.nan, 0.06, np.nan, 0.06], nan_ok=True)


@pytest.mark.parametrize("queries", [8, 20])
def test_interval_covers_the_mean_of_normal_data(queries):
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(500):
        low, high = interval(bootstrap_means([random.normal(2, 1, (queries, 1))], 1000, trial)[0], queries)
        covered += low <= 2 <= high
    assert covered / 500 == pytest.approx(0.95, abs=0.035)


def test_interval_over_draws_covers_a_mean_of_crossed_effects():
    random = np.random.default_rng(2)
    covered = 0
    for trial in range(400):
        values = 2 + random.normal(size=(12, 1)) + random.normal(size=(1, 8)) + random.normal(size=(12, 8))
        low, high = interval(bootstrap_means([values], 800, trial)[0], 12)
        covered += low <= 2 <= high
    assert covered / 400 == pytest.approx(0.95, abs=0.04)


def test_interval_approaches_the_t_interval():
    values = np.random.default_rng(3).normal(size=40)
    low, high = interval(bootstrap_means([values[:, None]], 20000, 0)[0], 40)
    expected = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.03)


def test_queries_are_resampled_jointly_and_draws_independently():
    column = np.arange(5.0)[:, None]
    a, b = bootstrap_means([column + 1, column], 200, seed=0)
    assert a - b == pytest.approx(np.ones(200))  # the same queries in both
    draws = np.array([[0.0, 1.0]]).repeat(5, axis=0)
    a, b = bootstrap_means([draws, draws], 200, seed=0)
    assert set(np.round(a, 12)) == {0.0, 0.5, 1.0}
    assert np.ptp(a - b) > 0


def test_bootstrap_repeats_with_its_seed():
    values = np.random.default_rng(0).normal(size=(6, 3))
    assert np.array_equal(bootstrap_means([values], 50, 7), bootstrap_means([values], 50, 7))
    assert not np.array_equal(bootstrap_means([values], 50, 7), bootstrap_means([values], 50, 8))


def test_spearman_is_scipys_on_every_resample():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 6, 15).astype(float), random.normal(size=15)  # ties in x
    counts = resampling_counts(15, 50, random)
    assert (counts.sum(axis=1) == 15).all()
    places = [np.repeat(np.arange(15), row.astype(int)) for row in counts]
    expected = [stats.spearmanr(x[rows], y[rows]).statistic for rows in places]
    assert spearman(x, y, counts) == pytest.approx(expected)
    assert spearman(x, y) == pytest.approx([stats.spearmanr(x, y).statistic])


def test_spearman_of_values_that_are_all_equal_is_zero():
    assert spearman(np.ones(4), np.arange(4.0)).tolist() == [0]
    assert spearman(np.arange(2.0), np.arange(2.0), np.array([[2.0, 0.0], [1.0, 1.0]])).tolist() == [0, 1]


def test_a_crossed_interval_by_hand():
    # Values 1, 3: s²/n = 1. Resampled they move by (-1, -1) or (1, 1): variance 4/3 each and covariance 4/3 of four.
    moved = np.array([[0.0, 2.0], [2.0, 4.0], [0.0, 2.0], [2.0, 4.0]])
    error, low, high = crossed_interval(np.array([1.0, 3.0]), moved)
    assert error == pytest.approx(np.sqrt(1 + 4 / 3))
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 1) * error)
    # Moved against each other they say nothing about the mean, of which s²/n is all there is.
    apart = np.array([[0.0, 4.0], [2.0, 2.0]])
    assert crossed_interval(np.array([1.0, 3.0]), apart)[0] == pytest.approx(1)
    assert np.isnan(crossed_interval(np.array([1.0]), np.ones((5, 1)))).all()
