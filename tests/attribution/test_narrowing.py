import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_arrays
from forgetrace.attribution import narrowing as narrowing_module
from forgetrace.attribution import scan as scan_module
from forgetrace.attribution.narrowing import balanced_means, narrow
from forgetrace.attribution.scan import scan
from forgetrace.config import Narrowing
from forgetrace.layout import Layout

from ..conftest import IMAGES, in_child, settings

SETTINGS = Narrowing(first=3, mean=6, most=20, tops=[5, 60])


class Truth:
    """Losses known in full, handed out where they are asked for."""

    def __init__(self, before: np.ndarray, after: np.ndarray):
        self.before, self.full, self.asked = before, after, []
        self.after = np.full_like(after, np.nan)

    def evaluate(self, rows: np.ndarray, draws: np.ndarray) -> None:
        assert np.isnan(self.after[rows[:, None], draws]).all()  # nothing is paid for twice
        self.asked.append((rows.tolist(), draws.tolist()))
        self.after[rows[:, None], draws] = self.full[rows[:, None], draws]

    def narrowed(self, settings: Narrowing) -> np.ndarray:
        narrow(settings, self.before, self.after, self.evaluate)
        return balanced_means(self.after - self.before)


def noisy(images: int, draws: int, noise: float, seed: int, shift: float = 0.0) -> Truth:
    """Heavy-tailed rises, normal noise, and what a draw adds to all images."""
    random = np.random.default_rng(seed)
    before = random.random((images, draws))
    rise = random.standard_t(3, images)[:, None] + noise * random.standard_normal((images, draws))
    return Truth(before, before + rise + shift * random.standard_normal(draws))


def top(scores: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(-scores, kind="stable")[:count].tolist())


def test_the_budget_is_kept_and_spent_at_the_boundaries():
    truth = noisy(400, 20, 1.0, seed=1)
    scores = truth.narrowed(SETTINGS)
    had = (~np.isnan(truth.after)).sum(axis=1)
    assert truth.asked[0] == (list(range(400)), [[0, 1, 2]] * 400)
    assert had.min() == 3
    assert had.max() <= 20
    assert 6 <= had.mean() <= 6 + 4 * 50 / 400
    place = np.argsort(np.argsort(-scores))
    near = (abs(place - 5) < 5) | (abs(place - 60) < 15)
    assert had[near].mean() > 2 * had[~near].mean()


@pytest.mark.parametrize("images", [1, 5, 61, 300])
def test_without_noise_the_tops_are_those_of_a_full_scan(images):
    truth = noisy(images, 20, 0.0, seed=2, shift=1.0)
    scores, full = truth.narrowed(SETTINGS), (truth.full - truth.before).mean(axis=1)
    for count in SETTINGS.tops:
        assert top(scores, count) == top(full, count)


@pytest.mark.parametrize(("noise", "repeated_by_full"), [(2.5, 0.866), (1.5, 0.92)])
def test_with_noise_the_top_is_nearly_that_of_a_full_scan_at_an_eighth_of_the_cost(noise, repeated_by_full):
    """As noisy as scans of real models are: two full scans of 100 draws agree on about nine tenths of the top 200."""
    agreed, repeated = [], []
    for seed in range(5):
        images = np.random.default_rng(seed).standard_t(3, 4730)
        first, second = (
            images[:, None] + noise * np.random.default_rng([seed, part]).standard_normal((4730, 100))
            for part in (0, 1)
        )
        truth = Truth(np.zeros_like(first), first)
        scores = truth.narrowed(Narrowing())
        assert (~np.isnan(truth.after)).mean() <= 1 / 8
        reference = top(second.mean(axis=1), 200)
        agreed.append(len(top(scores, 200) & reference) / 200)
        repeated.append(len(top(first.mean(axis=1), 200) & reference) / 200)
    assert np.mean(repeated) == pytest.approx(repeated_by_full, abs=0.02)
    assert np.mean(agreed) > np.mean(repeated) - 0.02


def test_what_is_there_already_does_not_sway_the_rounds():
    """A killed scan leaves losses its rounds had asked for; another start asks for the same ones in the same order."""
    whole, again = noisy(300, 20, 1.0, seed=3), noisy(300, 20, 1.0, seed=3)
    whole.narrowed(SETTINGS)
    asked = []

    def evaluate(rows: np.ndarray, draws: np.ndarray) -> None:
        asked.append((rows.tolist(), draws.tolist()))
        again.after[rows[:, None], draws] = again.full[rows[:, None], draws]

    for rows, draws in whole.asked[:7]:
        again.evaluate(np.array(rows), np.array(draws))
    narrow(SETTINGS, again.before, again.after, evaluate)
    assert asked == whole.asked
    np.testing.assert_array_equal(again.after, whole.after)


