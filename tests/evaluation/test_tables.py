import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from forgetrace.artifacts import UserError, read_json, read_table, write_image, write_json
from forgetrace.evaluation import tables

from . import synthetic
from .synthetic import flat_encoder, loss_rise

RISE_OF = ("unlearn", "pixel-l2", "random")
METRICS = {"delta_loss", "delta_mse", "similarity", "ssim"}  # of whole images
QUERIES = ["report-00", "report-01", "report-02", "report-03"]


def row_of(table: pd.DataFrame, **wanted) -> pd.Series:
    for column, value in wanted.items():
        table = table[table[column] == value]
    assert len(table) == 1
    return table.iloc[0]


@pytest.fixture(scope="module")
def folder(pristine, tmp_path_factory) -> Path:
    """The synthetic experiment after ``evaluate``."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(pristine, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tables.evaluate(synthetic.experiment(), flat_encoder)
    return folder


@pytest.fixture
def evaluated(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return synthetic.experiment()


def test_per_query_holds_every_model_query_and_metric(evaluated):
    table = read_table(evaluated.table("per_query"))
    models = sum(len(evaluated.measured_models(query)) for query in QUERIES)
    assert list(table.columns) == tables.PER_QUERY
    assert len(table) == models * len(METRICS)
    losses = table[table["metric"] == "delta_loss"]
    for row in losses.itertuples():
        assert row.value == pytest.approx(loss_rise(row.method, row.k, row.member, row.query), abs=1e-9)


def test_per_query_shows_that_theta0_regenerates_the_query(evaluated):
    table = read_table(evaluated.table("per_query"))
    base = table[table["method"] == "base"].groupby("metric")["value"].unique()
    assert base.map(list).to_dict() == {"delta_loss": [0], "delta_mse": [0], "similarity": [1], "ssim": [1]}


def test_counterfactual_by_hand(evaluated):
    table = read_table(evaluated.table("counterfactual"))
    assert list(table.columns) == tables.COUNTERFACTUAL
    own = row_of(table, method="unlearn", k=2, metric="delta_loss")
    # .05 + .002 for K = 2, and 0, .001, .002, .003 for the four queries.
    assert own["n_queries"] == 4
    assert own["mean"] == pytest.approx(0.0535)
    assert own["se"] == pytest.approx(0.001 * np.sqrt(5 / 3) / 2, rel=1e-4)
    assert 0.052 <= own["ci_low"] < own["mean"] < own["ci_high"] <= 0.055
    assert own["p_vs_random"] == pytest.approx(2 / 2**4)
    assert own["p_vs_random_holm"] == pytest.approx(2 * 2 / 2**4)  # of two methods
    # 51 of 255 grey levels.
    assert row_of(table, method="unlearn", k=4, metric="delta_mse")["mean"] == pytest.approx(0.04)


def test_counterfactual_averages_random_over_draws_and_seeds_are_the_floor(evaluated):
    table = read_table(evaluated.table("counterfactual"))
    random = row_of(table, method="random", k=4, metric="delta_loss")
    # .01 + .004, mean .0015 over queries, .001 over the three draws.
    assert random["n_queries"] == 4
    assert random["mean"] == pytest.approx(0.0165)
    assert random["se"] == pytest.approx(0.001 * np.sqrt(5 / 3) / 2, rel=1e-4)
    assert np.isnan(random["p_vs_random"])
    # The interval also varies over draws, so it is wider than that of a method with this spread.
    own = row_of(table, method="unlearn", k=4, metric="delta_loss")
    assert random["ci_high"] - random["ci_low"] > own["ci_high"] - own["ci_low"]
    floor = row_of(table, method="seed", metric="delta_loss")
    assert floor["k"] == 0
    assert floor["mean"] == pytest.approx(0.004)
    assert np.isnan(floor["p_vs_random"])


def test_comparisons_hold_every_pair_once_with_corrected_p(evaluated):
    table = read_table(evaluated.table("comparisons"))
    assert list(table.columns) == tables.COMPARISONS
    assert "seed" not in set(table["method_a"]) | set(table["method_b"])
    family = table[(table["k"] == 2) & (table["metric"] == "delta_loss")]
    pairs = list(zip(family["method_a"], family["method_b"], strict=True))
    assert sorted(pairs) == [("pixel-l2", "random"), ("unlearn", "pixel-l2"), ("unlearn", "random")]
    own = row_of(family, method_a="unlearn", method_b="pixel-l2")
    # The difference is .03 for every query: nothing varies.
    assert own["mean_difference"] == pytest.approx(0.03)
    assert (own["ci_low"], own["ci_high"]) == pytest.approx((0.03, 0.03))
    against_random = row_of(family, method_a="unlearn", method_b="random")
    # .05 - .01 less .001 over draws; queries cancel, so only the draws widen the interval.
    assert against_random["mean_difference"] == pytest.approx(0.039)
    assert against_random["ci_low"] == pytest.approx(0.038)
    assert against_random["ci_high"] == pytest.approx(0.04)
    assert list(family["p"]) == pytest.approx([0.125] * 3)
    assert list(family["p_holm"]) == pytest.approx([0.375] * 3)


def test_metrics_json_nests_metric_method_and_k(evaluated):
    content = read_json(evaluated.metrics)
    assert content["delta_loss"]["unlearn"] == {"k2": 0.0535, "k4": 0.0555}
    assert content["delta_loss"]["seed"] == {"k0": 0.004}
    assert set(content) == METRICS


def test_evaluating_again_gives_the_same_bytes(evaluated):
    names = [evaluated.table(name) for name in ("per_query", "counterfactual", "comparisons")]
    before = [Path(path).read_bytes() for path in (*names, evaluated.metrics)]
    tables.evaluate(evaluated, flat_encoder)
    assert [Path(path).read_bytes() for path in (*names, evaluated.metrics)] == before


def test_summaries_do_not_depend_on_the_order_of_queries_and_draws(results):
    values = tables.per_query(results, flat_encoder)
    turned = values.sort_values(["query", "member"], ascending=False).sort_values("method", kind="stable")
    ordered = turned.sort_values("member", kind="stable").sort_values(["query", "method"], kind="stable")
    for summarise in (tables.counterfactual, tables.comparisons):
        pd.testing.assert_frame_equal(summarise(turned, 300, 0), summarise(ordered, 300, 0))


def test_a_users_image_has_losses_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = synthetic.experiment(own_image=True)
    synthetic.write_results(layout)
    tables.evaluate(layout, flat_encoder)
    table = read_table(layout.table("counterfactual"))
    assert row_of(table, method="unlearn", k=2, metric="delta_loss")["n_queries"] == 5
    assert row_of(table, method="unlearn", k=2, metric="delta_mse")["n_queries"] == 4


def test_what_is_there_when_asked(results):
    """One model of unlearn, θ0's own of another query and a draw of random are missing."""
    synthetic.remove(results.measure("unlearn", 2, "report-00", "report-00")["losses"])
    synthetic.remove(results.measure("base", 0, "base", "report-03")["losses"])
    synthetic.remove(results.measure("random", 2, "draw1", "report-01")["losses"])
    tables.evaluate(results, flat_encoder, partial=True)
    table = read_table(results.table("counterfactual"))
    counts = {method: row_of(table, method=method, k=2, metric="delta_loss")["n_queries"] for method in RISE_OF}
    assert counts == {"unlearn": 2, "pixel-l2": 3, "random": 2}
    own = row_of(table, method="unlearn", k=2, metric="delta_loss")
    # .05 + .002 and .001, .002 for the queries 1 and 2; random has the queries 0 and 2: one is left to compare.
    assert (own["mean"], own["p_vs_random"]) == pytest.approx((0.0535, 1))
    assert row_of(table, method="unlearn", k=4, metric="delta_loss")["n_queries"] == 3
    compared = read_table(results.table("comparisons"))
    pair = row_of(compared, k=2, metric="delta_loss", method_a="pixel-l2", method_b="random")
    assert (pair["n_queries"], pair["mean_difference"]) == (2, pytest.approx(0.009))


