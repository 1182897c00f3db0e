from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from forgetrace.artifacts import UserError, read_table, write_table
from forgetrace.attribution.ranking import rank
from forgetrace.evaluation.agreement import AGREEMENT, agreement

from . import synthetic
from .test_tables import row_of


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """Four reported queries; the scores of pixel-l2 are the negatives of unlearn's."""
    monkeypatch.chdir(tmp_path)
    layout = synthetic.experiment()
    synthetic.write_results(layout)
    return layout


def test_every_pair_by_hand(layout):
    table = agreement(layout)
    assert list(table.columns) == AGREEMENT
    assert table[["k", "metric"]].drop_duplicates().to_numpy().tolist() == [
        [0, "spearman"],
        [2, "overlap"],
        [4, "overlap"],
    ]
    contrary = row_of(table, metric="spearman", method_a="unlearn", method_b="pixel-l2")
    assert (contrary["mean"], contrary["se"]) == pytest.approx((-1, 0))
    assert row_of(table, k=4, method_a="unlearn", method_b="pixel-l2")["mean"] == 0
    pairs = [
        [synthetic.scores(layout, method, query) for method in ("unlearn", "random")]
        for query in layout.config.queries()
    ]
    correlations = [stats.spearmanr(a, b).statistic for a, b in pairs]
    shared = row_of(table, metric="spearman", method_a="unlearn", method_b="random")
    assert shared["n_queries"] == 4
    assert shared["mean"] == pytest.approx(np.mean(correlations))
    assert shared["se"] == pytest.approx(np.std(correlations, ddof=1) / 2)
    common = [len(set(np.argsort(-a)[:4]) & set(np.argsort(-b)[:4])) / 4 for a, b in pairs]
    assert row_of(table, k=4, method_a="unlearn", method_b="random")["mean"] == pytest.approx(np.mean(common))


def test_equal_scores_share_a_rank_and_a_flat_method_agrees_with_none(layout):
    ids = [f"digit-{i:04d}" for i in range(synthetic.TRAINING_IMAGES)]
    flat, halves = np.zeros(12), np.repeat([1.0, 0.0], 6)
    for query in layout.config.queries():
        write_table(layout.score("random", query), rank(ids, flat))
        write_table(layout.score("unlearn", query), rank(ids, np.arange(12.0)))
        write_table(layout.score("pixel-l2", query), rank(ids, halves))
    table = agreement(layout)
    assert row_of(table, metric="spearman", method_a="unlearn", method_b="random")["mean"] == 0
    expected = stats.spearmanr(np.arange(12), halves).statistic
    assert row_of(table, metric="spearman", method_a="unlearn", method_b="pixel-l2")["mean"] == pytest.approx(expected)


def test_a_method_that_has_not_scored_every_query(layout):
    Path(layout.score("pixel-l2", "report-02")).unlink()
    with pytest.raises(UserError, match=r"pixel-l2/report-02.parquet is missing"):
        agreement(layout)
    table = agreement(layout, partial=True)
    assert set(zip(table["method_a"], table["method_b"], strict=True)) == {("unlearn", "random")}
    assert set(table["n_queries"]) == {4}
    for query in layout.config.queries():
        Path(layout.score("unlearn", query)).unlink()
    assert agreement(layout, partial=True).empty  # random alone has nobody to agree with


def test_a_ranking_of_other_images_is_refused(layout):
    path = layout.score("pixel-l2", "report-02")
    write_table(path, read_table(path).replace({"image_id": {"digit-0003": "cat-0003"}}))
    with pytest.raises(UserError, match=f"{path} ranks other images than the experiment trains on"):
        agreement(layout)
