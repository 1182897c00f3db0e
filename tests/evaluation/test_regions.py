import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from forgetrace.artifacts import write_table
from forgetrace.datasets.digit_pairs import facts
from forgetrace.evaluation.earlier import with_earlier
from forgetrace.evaluation.measures import THETA0, Measure, QueryMeasures
from forgetrace.evaluation.metrics import region_metrics
from forgetrace.evaluation.regions import PRECISION, by_image, precision, summary
from forgetrace.evaluation.tables import PER_QUERY, _values, comparisons, counterfactual

from ..conftest import settings
from . import synthetic

CAPTIONS = [
    "a red seven left of a blue three",
    "a red seven left of a red one",
    "a blue seven left of a blue seven",
    "a blue three left of a red three",
]
PROMPT = facts("a red seven left of a blue three")


def of(top: list[int], region: str) -> dict[str, tuple]:
    seen = pd.DataFrame([facts(caption) for caption in CAPTIONS])
    mask = np.isin(range(4), top)
    rows = precision(seen, PROMPT, region, mask, np.array([True, False, False, False]))
    return {row[0]: row[1:] for row in rows}


def test_precision_closed_form():
    found = of([1, 2], "left")  # own, other, whole, chance, chance_other
    assert found["digit"] == (1.0, 0.0, 1.0, 0.75, 0.5)
    assert found["ink"] == (0.5, 0.5, 1.0, 0.5, 0.5)
    assert found["both"] == (0.5, 0.0, 1.0, 0.5, 0.25)


def test_the_right_side_swaps_the_roles():
    left, right = of([0, 3], "left"), of([0, 3], "right")
    assert left["digit"][:2] == right["digit"][1::-1] == (0.5, 1.0)


def test_the_summary_counts_queries_and_pairs_the_sides():
    rows = [
        (f"q{i}", region, "m", 20, "digit", 0.6 + 0.01 * i, 0.2, 0.5, 0.1, 0.1)
        for i in range(8)
        for region in ("left", "right")
    ]
    (row,) = summary(pd.DataFrame(rows, columns=PRECISION), 500, 0).to_dict("records")
    assert (row["n_queries"], row["n_regions"]) == (8, 16)
    assert row["own"] == pytest.approx(0.635)
    assert row["own_minus_other"] == pytest.approx(0.435)
    assert row["own_minus_other_low"] < 0.435 < row["own_minus_other_high"]
    assert row["own_minus_other_p"] == 2 / 2**8
    assert row["chance"] == pytest.approx(0.1)


def test_changes_are_measured_where_they_are():
    original = np.full((4, 6, 3), 100, dtype=np.uint8)
    inside = np.zeros((4, 6), dtype=bool)
    inside[:, :2] = True
    changed = np.stack([original, original])
    changed[0, 1, 1] += 51  # (0.2)² on one of 8 pixels inside
    changed[1, 1, 4] += 51  # on one of 16 outside
    values = region_metrics(original, changed, inside, synthetic.flat_encoder)
    np.testing.assert_allclose(values["delta_mse_inside"], [0.04 / 8, 0])
    np.testing.assert_allclose(values["delta_mse_outside"], [0, 0.04 / 16])
    np.testing.assert_allclose(values["delta_mse_contrast"], [0.04 / 8, -0.04 / 16])
    assert values["similarity_inside"][1] == pytest.approx(1)
    assert values["similarity_inside"][0] < 1


def test_the_rows_of_a_region_are_inside_and_outside():
    picture, inside = np.zeros((4, 6, 3), dtype=np.uint8) + 9, np.ones((4, 6), dtype=bool)
    inside[0] = False
    model = ("m", 2, "q-left")
    measures = {
        THETA0: Measure(1.0, (0,), picture, {"inside": 0.5, "outside": 2.0}),
        model: Measure(1.5, (0,), picture, {"inside": 0.9, "outside": 2.1}),
    }
    rows = _values("q-left", QueryMeasures(picture, measures, inside), synthetic.flat_encoder)
    own = {metric: value for _, *of, metric, value in rows if tuple(of) == model}
    assert own["delta_loss_inside"] == pytest.approx(0.4)
    assert own["delta_loss_outside"] == pytest.approx(0.1)
    assert own["delta_loss_contrast"] == pytest.approx(0.3)
    assert "delta_loss" not in own
    assert "delta_mse" not in own


def test_regions_of_one_image_count_as_one_query():
    config = settings(
        synthesize={"regions": {"left": {"boxes": [[0, 0, 8, 16]]}, "right": {"boxes": [[8, 0, 16, 16]]}}},
    )
    rows = []
    for query, own, random in (("report-00", (3, 5), (1, 1)), ("report-01", (8, 6), (2, 0))):
        for side, value, other in zip(("left", "right"), own, random, strict=True):
            name = f"{query}-{side}"
            rows.append((name, "text", 3, name, "delta_loss_inside", value))
            rows.append((name, "random", 3, "draw0", "delta_loss_inside", other))
    rows.append(("report-00", "text", 3, "report-00", "delta_loss", 9))
    values = pd.DataFrame(rows, columns=PER_QUERY)
    found = by_image(config, values)
    inside = found[found["metric"] == "delta_loss_inside"].set_index(["query", "method"])["value"].to_dict()
    assert inside == {
        ("report-00", "text"): 4, ("report-00", "random"): 1, ("report-01", "text"): 7, ("report-01", "random"): 1,
    }  # fmt: skip
    assert found[found["metric"] == "delta_loss"].values.tolist() == values.tail(1).values.tolist()
    table = counterfactual(found, 100, 0).set_index(["metric", "method"])
    assert table.loc[("delta_loss_inside", "text"), ["n_queries", "mean", "p_vs_random"]].tolist() == [2, 5.5, 0.5]
    assert comparisons(found, 100, 0)["mean_difference"].tolist() == [4.5]


def test_without_scores_the_precision_of_before_stays(results):
    assert with_earlier(results, {"regions": pd.DataFrame(columns=PRECISION)})["regions"].empty
    rows = [
        (f"report-0{i}", region, method, 2, shared, 0.5, 0.25, 0.5, 0.1, 0.1)
        for i in range(2)
        for method in ("unlearn", "pixel-l2", "random")
        for region in ("left", "right")
        for shared in ("digit", "ink", "both")
    ]
    before = pd.DataFrame(rows, columns=PRECISION)
    write_table(results.table("regions"), before)
    shutil.rmtree(Path(results.root, "score"))
    kept = with_earlier(results, {"regions": pd.DataFrame(columns=PRECISION)})["regions"]
    pd.testing.assert_frame_equal(kept, before)
    # Of a method that has scored here what is there counts, of the others what was there.
    own = before[before["method"] == "unlearn"].assign(own=1.0)
    merged = with_earlier(results, {"regions": own})["regions"]
    assert merged[PRECISION[:5]].equals(before[PRECISION[:5]])
    assert set(merged[merged["method"] == "unlearn"]["own"]) == {1.0}
    assert set(merged[merged["method"] != "unlearn"]["own"]) == {0.5}
    assert list(summary(merged.iloc[:0], 10, 0).columns)[:2] == ["method", "k"]