def test_before_anything_is_measured(results):
    shutil.rmtree(f"{results.root}/retrain")
    tables.evaluate(results, flat_encoder, partial=True)
    for name in results.tables():
        assert read_table(results.table(name)).empty


def test_a_partial_evaluation_of_all_there_is_is_the_whole_one(results):
    names = [results.table(name) for name in results.tables()]
    tables.evaluate(results, flat_encoder)
    before = [Path(path).read_bytes() for path in (*names, results.metrics)]
    tables.evaluate(results, flat_encoder, partial=True)
    assert [Path(path).read_bytes() for path in (*names, results.metrics)] == before


def test_only_a_users_image_and_no_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = synthetic.experiment(own_image=True, seeds=0, methods=["unlearn"], random_draws=1)
    only = {"queries": [{"name": "mine", "image": "mine.png", "prompt": "a cat"}]}
    content = layout.config.model_dump(mode="json") | {"synthesize": only}
    layout = synthetic.Layout("synthetic", synthetic.parse_config(content, "x.yaml"))
    synthetic.write_results(layout)
    tables.evaluate(layout, flat_encoder)
    table = read_table(layout.table("counterfactual"))
    assert set(table["metric"]) == {"delta_loss"}
    assert set(table["method"]) == {"unlearn", "random"}
    assert table["se"].isna().all()
    assert table["ci_low"].isna().all()
    assert read_table(layout.table("comparisons"))["p"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["losses", "image"])
def test_a_missing_measure_names_the_file(results, kind):
    path = results.measure("random", 4, "draw1", "report-02")[kind]
    synthetic.remove(path)
    with pytest.raises(UserError, match=path):
        tables.evaluate(results, flat_encoder)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "3",
        "{}",
        '{"loss": null, "timesteps": [0]}',
        '{"loss": 1}',
        '{"loss": NaN, "timesteps": [0, 500]}',
    ],
)
def test_a_damaged_measure_names_the_file(results, content):
    path = results.measure("unlearn", 2, "report-01", "report-01")["losses"]
    Path(path).write_text(content)
    with pytest.raises(UserError, match=path):
        tables.evaluate(results, flat_encoder)


def test_a_truncated_image_names_the_file(results):
    path = results.measure("pixel-l2", 2, "report-01", "report-01")["image"]
    Path(path).write_bytes(Path(path).read_bytes()[:100])
    with pytest.raises(UserError, match=path):
        tables.evaluate(results, flat_encoder)


def test_an_image_of_another_size_names_the_file(results):
    path = results.measure("seed", 0, "draw1", "report-00")["image"]
    write_image(path, np.zeros((8, 8, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=f"{path} has another size"):
        tables.evaluate(results, flat_encoder)


@pytest.mark.parametrize("change", [{"timesteps": [0, 400]}, {"regenerated": False}])
def test_a_measure_taken_otherwise_than_that_of_theta0_is_refused(results, change):
    path = results.measure("unlearn", 2, "report-01", "report-01")["losses"]
    write_json(path, json.loads(Path(path).read_text()) | change)
    with pytest.raises(UserError, match=path):
        tables.evaluate(results, flat_encoder)


def test_nothing_is_written_when_a_measure_is_missing(results):
    synthetic.remove(results.measure("unlearn", 4, "report-03", "report-03")["losses"])
    with pytest.raises(UserError):
        tables.evaluate(results, flat_encoder)
    assert not Path(results.table("per_query")).exists()
