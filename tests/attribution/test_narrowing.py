import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_arrays, write_arrays
from forgetrace.attribution import narrowing as narrowing_module
from forgetrace.attribution import scan as scan_module
from forgetrace.attribution.narrowing import balanced_means, narrow
from forgetrace.attribution.registry import check_methods
from forgetrace.attribution.scan import scan
from forgetrace.config import Narrowing, Scan, parse_config
from forgetrace.layout import Layout

from ..conftest import IMAGES, SETTINGS, in_child

ROUNDS = Narrowing(first=3, mean=6, most=19, tops=[5, 60])


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
    scores = truth.narrowed(ROUNDS)
    had = (~np.isnan(truth.after)).sum(axis=1)
    assert truth.asked[0] == (list(range(400)), [[0, 1, 2]] * 400)
    assert had.min() == 3
    assert had.max() <= 19
    assert 6 <= had.mean() <= 6 + 4 * 50 / 400
    place = np.argsort(np.argsort(-scores))
    near = (abs(place - 5) < 5) | (abs(place - 60) < 15)
    assert had[near].mean() > 2 * had[~near].mean()


@pytest.mark.parametrize("images", [61, 300])
def test_without_noise_the_tops_are_those_of_a_full_scan(images):
    truth = noisy(images, 20, 0.0, seed=2, shift=1.0)
    scores, full = truth.narrowed(ROUNDS), (truth.full - truth.before).mean(axis=1)
    for count in ROUNDS.tops:
        assert top(scores, count) == top(full, count)


@pytest.mark.parametrize(
    ("noise", "growing", "by_full"), [(2.5, 0.0, (0.866, 0.94)), (1.5, 0.0, (0.92, 0.97)), (1.0, 0.8, (0.88, 0.875))]
)
def test_with_noise_the_tops_are_nearly_those_of_a_full_scan_at_an_eighth_of_the_cost(noise, growing, by_full):
    """As noisy as scans of real models are, where the noise of an image grows with its score."""
    agreed, repeated = [], []
    for seed in range(6):
        images = np.random.default_rng(seed).standard_t(3, 4730)
        spread = np.sqrt(noise**2 + (growing * images) ** 2)[:, None]
        generators = (np.random.default_rng([seed, part]) for part in (0, 1))
        first, second = (images[:, None] + spread * random.standard_normal((4730, 100)) for random in generators)
        truth = Truth(np.zeros_like(first), first)
        scores = truth.narrowed(Narrowing())
        assert (~np.isnan(truth.after)).mean() <= 1 / 8
        tops = [(top(second.mean(axis=1), count), count) for count in (200, 20)]
        agreed.append([len(top(scores, count) & reference) / count for reference, count in tops])
        repeated.append([len(top(first.mean(axis=1), count) & reference) / count for reference, count in tops])
    np.testing.assert_allclose(np.mean(repeated, axis=0), by_full, atol=0.02)
    assert (np.mean(agreed, axis=0) > np.mean(repeated, axis=0) - 0.02).all()


def test_what_is_there_already_does_not_sway_the_rounds():
    """A killed scan leaves losses its rounds had asked for; another start asks for the same ones in the same order."""
    whole, again = noisy(300, 20, 1.0, seed=3), noisy(300, 20, 1.0, seed=3)
    whole.narrowed(ROUNDS)
    asked = []

    def evaluate(rows: np.ndarray, draws: np.ndarray) -> None:
        asked.append((rows.tolist(), draws.tolist()))
        again.after[rows[:, None], draws] = again.full[rows[:, None], draws]

    for rows, draws in whole.asked[:7]:
        again.evaluate(np.array(rows), np.array(draws))
    narrow(ROUNDS, again.before, again.after, evaluate)
    assert asked == whole.asked
    np.testing.assert_array_equal(again.after, whole.after)


def test_balanced_means_are_freed_of_the_luck_of_the_draws():
    random = np.random.default_rng(4)
    images, draws = random.standard_normal(30), random.standard_normal(8)
    values = images[:, None] + draws
    values[np.arange(8) >= random.integers(3, 9, 30)[:, None]] = np.nan
    error = [
        abs((means - means.mean()) - (images - images.mean())).max()
        for means in (balanced_means(values), np.nanmean(values, axis=1))
    ]
    assert error[0] < 0.02
    assert error[1] > 0.2


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
        truth.narrowed(ROUNDS)


def test_a_boundary_beyond_the_images_is_refused():
    with pytest.raises(UserError, match="60 is not less than the 60 training images"):
        noisy(60, 20, 1.0, seed=6).narrowed(ROUNDS)


def with_narrowing(tiny: Layout) -> Layout:
    scan_ = {"batch_size": 64, "narrowing": {"first": 2, "mean": 4, "most": 10, "tops": [3, 10]}}
    return replace(tiny, config=parse_config({**SETTINGS, "scan": scan_}, "config/tiny.yaml"))


def narrowed(tiny: Layout) -> Layout:
    """The tiny experiment with a narrowed scan; θ0 is scanned."""
    layout = with_narrowing(tiny)
    scan(layout, device="cpu")
    return layout


def test_a_scan_of_the_base_model_with_other_draws_is_refused_before_the_scan(tiny):
    with pytest.raises(UserError, match="scanned at other timesteps: delete it and scan θ0 again"):
        scan(with_narrowing(tiny), "unlearn", "report-00", "cpu")


def test_a_broken_scan_of_the_base_model_is_named(tiny):
    layout = narrowed(tiny)
    content = read_arrays(layout.base_scan)
    content["losses"][3, 1] = np.nan
    write_arrays(layout.base_scan, content, {})
    with pytest.raises(UserError, match="The scan of θ0 holds losses that are missing"):
        scan(layout, "unlearn", "report-00", "cpu")


def test_the_base_models_scan_hangs_on_the_number_of_draws_alone():
    one, other = (Scan(narrowing=Narrowing(mean=mean, tops=tops)) for mean, tops in ((12, [20]), (15, [30, 200])))
    assert one.of_base() == other.of_base()
    assert one.of_base() != Scan(narrowing=Narrowing(most=50)).of_base()
    assert Scan().of_base() == {"timesteps": 20, "noise": "shared"}


def test_the_stage_scans_what_is_in_doubt_and_nothing_else(tiny, monkeypatch):
    monkeypatch.setattr(narrowing_module, "GROUP", 5)
    layout = narrowed(tiny)
    before = read_arrays(layout.base_scan)["losses"]
    assert before.shape == (IMAGES, 10)
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
    ("narrowing", "scan_", "complaint"),
    [
        ({"first": 14}, {}, "first <= mean <= most \\(here 14, 12.4, 98\\)"),
        ({"mean": 200}, {}, "first <= mean <= most"),
        ({"most": 99}, {}, "multiple of 4"),
        ({"first": 1}, {}, "first"),
        ({"tops": []}, {}, "tops"),
        ({"tops": [20]}, {}, "200 of retrain.k is not among them"),
        ({}, {"timesteps": 20}, "timesteps has no effect with narrowing"),
    ],
)
def test_narrowing_that_makes_no_sense_is_refused(narrowing, scan_, complaint):
    content = {**SETTINGS, "scan": scan_ | {"narrowing": narrowing}, "retrain": {"k": [200]}}
    with pytest.raises(UserError, match=complaint):
        parse_config(content, "config/tiny.yaml")


def test_a_score_that_narrowing_does_not_follow_is_refused(tiny):
    with pytest.raises(UserError, match=r"score.methods.skewed: scan.narrowing spends its draws by score: difference"):
        check_methods(with_narrowing(tiny).config)