def test_balanced_means_are_those_of_least_squares():
    random = np.random.default_rng(4)
    images, draws = random.standard_normal(30), random.standard_normal(8)
    values = images[:, None] + draws
    values[np.arange(8) >= random.integers(3, 9, 30)[:, None]] = np.nan
    found = balanced_means(values)
    np.testing.assert_allclose(found - found.mean(), images - images.mean(), atol=0.02)
    plain = np.nanmean(values, axis=1)
    assert abs(plain - plain.mean() - (images - images.mean())).max() > 0.2  # what the luck of the draws adds


def test_a_full_scan_is_scored_by_its_plain_mean():
    values = np.random.default_rng(0).standard_normal((7, 5))
    np.testing.assert_allclose(balanced_means(values), values.mean(axis=1), rtol=1e-12)


def test_a_gap_in_an_images_draws_is_not_taken_for_their_end():
    values = np.random.default_rng(0).standard_normal((3, 5))
    values[0, 3:], values[1, 2] = np.nan, np.nan
    assert np.isnan(balanced_means(values)).tolist() == [False, True, False]


def test_a_loss_that_is_not_finite_ends_the_scan():
    truth = noisy(80, 20, 1.0, seed=5)
    truth.full[7, 2] = np.nan
    with pytest.raises(UserError, match="lower the variant's step_size"):
        truth.narrowed(SETTINGS)


def narrowed(tiny: Layout) -> Layout:
    """The tiny experiment with a narrowed scan; θ0 is scanned."""
    layout = replace(tiny, config=settings(scan={"narrowing": {"first": 2, "mean": 4, "most": 9, "tops": [3, 10]}}))
    scan(layout, device="cpu")
    return layout


def test_the_stage_scans_what_is_in_doubt_and_nothing_else(tiny, monkeypatch):
    monkeypatch.setattr(narrowing_module, "GROUP", 5)
    layout = narrowed(tiny)
    before = read_arrays(layout.base_scan)["losses"]
    assert before.shape == (IMAGES, 9)
    assert not np.isnan(before).any()
    scan(layout, "unlearn", "report-00", "cpu")
    after = read_arrays(layout.scan("unlearn", "report-00"))["losses"]
    had = (~np.isnan(after)).sum(axis=1)
    assert had.min() == 2
    assert had.max() > 4
    assert 4 <= had.mean() <= 4.5
    # The same losses as those of a scan that is not narrowed: the unlearned weights as if they were θ0.
    os.replace(layout.unlearned("unlearn", "report-00")["weights"], layout.weights)
    scan(layout, device="cpu")
    full = read_arrays(layout.base_scan)["losses"]
    np.testing.assert_allclose(after[~np.isnan(after)], full[~np.isnan(after)], rtol=1e-6)


@pytest.mark.parametrize("batches", [1, 3, 5])
def test_a_killed_narrowed_scan_ends_as_if_it_had_not_been(tiny, monkeypatch, batches):
    monkeypatch.setattr(narrowing_module, "GROUP", 5)
    layout = narrowed(tiny)
    scan(layout, "unlearn", "report-00", "cpu")
    finished = read_arrays(layout.scan("unlearn", "report-00"))["losses"]
    Path(layout.scan("unlearn", "report-00")).unlink()
    losses, calls = scan_module.example_losses, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > batches:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(*arguments)

    def killed():
        monkeypatch.setattr(scan_module, "example_losses", interrupted)
        scan(layout, "unlearn", "report-00", "cpu")

    assert in_child(killed) == signal.SIGKILL
    scan(layout, "unlearn", "report-00", "cpu")
    np.testing.assert_array_equal(read_arrays(layout.scan("unlearn", "report-00"))["losses"], finished)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"first": 13}, "must not fall"),
        ({"mean": 200}, "must not fall"),
        ({"tops": []}, "tops"),
        ({"tops": [20]}, "200 of retrain.k is not among them"),
    ],
)
def test_narrowing_that_makes_no_sense_is_refused(options, complaint):
    with pytest.raises(UserError, match=complaint):
        settings(scan={"narrowing": options}, retrain={"k": [200]})
