import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

from forgetrace.evaluation.reliability import bins, mass
from forgetrace.evaluation.retrieval import (
    PER_QUERY,
    average_precision,
    ceiling,
    comparisons,
    headline,
    metrics,
    recall,
    summary,
)


@pytest.mark.parametrize(
    ("ranks", "expected"), [([1], 1.0), ([4], 0.25), ([1, 2, 3], 1.0), ([10, 2], (1 / 2 + 2 / 10) / 2)]
)
def test_average_precision_by_hand(ranks, expected):
    assert average_precision(np.array(ranks)) == pytest.approx(expected)


def test_average_precision_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    for _ in range(20):
        scores, relevant = random.permutation(50), random.random(50) < 0.2
        if relevant.any():
            ranks = (-scores).argsort().argsort()[relevant] + 1
            assert average_precision(ranks) == pytest.approx(average_precision_score(relevant, scores))


def test_recall_and_its_ceiling_by_hand():
    ranks = np.array([1, 5, 6, 40])
    assert [recall(ranks, k) for k in (5, 10, 100)] == [0.5, 0.75, 1]
    assert [ceiling(k, 8) for k in (5, 10)] == [5 / 8, 1]
    found = metrics(np.arange(1, 9))
    assert (found["recall_5"], found["recall_5_of_ceiling"]) == (5 / 8, 1)


def table(values: dict[str, dict[str, list[float]]], kind: str = "object") -> pd.DataFrame:
    """{method: {model: values of its queries}}; the first query of a model is in the subset."""
    rows = [
        (model, kind, ("template", "free")[i % 2], f"{model}-{i}", i == 0, method, "ap", value)
        for method, models in values.items()
        for model, own in models.items()
        for i, value in enumerate(own)
    ]
    return pd.DataFrame(rows, columns=PER_QUERY)


def row(found: pd.DataFrame, **wanted):
    (only,) = found[np.logical_and.reduce([found[key] == value for key, value in wanted.items()])].itertuples()
    return only


def test_intervals_resample_models_and_not_queries():
    """Models that differ, queries of a model that do not: many of them must not make the interval short."""
    models = {f"m{i}": [value] * 40 for i, value in enumerate([0.1, 0.5, 0.9, 0.3])}
    found = row(summary(table({"a": models}), 2000, 0), queries="all", manner="all")
    assert (found.n_models, found.n_queries, found.mean) == (4, 160, pytest.approx(0.45))
    few = row(summary(table({"a": {m: v[:2] for m, v in models.items()}}), 2000, 0), queries="all", manner="all")
    assert (found.ci_low, found.ci_high) == (pytest.approx(few.ci_low), pytest.approx(few.ci_high))
    assert found.ci_high - found.ci_low > 0.4


def test_a_method_of_some_queries_has_rows_of_the_subset_beside_all_others_there():
    some = table({"costly": {"m0": [0.2], "m1": [0.4]}, "a": {"m0": [1.0, 0.0], "m1": [0.5, 0.5]}})
    found = summary(some, 100, 0)
    assert set(found[found["queries"] == "all"]["method"]) == {"a"}
    assert row(found, queries="subset", manner="all", method="a").mean == pytest.approx(0.75)
    assert row(found, queries="subset", manner="all", method="costly").mean == pytest.approx(0.3)


def test_controls_are_in_rows_of_their_own():
    values = table({"a": {"m0": [1.0, 0.5], "m1": [0.5, 1.0]}, "b": {"m0": [0.25, 0.5], "m1": [0.5, 0.25]}})
    controls = table({"a": {"m0": [0.1], "m1": [0.3]}, "b": {"m0": [0.75], "m1": [0.75]}})
    both = pd.concat([values, controls.assign(manner="plain", query=controls["model"] + "-control")])
    found = summary(both, 100, 0)
    assert row(found, queries="all", manner="plain", method="a").mean == pytest.approx(0.2)
    assert row(found, queries="subset", manner="plain", method="b").n_queries == 2
    pd.testing.assert_frame_equal(found[found["manner"] != "plain"].reset_index(drop=True), summary(values, 100, 0))
    pd.testing.assert_frame_equal(comparisons(both, 100, 0), comparisons(values, 100, 0))


def test_a_method_that_lacks_controls_is_in_all_other_rows():
    values = table({"a": {"m0": [1.0, 0.5]}, "late": {"m0": [0.5, 0.5]}})
    control = table({"a": {"m0": [0.1]}}).assign(manner="plain", query="m0-control")
    found = summary(pd.concat([values, control]), 100, 0)
    assert set(found.loc[(found["queries"] == "all") & (found["manner"] == "all"), "method"]) == {"a", "late"}
    assert set(found.loc[found["manner"] == "plain", "method"]) == {"a"}


def test_comparisons_are_paired_by_model():
    values = {f"m{i}": [0.1 * i] for i in range(8)}
    better = {model: [value[0] + 0.05] for model, value in values.items()}
    found = row(comparisons(table({"a": better, "b": values}), 500, 0), queries="all", metric="ap")
    assert (found.method_a, found.method_b, found.n_models) == ("a", "b", 8)
    assert (found.mean_difference, found.ci_low, found.ci_high) == pytest.approx((0.05,) * 3)
    assert found.p == found.p_holm == pytest.approx(2 / 2**8)


def test_the_headline_is_the_mean_ap_by_kind():
    both = pd.concat([table({"a": {"m0": [0.5], "m1": [1]}}), table({"a": {"s0": [0.25]}}, "style")])
    assert headline(summary(both, 10, 0)) == {"object": {"a": 0.75}, "style": {"a": 0.25}}


FOUND = pd.DataFrame(
    {
        "model": ["m", "m", "m", "n", "n"],
        "query": ["m-0", "m-0", "m-0", "n-0", "n-0"],
        "image_id": ["e0", "e1", "x", "e0", "y"],
        "probability": [0.4, 0.4, 0.2, 0.0, 0.6],
        "exemplar": [True, True, False, True, False],
        "kind": "style",
    }
)


def test_the_mass_on_exemplars_by_hand():
    (found,) = mass(FOUND, 97, 100, 0).itertuples()
    assert (found.n_models, found.n_queries, found.mass) == (2, 2, pytest.approx(0.4))
    assert found.chance == pytest.approx(1.5 / 98.5)


def test_bins_compare_probability_with_the_share_of_the_truth():
    found = bins(FOUND).set_index("low")
    assert found.loc[0.35].to_dict() | {"kind": 0} == {
        "kind": 0, "high": 0.5, "candidates": 2, "probability": pytest.approx(0.4), "truth": 0.5,
    }  # fmt: skip
    assert (found.loc[0.5]["probability"], found.loc[0.5]["truth"]) == (0.6, 0)
    assert found["candidates"].sum() == 4  # what was given nothing is in no bin
