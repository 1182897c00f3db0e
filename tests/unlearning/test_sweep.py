import math
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from forgetrace.artifacts import UserError, read_json
from forgetrace.diffusion.synthesis import synthesize
from forgetrace.unlearning import sweep as module
from forgetrace.unlearning.sweep import FACTOR, floor_digits, largest_within, sweep, tuning_subjects
from forgetrace.unlearning.variants import unlearn_query

from ..conftest import settings

RESOLUTION = FACTOR ** (1 / 2**5)


@given(
    best=st.floats(-9, 2).map(lambda power: 10**power),
    start=st.floats(-11, 2.9).map(lambda power: 10**power),
    share=st.floats(1e-4, 1),
    power=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_the_largest_step_within_the_share_is_found(best, start, share, power):
    assume(best < 200)
    asked = []

    def rise(alpha: float) -> float:
        asked.append(alpha)
        return share * (alpha / best) ** power

    chosen = largest_within(rise, share, start)
    assert len(set(asked)) == len(asked)
    assert rise(chosen) <= share * (1 + 1e-9)
    # Bisection stops within its resolution, rounding down takes at most a tenth.
    assert chosen >= best / RESOLUTION * (1 - 1 / 10) * (1 - 1e-9)
    assert chosen == floor_digits(chosen)
    assert len(asked) < 60


def test_a_start_exactly_at_the_share_counts_as_within():
    assert largest_within(lambda alpha: alpha, 0.01, 0.01) >= 0.0095


def test_a_rise_that_becomes_infinite_is_handled():
    chosen = largest_within(lambda alpha: 0.0 if alpha < 3e-3 else math.inf, 0.01, 1.0)
    assert 2.6e-3 <= chosen < 3e-3


@pytest.mark.parametrize(("rise", "message"), [(1.0, "smallest step raises"), (-1.0, "largest step does not raise")])
def test_without_a_bracket_there_is_no_answer(rise, message):
    with pytest.raises(UserError, match=message):
        largest_within(lambda alpha: rise, 0.01, 1e-3)


@given(st.integers(10, 99), st.integers(-12, 3))
def test_two_digits_stay_as_they_are(digits, exponent):
    value = float(f"{digits}e{exponent}")
    assert floor_digits(value) == value


@given(st.floats(1e-12, 1e3))
def test_rounding_goes_down_to_two_digits(value):
    rounded = floor_digits(value)
    assert value / 1.1 <= rounded * (1 + 1e-9)
    assert rounded <= value * (1 + 1e-12)
    assert float(f"{rounded:.1e}") == rounded


def test_the_sweep_tries_tuning_queries_only_and_keeps_the_bound(tiny, monkeypatch):
    monkeypatch.setattr(module, "BISECTIONS", 1)
    monkeypatch.setattr("forgetrace.unlearning.sample.DRAWS", 1)
    chosen, tried = sweep(tiny, "unlearn", tuning_subjects(tiny, 2), share=0.02, device="cpu")
    assert set(tried["query"]) == {"tuning-00", "tuning-01"}
    rises = (tried["others_after"] / tried["others_before"] - 1).groupby(tried["step_size"]).mean()
    assert rises[rises.index <= chosen].max() <= 0.02
    beyond = rises[rises.index > chosen * 1.5]
    assert len(beyond)
    assert beyond.min() > 0.02
    assert (tried.groupby("query")["query_before"].nunique() == 1).all()
    assert tried["others_before"].nunique() == 1
    assert isinstance(tried, pd.DataFrame)
    assert not tried.duplicated(["step_size", "query"]).any()


def test_a_trial_is_what_the_stage_would_do(tiny, monkeypatch):
    """The swept losses at the configured step size are those the unlearn stage writes for that query."""
    monkeypatch.setattr(module, "largest_within", lambda rise, share, start: rise(start) and start)
    variants = {"unlearn": {"step_size": 1e-4, "draws": 16}, "steps": {"step_size": 1e-4, "draws": 16, "steps": 2}}
    variants["adam"] = {"procedure": "adam", "step_size": 1e-4, "draws": 16}
    queries = {"queries": [{"pool": "tuning", "count": 1}]}
    layout = replace(tiny, config=settings(unlearn=variants, synthesize=queries))
    synthesize(layout, "tuning-00", "cpu")
    for variant in variants:
        _, tried = sweep(layout, variant, tuning_subjects(layout, 1), share=0.01, device="cpu")
        unlearn_query(layout, variant, "tuning-00", "cpu")
        losses = read_json(layout.unlearned(variant, "tuning-00")["losses"])
        row = tried.iloc[0]
        assert row["query_before"] == pytest.approx(losses["before"]["query"], rel=1e-6)
        assert row["query_after"] == pytest.approx(losses["after"]["query"], rel=1e-6)
        assert row["others_after"] == pytest.approx(losses["after"]["others"], rel=1e-6)


def test_adams_rate_can_be_swept(tiny, monkeypatch):
    monkeypatch.setattr(module, "BISECTIONS", 1)
    layout = replace(tiny, config=settings(unlearn={"unlearn": {"procedure": "adam", "step_size": 1e-3, "draws": 8}}))
    chosen, tried = sweep(layout, "unlearn", tuning_subjects(layout, 1), share=0.02, device="cpu")
    rises = (tried["others_after"] / tried["others_before"] - 1).set_axis(tried["step_size"])
    assert rises[rises.index <= chosen].max() <= 0.02 < rises.max()


def test_a_variant_that_stops_by_itself_is_not_swept(tiny):
    layout = replace(tiny, config=settings(unlearn={"unlearn": {"step_size": 1}, "mirrored": {"procedure": "mucs"}}))
    with pytest.raises(UserError, match=r"^--variant mirrored: how far mucs goes is set by its bound"):
        sweep(layout, "mirrored", [], share=0.02)


def test_more_queries_than_captions_is_an_error(tiny):
    with pytest.raises(UserError, match="--queries 61: the tuning pool has only 60 captions"):
        tuning_subjects(tiny, 61)
