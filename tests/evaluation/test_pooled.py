import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from forgetrace.artifacts import UserError, read_json, read_table, write_json
from forgetrace.evaluation import pooled, tables

from . import synthetic
from .synthetic import flat_encoder
from .test_tables import row_of

POOLS = {"pools": 2, "pooled_k": [3]}


def evaluated(layout):
    synthetic.write_results(layout)
    tables.evaluate(layout, flat_encoder)
    return read_table(layout.table("pooled"))


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """Four judged queries in two pools: 0 and 2, 1 and 3."""
    monkeypatch.chdir(tmp_path)
    return synthetic.experiment(**POOLS)


def test_targets_and_controls_by_hand(layout):
    table = evaluated(layout)
    assert list(table.columns) == pooled.POOLED
    assert table["method"].tolist() == ["unlearn", "pixel-l2", "random"] * 2
    row = row_of(table, method="unlearn", metric="delta_loss")
    assert (row["k"], row["n_queries"], row["pools"]) == (3, 4, 2)
    # .05 + .003 for K, .0015 mean number of the four queries; the model of the other pool: .005 + .0015.
    assert row["target"] == pytest.approx(0.0545)
    assert row["control"] == pytest.approx(0.0065)
    assert row["difference"] == pytest.approx(0.048)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((0.048, 0.048))  # the same for every query
    assert row["se"] == pytest.approx(0, abs=1e-9)
    assert row["p_vs_random"] == pytest.approx(2 / 2**4)
    images = row_of(table, method="pixel-l2", metric="delta_mse")
    assert (images["target"], images["control"], images["difference"]) == pytest.approx((0.04, 0.01, 0.03))
    assert images["p_vs_random"] == 1  # random's are the same
    assert table[table["method"] == "random"]["p_vs_random"].isna().all()


def test_unions_and_the_controls_share_by_hand(layout):
    """Scores of unlearn fall from the query's own number on: its top 3 are three images in a row."""
    row = row_of(evaluated(layout), method="unlearn", metric="delta_loss")
    # Tops {0,1,2}, {1,2,3}, {2,3,4}, {3,4,5}; unions {0..4} of 0 and 2, {1..5} of 1 and 3.
    assert row["union"] == 5
    # Query 1 {1,2,3} and 3 {3,4,5} in {0..4}: 3 and 2 of 3; query 0 {0,1,2} and 2 {2,3,4} in {1..5}: 2 and 3 of 3.
    assert row["control_share"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 1) / 4, abs=1e-5)


def test_with_three_pools_a_query_is_a_control_of_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = synthetic.experiment(pools=3, pooled_k=[3])
    synthetic.write_results(layout)
    path = layout.losses("unlearn", 3, "pool2")
    record = read_json(path)
    record["queries"]["report-00"]["loss"] += 0.1  # a control of pool 1 and pool 2
    write_json(path, record)
    tables.evaluate(layout, flat_encoder)
    row = row_of(read_table(layout.table("pooled")), method="unlearn", metric="delta_loss")
    assert row["control"] == pytest.approx(0.0065 + 0.1 / 2 / 4)
    assert row["target"] == pytest.approx(0.0545)
    assert row["ci_low"] < row["difference"] < row["ci_high"]


def test_queries_that_are_not_judged_are_neither_targets_nor_controls(layout):
    layout = replace(layout, config=synthetic.experiment(queries=3, **POOLS).config)
    row = row_of(evaluated(layout), method="unlearn", metric="delta_loss")
    assert row["n_queries"] == 3
    assert row["target"] == pytest.approx(0.054)
    assert row["control"] == pytest.approx(0.006)


def test_one_pool_has_no_controls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = evaluated(synthetic.experiment(pools=1, pooled_k=[2, 3]))
    row = row_of(table, method="unlearn", metric="delta_loss", k=2)
    assert row["target"] == pytest.approx(0.0535)
    assert row[["control", "control_share", "difference", "se", "ci_low", "ci_high", "p_vs_random"]].isna().all()
    assert table["k"].tolist() == [2] * 6 + [3] * 6


