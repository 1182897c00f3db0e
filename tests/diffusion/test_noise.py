import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetrace.diffusion.noise import NoiseBank, even_timesteps, monte_carlo, spaced_timesteps

SHAPE = (3, 4, 4)


def bank(shared: bool, seed: int = 1, purpose: str = "scan") -> NoiseBank:
    return NoiseBank(seed, purpose, spaced_timesteps(4, 100), SHAPE, shared)


def test_timesteps_are_spaced_as_in_the_paper():
    assert spaced_timesteps(20, 1000).tolist() == list(range(0, 1000, 50))
    assert spaced_timesteps(3, 10).tolist() == [0, 3, 6]
    assert spaced_timesteps(3, 10).dtype == np.int64


def test_shared_noise_is_one_per_draw_whatever_the_image():
    shared = bank(shared=True)
    np.testing.assert_array_equal(shared.noise("a", 2), shared.noise("b", 2))
    np.testing.assert_array_equal(shared.draws()[2], shared.noise("a", 2))
    assert len(np.unique(shared.draws().reshape(4, -1), axis=0)) == 4


def test_noise_of_an_image_does_not_depend_on_what_was_asked_before():
    own = bank(shared=False)
    asked = [("a", 0), ("b", 3), ("a", 3), ("b", 0)]
    forwards = {key: own.noise(*key) for key in asked}
    backwards = {key: bank(shared=False).noise(*key) for key in reversed(asked)}
    for key in asked:
        np.testing.assert_array_equal(forwards[key], backwards[key])
    assert len({noise.tobytes() for noise in forwards.values()}) == 4


@pytest.mark.parametrize("other", [{"seed": 2}, {"purpose": "evaluate"}])
def test_seeds_and_purposes_have_noises_of_their_own(other):
    assert not np.array_equal(bank(True).draws(), bank(True, **other).draws())


def test_noise_is_standard_normal():
    noise = NoiseBank(0, "scan", spaced_timesteps(50, 100), (12, 8, 8)).draws()
    assert noise.dtype == np.float32
    count = noise.size  # 38,400
    assert abs(noise.mean()) < 4 / np.sqrt(count)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / count)
    assert abs(np.mean(noise[:-1] * noise[1:])) < 4 / np.sqrt(count)


@given(start=st.integers(0, 60), size=st.integers(1, 40), cut=st.integers(0, 40), length=st.integers(1, 30))
@settings(max_examples=40)
def test_a_draw_is_a_function_of_its_number(start, size, cut, length):
    cut = min(cut, size)
    whole = monte_carlo(3, "p", range(start, start + size), length, (2,))
    parts = [range(start, start + cut), range(start + cut, start + size)]
    pieces = [monte_carlo(3, "p", part, length, (2,)) for part in parts if part]
    for i in range(2):
        np.testing.assert_array_equal(np.concatenate([piece[i] for piece in pieces]), whole[i])


@given(length=st.integers(1, 50), rounds=st.integers(0, 3))
@settings(max_examples=20)
def test_every_run_of_draws_visits_each_timestep_once(length, rounds):
    timesteps, _ = monte_carlo(0, "p", range(rounds * length, (rounds + 1) * length), length, (1,))
    assert sorted(timesteps) == list(range(length))
    assert timesteps.dtype == np.int64


def test_rounds_are_shuffled_afresh_and_noises_differ():
    timesteps, noise = monte_carlo(0, "p", range(60), 30, (2,))
    assert timesteps[:30].tolist() != timesteps[30:].tolist()
    assert len(np.unique(noise, axis=0)) == 60
    assert noise.dtype == np.float32


@given(seed=st.integers(0, 1000), count=st.integers(1, 200), length=st.integers(1, 2000))
@settings(max_examples=100)
def test_every_prefix_of_even_timesteps_is_spread_evenly(seed, count, length):
    timesteps = even_timesteps(seed, "p", count, length)
    assert ((timesteps >= 0) & (timesteps < length)).all()
    np.testing.assert_array_equal(timesteps, even_timesteps(seed, "p", count + 7, length)[:count])
    # No half of the schedule gets more than its share by more than two draws.
    assert abs((timesteps < length / 2).sum() - count / 2) <= 2 + count / length


def test_even_timesteps_are_uniform_over_seeds():
    first, tenth = (np.array([even_timesteps(seed, "p", 10, 1000)[draw] for seed in range(400)]) for draw in (0, 9))
    for timesteps in (first, tenth):
        assert abs(timesteps.mean() - 500) < 4 * 289 / 20
        assert timesteps.min() < 50
        assert timesteps.max() > 950


def test_noises_of_several_images_are_those_of_each():
    for shared in (True, False):
        some = bank(shared).of(["a", "b"], np.array([[1, 2], [3, 0]]))
        pairs = [("a", 1), ("a", 2), ("b", 3), ("b", 0)]
        expected = np.stack([bank(shared).noise(*pair) for pair in pairs])
        np.testing.assert_array_equal(some, expected)


def test_golden_draws():
    """What every result of the project follows from."""
    shared, own = (NoiseBank(0, "scan", np.array([3, 5]), (1, 1, 2), shared=shared) for shared in (True, False))
    np.testing.assert_allclose(shared.noise("digit-7", 1).ravel(), [-0.9595, 0.5048], atol=1e-4)
    np.testing.assert_allclose(own.noise("digit-7", 1).ravel(), [-0.6606, 1.7715], atol=1e-4)
    assert even_timesteps(0, "scan", 4, 1000).tolist() == [448, 66, 684, 302]
    timesteps, noise = monte_carlo(0, "fisher", range(2, 5), 1000, (1, 1, 2))
    assert timesteps.tolist() == [47, 553, 169]
    np.testing.assert_allclose(noise.ravel(), [-0.6231, 1.7092, -0.058, -0.6254, 0.2937, -0.1748], atol=1e-4)
