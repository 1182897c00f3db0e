import numpy as np
import pytest

from forgetrace.evaluation.metrics import (
    METRICS,
    cosine,
    image_metrics,
    mean_squared_error,
    structural_similarity,
)

from .synthetic import flat_encoder


def flat(level: int, size: int = 16) -> np.ndarray:
    return np.full((size, size, 3), level, dtype=np.uint8)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def test_an_identical_image_is_not_forgotten():
    values = image_metrics(noise(0), np.stack([noise(0), noise(1)]), flat_encoder)
    assert set(values) < set(METRICS)
    assert [column[0] for column in values.values()] == pytest.approx([0, 1, 1])
    for name, column in values.items():
        assert METRICS[name].forgotten * (column[1] - column[0]) > 0


def test_squared_error_by_hand():
    half = flat(0)
    half[:8] = 255
    # Black against white is 1, against half white 1/2, against level 51 it is (51/255)².
    others = np.stack([flat(0), flat(255), half, flat(51)])
    assert mean_squared_error(flat(0), others) == pytest.approx([0, 1, 0.5, 0.04])


def test_squared_error_does_not_wrap_around():
    assert mean_squared_error(flat(255), flat(0)[None]) == pytest.approx([1])


def test_cosine_by_hand():
    vectors = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [-1.0, 0.0]])
    assert cosine(np.array([5.0, 0.0]), vectors) == pytest.approx([1, 0, np.sqrt(0.5), -1])


def test_ssim_of_flat_images_is_its_luminance_term():
    # No variance: (2ab + C1) / (a² + b² + C1) with C1 = 0.01².
    a, b, c1 = 51 / 255, 102 / 255, 1e-4
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert structural_similarity(flat(51), flat(102)) == pytest.approx(expected)


def test_ssim_matches_its_definition_on_one_window():
    x, y = noise(0)[:7, :7], noise(1)[:7, :7]
    expected = []
    for a, b in zip((x / 255).reshape(49, 3).T, (y / 255).reshape(49, 3).T, strict=True):
        covariance = np.cov(a, b, ddof=0)
        luminance = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
        structure = (2 * covariance[0, 1] + 9e-4) / (covariance[0, 0] + covariance[1, 1] + 9e-4)
        expected.append(luminance * structure)
    assert structural_similarity(x, y) == pytest.approx(np.mean(expected))


def test_ssim_is_symmetric_and_left_out_below_its_window():
    there, back = structural_similarity(noise(0), noise(1)), structural_similarity(noise(1), noise(0))
    assert there == pytest.approx(back)
    assert "ssim" not in image_metrics(flat(9, size=6), flat(8, size=6)[None], flat_encoder)
