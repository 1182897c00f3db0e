import numpy as np
import pytest
import torch

from forgetrace.attribution.calibration import Calibration, calibrate, divergence


def test_probabilities_by_hand():
    found = Calibration(sharpness=2.0, cutoff=0.1).probabilities(np.array([0.9, 0.4, -0.5]))
    weights = np.array([1 - 0.1, np.exp(-1) - 0.1, 0])  # exp(-2.8) is below the cutoff
    np.testing.assert_allclose(found, weights / weights.sum())
    assert found.sum() == pytest.approx(1)


def test_the_divergence_is_that_of_the_uniform_truth_where_nothing_is_cut_off():
    similarities, exemplars = np.array([0.7, 0.5, 0.1, 0.0]), np.array([True, True, False, False])
    p = Calibration(3.0, 0.0).probabilities(similarities)
    expected = sum(0.5 * np.log(0.5 / p[i]) for i in range(2))
    arguments = torch.tensor(similarities), torch.tensor(exemplars), torch.tensor(3.0), torch.tensor(0.0)
    assert divergence(*arguments).item() == pytest.approx(expected, abs=1e-3)
    assert torch.isfinite(divergence(*arguments[:2], torch.tensor(500.0), torch.tensor(0.9)))


def test_the_fit_recovers_the_sharpness_that_made_the_truth():
    """Two exemplars of equal similarity among others far below: the sharper the better, up to what the data allow."""
    random, queries = np.random.default_rng(0), []
    for _ in range(40):
        similarities = random.uniform(0, 1, 60)
        p = np.exp(similarities * 8)
        exemplars = np.zeros(60, dtype=bool)
        exemplars[random.choice(60, p=p / p.sum())] = True
        queries.append((similarities, exemplars))
    found, value = calibrate(queries)
    assert 5 < found.sharpness < 13
    assert found.cutoff < 0.1
    start = np.mean(
        [divergence(torch.tensor(s), torch.tensor(e), torch.tensor(20.0), torch.tensor(0.1)).item() for s, e in queries]
    )
    assert value < start