def test_regions_are_in_the_pool_of_their_image_and_count_with_it_as_one_query(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = synthetic.experiment(regions=True, **POOLS)
    assert layout.pool("pool1") == [f"report-0{image}{side}" for image in (1, 3) for side in ("", "-side1", "-side2")]
    synthetic.write_results(layout)
    for query in layout.config.queries():
        if layout.config.region(query):  # asked inside, where the loss of theta0 is .05 lower than of the whole
            path = layout.measure("base", 0, "base", query)["losses"]
            write_json(path, read_json(path) | {"regions": {"inside": 0.05, "outside": 0.2}})
    table = pooled.pooled(layout)
    row = row_of(table, method="unlearn", metric="delta_loss")
    assert row["n_queries"] == 4
    # As without regions, the numbers of twelve queries from 0 on, and .05 for two of three.
    assert row["target"] == pytest.approx(0.053 + 0.0055 + 0.05 * 2 / 3)
    assert row["control"] == pytest.approx(0.005 + 0.0055 + 0.05 * 2 / 3)
    assert row["p_vs_random"] == pytest.approx(2 / 2**4)


def test_more_pools_than_images_are_refused():
    with pytest.raises(UserError, match=r"retrain.pools: only 4 query images are judged"):
        synthetic.experiment(regions=True, pools=5, pooled_k=[3])


def test_a_users_image_has_losses_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = evaluated(synthetic.experiment(own_image=True, **POOLS))
    assert row_of(table, method="unlearn", metric="delta_loss")["n_queries"] == 5
    assert row_of(table, method="unlearn", metric="delta_mse")["n_queries"] == 4


def test_pooled_models_stay_out_of_the_other_tables(layout):
    evaluated(layout)
    for name in ("per_query", "counterfactual", "comparisons"):
        assert 3 not in set(read_table(layout.table(name))["k"])


def test_methods_whose_pools_are_not_all_trained_when_asked(layout):
    synthetic.write_results(layout)
    Path(layout.losses("random", 3, "pool1")).unlink()
    with pytest.raises(UserError, match=r"random/k3/pool1.json is missing"):
        tables.evaluate(layout, flat_encoder)
    tables.evaluate(layout, flat_encoder, partial=True)
    table = read_table(layout.table("pooled"))
    assert set(table["method"]) == {"unlearn", "pixel-l2"}
    assert table["p_vs_random"].isna().all()
    Path(layout.measure("base", 0, "base", "report-01")["losses"]).unlink()
    tables.evaluate(layout, flat_encoder, partial=True)
    assert set(read_table(layout.table("pooled"))["n_queries"]) == {3}
    record = read_json(layout.losses("pixel-l2", 3, "pool0"))
    del record["queries"]["report-03"]  # a query that was added after this training
    write_json(layout.losses("pixel-l2", 3, "pool0"), record)
    tables.evaluate(layout, flat_encoder, partial=True)
    assert set(read_table(layout.table("pooled"))["method"]) == {"unlearn"}


def test_in_a_clone_without_scores_a_pool_s_sizes_are_those_of_before(layout):
    before = evaluated(layout)
    shutil.rmtree(Path(layout.root, "score"))
    tables.evaluate(layout, flat_encoder, partial=True)
    pd.testing.assert_frame_equal(read_table(layout.table("pooled")), before, rtol=1e-4)
    Path(layout.table("pooled")).unlink()
    tables.evaluate(layout, flat_encoder, partial=True)
    table = read_table(layout.table("pooled"))
    assert table[["union", "control_share"]].isna().all(axis=None)
    np.testing.assert_allclose(table["target"], before["target"])


def test_before_any_pool_is_trained_the_table_is_empty(layout):
    synthetic.write_results(layout)
    for model in layout.pooled_models():
        Path(layout.losses(*model)).unlink()
    tables.evaluate(layout, flat_encoder, partial=True)
    table = read_table(layout.table("pooled"))
    assert table.empty
    assert list(table.columns) == pooled.POOLED


def test_p_is_of_the_paired_differences(layout):
    synthetic.write_results(layout)
    for number, pool in enumerate(("pool0", "pool1", "pool0", "pool1")):
        path = layout.losses("random", 3, pool)
        record = read_json(path)
        # Random's targets rise more than those of unlearn for one query of four.
        record["queries"][f"report-0{number}"]["loss"] += 0.2 if number == 0 else 0.0
        write_json(path, record)
    tables.evaluate(layout, flat_encoder)
    table = read_table(layout.table("pooled"))
    # unlearn less random: -.16, .04, .04, .04. Of 16 patterns only two have a sum nearer to 0.
    row = row_of(table, method="unlearn", metric="delta_loss")
    differences = np.array([-0.16, 0.04, 0.04, 0.04])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1)
    expected = (np.abs(differences @ signs) >= abs(differences.sum()) - 1e-12).mean()
    assert row["p_vs_random"] == pytest.approx(expected)
    assert table[["vs_reference", "p_vs_reference", "p_vs_reference_holm"]].isna().all().all()
    evaluate = layout.config.evaluate.model_copy(update={"reference": "random"})
    tables.evaluate(replace(layout, config=layout.config.model_copy(update={"evaluate": evaluate})), flat_encoder)
    table = read_table(layout.table("pooled"))
    row = row_of(table, method="unlearn", metric="delta_loss")
    assert row["vs_reference"] == pytest.approx(differences.mean())
    assert (row["p_vs_reference"], row["p_vs_reference_holm"]) == tuple(row[["p_vs_random", "p_vs_random_holm"]])
    assert table[table["method"] == "random"]["vs_reference"].isna().all()
