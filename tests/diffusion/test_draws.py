import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetrace.diffusion.draws import draw_step

IMAGES, BATCH, SHAPE = 30, 16, (2, 2, 2)


def draw(step: int, removed: np.ndarray, seed: int = 4, dropout: float = 0.25):
    return draw_step(seed, step, removed, BATCH, 50, SHAPE, dropout)


def mask(rows) -> np.ndarray:
    removed = np.zeros(IMAGES, dtype=bool)
    removed[list(rows)] = True
    return removed


SETS = st.sets(st.integers(0, IMAGES - 1), max_size=IMAGES - 1)


@given(step=st.integers(0, 5000), gone=SETS, seed=st.integers(0, 100))
@settings(max_examples=200)
def test_only_slots_that_drew_a_removed_image_differ(step, gone, seed):
    whole, part = draw(step, mask([]), seed), draw(step, mask(gone), seed)
    removed = mask(gone)
    assert not removed[part.rows].any()
    np.testing.assert_array_equal(part.rows != whole.rows, removed[whole.rows])
    np.testing.assert_array_equal(part.timesteps, whole.timesteps)
    np.testing.assert_array_equal(part.noise, whole.noise)
    np.testing.assert_array_equal(part.dropped, whole.dropped)


@given(step=st.integers(0, 5000), gone=SETS, more=SETS)
@settings(max_examples=100)
def test_slots_untouched_by_a_larger_removal_keep_their_substitute(step, gone, more):
    """A nested removal changes only the slots that drew one of the images removed in addition."""
    if len(gone | more) == IMAGES:
        return
    small, large = draw(step, mask(gone)).rows, draw(step, mask(gone | more)).rows
    np.testing.assert_array_equal(small != large, mask(gone | more)[small])


def test_draws_cover_everything_evenly():
    drawn = [draw(step, mask([0, 1])) for step in range(400)]
    rows = np.bincount(np.concatenate([d.rows for d in drawn]), minlength=IMAGES)
    assert rows[:2].tolist() == [0, 0]
    expected = 400 * BATCH / (IMAGES - 2)
    assert np.square(rows[2:] - expected).sum() / expected < 60  # chi-squared, 27 degrees: p < 0.001
    timesteps = np.bincount(np.concatenate([d.timesteps for d in drawn]), minlength=50)
    assert len(timesteps) == 50
    assert np.square(timesteps - 128).sum() / 128 < 90  # 49 degrees
    assert np.mean([d.dropped for d in drawn]) == pytest.approx(0.25, abs=0.025)
    assert np.mean([d.noise for d in drawn]) == pytest.approx(0, abs=0.02)
    assert np.std([d.noise for d in drawn]) == pytest.approx(1, abs=0.02)


def test_a_step_is_a_function_of_seed_and_step():
    first = draw(7, mask([3]))
    np.testing.assert_array_equal(draw(7, mask([3])).rows, first.rows)
    assert draw(8, mask([3])).rows.tolist() != first.rows.tolist()
    assert draw(7, mask([3]), seed=5).rows.tolist() != first.rows.tolist()
    assert not draw(7, mask([]), dropout=0).dropped.any()


def test_removing_every_image_is_an_error():
    with pytest.raises(ValueError, match="every training image is removed"):
        draw(0, np.ones(IMAGES, dtype=bool))


def test_golden_draws():
    """What every result of the project follows from: another order of calls would change all of them."""
    step = draw_step(0, 7, np.arange(50) < 25, 6, 1000, (1, 2, 2), 0.5)
    assert step.rows.tolist() == [29, 30, 38, 45, 47, 27]
    assert step.timesteps.tolist() == [144, 649, 534, 512, 572, 401]
    assert step.dropped.tolist() == [False, False, False, True, True, False]
    np.testing.assert_allclose(step.noise[0].ravel(), [-0.617, 2.3267, -0.7789, -0.3405], atol=1e-4)
    np.testing.assert_allclose(step.picks[0], [0.4712, 0.0823], atol=1e-4)
