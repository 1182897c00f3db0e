import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_table, write_table
from forgetrace.attribution.ensemble import standardised
from forgetrace.attribution.ranking import rank
from forgetrace.attribution.registry import attributor, check_methods, inputs
from forgetrace.attribution.score import score
from forgetrace.layout import Layout

from ..conftest import settings
from ..customized import customised

QUERY = "report-00"


@pytest.fixture
def pair(tiny) -> Layout:
    """The tiny experiment with an ensemble of two methods, which have scored."""
    methods = {name: {} for name in ("pixel", "pixel-l2", "random")}
    methods["both"] = {"attributor": "ensemble", "methods": ["pixel", "pixel-l2"]}
    layout = Layout(tiny.name, settings(score={"methods": methods}, retrain={"methods": []}))
    for member in ("pixel", "pixel-l2"):
        score(layout, member, QUERY)
    return layout


def scores_of(layout, method) -> np.ndarray:
    table = read_table(layout.score(method, QUERY)).set_index("image_id")["score"]
    return table.loc[read_table(layout.index)["image_id"]].to_numpy()


def test_the_sum_of_two_methods_in_units_of_their_own_spread(pair):
    assert inputs(pair, "both", QUERY) == [pair.score("pixel", QUERY), pair.score("pixel-l2", QUERY), pair.index]
    score(pair, "both", QUERY)
    first, second = scores_of(pair, "pixel"), scores_of(pair, "pixel-l2")
    expected = (first - first.mean()) / first.std() + (second - second.mean()) / second.std()
    np.testing.assert_allclose(scores_of(pair, "both"), expected, rtol=1e-12)


def test_neither_unit_nor_offset_of_a_member_changes_the_scores(pair):
    before = attributor(pair, "both").scores(QUERY)
    image_ids = read_table(pair.index)["image_id"].tolist()
    write_table(pair.score("pixel", QUERY), rank(image_ids, 1e-6 * scores_of(pair, "pixel") - 40))
    np.testing.assert_allclose(attributor(pair, "both").scores(QUERY), before, rtol=1e-6)


def test_a_member_that_says_nothing_adds_nothing():
    np.testing.assert_array_equal(standardised(np.full(5, 3.2)), np.zeros(5))
    nearly = np.full(4730, 0.1)
    nearly[0] = np.nextafter(0.1, 1)
    assert (nearly - nearly.mean()).std() > 0  # what rounding leaves is no score
    np.testing.assert_array_equal(standardised(nearly), np.zeros(4730))


def test_a_member_must_rank_for_all_that_the_ensemble_ranks_for():
    methods = {"pixel": {}, "text": {}, "both": {"attributor": "ensemble", "methods": ["pixel", "text"]}}
    costly = {"costly": {"methods": ["text"]}}
    with pytest.raises(UserError, match=r"'text' is one of retrieve.costly.methods; name 'both' there too"):
        check_methods(customised(score={"methods": methods}, retrieve=costly))
    costly["costly"]["methods"].append("both")
    check_methods(customised(score={"methods": methods}, retrieve=costly))


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        (None, "two different methods"),
        (["pixel"], "two different methods"),
        (["pixel", "pixel"], "two different methods"),
        (["pixel", "voodoo"], "'voodoo' is no other method"),
        (["pixel", "random"], "'random' is no other method"),
        (["pixel", "both"], "'both' is no other method"),
    ],
)
def test_members_are_two_other_methods_with_scores(members, problem):
    methods = {"pixel": {}, "random": {}, "both": {"attributor": "ensemble", "methods": members}}
    with pytest.raises(UserError, match=f"^score.methods.both.methods: .*{problem}"):
        check_methods(settings(score={"methods": methods}, retrain={"methods": []}))
