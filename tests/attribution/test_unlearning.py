import numpy as np
import pandas as pd
import pytest

from forgetrace.artifacts import UserError, read_arrays, read_table, write_arrays
from forgetrace.attribution.registry import attributor, inputs
from forgetrace.attribution.score import score
from forgetrace.attribution.unlearning import difference, skew

BEFORE = np.array([[1.0, 3.0], [2.0, 2.0]])
AFTER = np.array([[2.0, 3.5], [1.0, 2.0]])


def test_difference_by_hand():
    np.testing.assert_allclose(difference(BEFORE, AFTER), [[1.0, 0.5], [-1.0, 0.0]])


def test_skew_by_hand():
    expected = [[1 / 3.001, 0.5 / 6.501], [-1 / 3.001, 0]]
    np.testing.assert_allclose(skew(BEFORE, AFTER), expected)


def test_the_methods_score_their_variants_scans(tiny):
    before = read_arrays(tiny.base_scan)["losses"].astype(float)
    after = read_arrays(tiny.scan("unlearn", "report-00"))["losses"].astype(float)
    assert inputs(tiny, "skewed", "report-00") == [tiny.base_scan, tiny.scan("unlearn", "report-00")]
    np.testing.assert_array_equal(
        attributor(tiny, "unlearn").scores("report-00"), difference(before, after).mean(axis=1)
    )
    skewed = attributor(tiny, "skewed").scores("report-00")
    np.testing.assert_array_equal(skewed, skew(before, after).mean(axis=1))


def test_the_stage_writes_a_ranking_of_all_images(tiny):
    table = read_table(tiny.score("unlearn", "report-00"))
    scores = attributor(tiny, "unlearn").scores("report-00")
    assert sorted(table["image_id"]) == [f"tiny-{i:02d}" for i in range(40)]
    assert table["rank"].tolist() == list(range(1, 41))
    assert (table["score"].diff().dropna() <= 0).all()
    top = int(table["image_id"][0].split("-")[1])
    assert table["score"][0] == scores[top] == scores.max()


def test_a_rerun_writes_the_same_table_with_its_provenance(tiny):
    first = read_table(tiny.score("unlearn", "report-00"))
    score(tiny, "unlearn", "report-00")
    second = read_table(tiny.score("unlearn", "report-00"))
    pd.testing.assert_frame_equal(first, second)
    made_by = second.attrs["provenance"]
    assert made_by["inputs"].keys() == {"scan/base.npz", "scan/unlearn/report-00.npz"}
    assert made_by["config"]["method"]["attributor"] == "unlearning"


def test_scans_at_other_timesteps_are_refused(tiny):
    path = tiny.scan("unlearn", "report-00")
    write_arrays(path, read_arrays(path) | {"timesteps": np.array([0, 1, 2, 3])}, {})
    with pytest.raises(UserError, match=f"{path} was scanned at other timesteps"):
        attributor(tiny, "unlearn").scores("report-00")


def test_an_unfinished_or_broken_scan_is_not_ranked(tiny):
    path = tiny.scan("unlearn", "report-00")
    content = read_arrays(path)
    content["losses"][7, 1] = np.nan
    write_arrays(path, content, {})
    with pytest.raises(UserError, match="The score of image tiny-07 is not finite"):
        score(tiny, "unlearn", "report-00")


def test_a_missing_scan_says_which_stage_to_run(tiny):
    with pytest.raises(UserError, match=r"report-01.npz is missing: run the stage"):
        score(tiny, "unlearn", "report-01")
