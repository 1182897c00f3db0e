import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from forgetrace.artifacts import UserError, read_json, read_table, write_json, write_table
from forgetrace.attribution.ranking import rank
from forgetrace.config.scores import Method
from forgetrace.evaluation import lds, tables
from forgetrace.evaluation.statistics import holm

from . import synthetic
from .synthetic import flat_encoder
from .test_tables import row_of

HALVES = {"subsets": 8, "subset_seeds": 2, "queries": 3}
MIXED = [{"pool": "report", "count": 3}, {"pool": "tuning", "count": 2}]


def halves_of(count: int, images: int, influence: dict[str, np.ndarray], noise: float = 0.0, seeds: int = 1, seed=0):
    """Random halves whose losses are a constant less the influences of the images kept, and noise of each training."""
    random = np.random.default_rng(seed)
    kept = np.array([random.permutation(images) < images // 2 for _ in range(count)])
    losses = {
        query: 3 - kept @ values + noise * random.normal(size=(seeds, count)) for query, values in influence.items()
    }
    return lds.Halves(kept, losses)


def influences(queries: int, images: int, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {f"report-{i:02d}": random.normal(size=images) for i in range(queries)}


def points(found, method: str) -> list[float]:
    return [values[0] for values in found[method].values()]


def experiment(**retrain):
    """Three reported and two tuning queries."""
    layout = synthetic.experiment()
    content = layout.config.model_dump(mode="json")
    content["synthesize"]["queries"] = MIXED
    content["retrain"] |= HALVES | retrain
    return replace(layout, config=synthetic.parse_config(content, "x.yaml"))


def test_true_influences_foretell_the_losses_and_their_negatives_the_contrary():
    truth = influences(3, 20)
    negative = {query: -values for query, values in truth.items()}
    shifted = {query: 7 + 2 * values for query, values in truth.items()}  # every half loses the same constant
    found = lds.correlations(halves_of(30, 20, truth), {"true": truth, "false": negative, "more": shifted}, 10, 0)
    assert points(found, "true") == pytest.approx([1, 1, 1])
    assert points(found, "false") == pytest.approx([-1, -1, -1])
    assert points(found, "more") == pytest.approx([1, 1, 1])


def test_random_scores_foretell_nothing():
    truth, other = influences(200, 40), influences(200, 40, seed=2)
    found = lds.correlations(halves_of(64, 40, truth), {"random": other}, 1, 0)
    # Two random directions in 39 dimensions (halves are balanced), seen through 64 halves.
    spread = np.sqrt(1 / 39 + 1 / 63)
    assert np.mean(points(found, "random")) == pytest.approx(0, abs=3 * spread / np.sqrt(200))
    assert np.std(points(found, "random")) == pytest.approx(spread, rel=0.15)


def test_by_hand_with_ties():
    kept = np.array([[True, False, False], [False, True, False], [False, False, True], [True, True, False]])
    halves = lds.Halves(kept, {"q": np.array([[0.1, 0.2, 0.3, 0.3]])})
    # Foretold: -1, -1, 0, -2. Ranks 2.5, 2.5, 4, 1 against 1, 2, 3.5, 3.5.
    found = lds.correlations(halves, {"m": {"q": np.array([1.0, 1.0, 0.0])}}, 5, 0)
    expected = np.corrcoef([2.5, 2.5, 4, 1], [1, 2, 3.5, 3.5])[0, 1]
    assert found["m"]["q"][0] == pytest.approx(expected)
    assert found["m"]["q"].shape == (6,)


def test_scores_that_are_all_equal_foretell_nothing():
    truth = influences(1, 20)
    found = lds.correlations(halves_of(10, 20, truth), {"flat": {"report-00": np.ones(20)}}, 5, 0)
    assert found["flat"]["report-00"].tolist() == [0] * 6


def test_methods_are_judged_against_the_mean_of_the_trainings():
    truth = influences(1, 20)
    halves = halves_of(40, 20, truth, noise=2.0, seeds=3)
    found = lds.correlations(halves, {"true": truth}, 5, 0)["true"]["report-00"][0]
    expected = stats.spearmanr(-(halves.kept @ truth["report-00"]), halves.losses["report-00"].mean(axis=0))
    assert found == pytest.approx(expected.statistic)


def test_the_seeds_row_is_the_mean_agreement_of_two_trainings():
    truth = influences(2, 20)
    halves = halves_of(40, 20, truth, noise=2.0, seeds=3)
    found = lds.correlations(halves, {}, 5, 0)["seed"]["report-01"][0]
    first, second, third = halves.losses["report-01"]
    pairs = [stats.spearmanr(a, b).statistic for a, b in ((first, second), (first, third), (second, third))]
    assert found == pytest.approx(np.mean(pairs))
    assert "seed" not in lds.correlations(halves_of(9, 20, truth), {}, 5, 0)


def test_the_ceiling_by_hand():
    assert lds.ceiling(0.5, 1) == pytest.approx(np.sqrt(0.5))
    assert lds.ceiling(0.5, 2) == pytest.approx(np.sqrt(2 / 3))  # 2·½ / (1 + ½)
    assert lds.ceiling(1.0, 3) == 1
    assert (lds.ceiling(-0.2, 2), lds.ceiling(1.1, 2)) == (0, 1)
    assert np.isnan(lds.ceiling(np.nan, 2))


@pytest.mark.parametrize(("seeds", "noise"), [(2, 1.0), (2, 4.0), (4, 4.0)])
def test_the_ceiling_is_what_the_expected_losses_reach(seeds, noise):
    truth = influences(60, 40)
    found = lds.correlations(halves_of(200, 40, truth, noise, seeds), {"true": truth}, 1, 0)
    reached = np.mean(points(found, "true"))
    assert reached < 0.99
    assert lds.ceiling(np.mean(points(found, "seed")), seeds) == pytest.approx(reached, abs=0.015)


def test_intervals_cover_the_mean_over_queries_and_halves():
    """Queries differ in how well they are foretold, but hang on much the same images and on the same halves."""
    layout, covered, by_queries_alone, trials = experiment(), 0, 0, 120
    random = np.random.default_rng(0)

    def drawn(queries: int, count: int):
        common, shared = random.normal(size=count), random.normal(size=20)
        kept = np.array([random.permutation(20) < 10 for _ in range(count)])
        noise = random.uniform(0.5, 3, queries)[:, None] * (0.3 * random.normal(size=(queries, count)) + 2 * common)
        truth = {f"report-{i:02d}": shared + 0.5 * random.normal(size=20) for i in range(queries)}
        losses = {query: (own - kept @ truth[query])[None] for query, own in zip(truth, noise, strict=True)}
        return lds.correlations(lds.Halves(kept, losses), {"true": truth}, 300, int(random.integers(1000)))

    expected = np.mean([points(drawn(40, 16), "true") for _ in range(100)])
    for _ in range(trials):
        found = drawn(10, 16)
        row = row_of(lds.summary(layout, found, (16, 1)), method="true")
        covered += row["ci_low"] <= expected <= row["ci_high"]
        values = np.array(points(found, "true"))
        reach = stats.t.ppf(0.975, 9) * values.std(ddof=1) / np.sqrt(10)
        by_queries_alone += abs(values.mean() - expected) <= reach
    assert by_queries_alone / trials < 0.75
    assert covered / trials == pytest.approx(0.95, abs=0.05)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Three judged queries of the report pool and two of the tuning pool, eight halves trained twice."""
    monkeypatch.chdir(tmp_path)
    layout = experiment()
    synthetic.write_results(layout)
    tables.evaluate(layout, flat_encoder)
    return layout


def test_the_tables_by_hand(evaluated):
    single = read_table(evaluated.table("lds_per_query"))
    assert list(single.columns) == lds.LDS_PER_QUERY
    assert len(single) == 5 * 4  # three methods and the seeds
    table = read_table(evaluated.table("lds"))
    assert list(table.columns) == lds.LDS
    assert table["queries"].unique().tolist() == ["report", "tuning"]
    for pool, queries in (("report", 3), ("tuning", 2)):
        for method, expected in (("unlearn", 1), ("pixel-l2", -1), ("seed", 1), ("ceiling", 1)):
            row = row_of(table, queries=pool, method=method)
            assert row["mean"] == pytest.approx(expected)
            assert (row["n_queries"], row["halves"], row["seeds"]) == (queries, 8, 2)
        values = row_of(table, queries=pool, method="random")
        own = single[(single["queries"] == pool) & (single["method"] == "random")]["lds"]
        assert values["mean"] == pytest.approx(own.mean(), abs=1e-5)
        assert values["se"] >= own.std() / np.sqrt(queries) - 1e-5
        assert values["ci_low"] < values["mean"] < values["ci_high"]
    assert row_of(table, queries="report", method="unlearn")["p_vs_random"] == pytest.approx(2 / 2**3)
    assert table[table["method"].isin(["random", "seed", "ceiling"])]["p_vs_random"].isna().all()


def test_comparisons_are_on_the_reported_queries(evaluated):
    table = read_table(evaluated.table("comparisons"))
    assert list(table.columns) == tables.COMPARISONS
    family = table[table["metric"] == "lds"]
    pairs = list(zip(family["method_a"], family["method_b"], strict=True))
    assert pairs == [("unlearn", "pixel-l2"), ("unlearn", "random"), ("pixel-l2", "random")]
    row = row_of(family, method_a="unlearn", method_b="pixel-l2")
    assert (row["k"], row["n_queries"], row["mean_difference"]) == (0, 3, pytest.approx(2))
    assert family["p"].tolist() == pytest.approx([0.25] * 3)
    assert family["p_holm"].tolist() == pytest.approx([0.75] * 3)
    assert set(table["metric"]) > {"lds", "delta_loss"}


def test_an_image_and_its_regions_count_as_one_query(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = synthetic.experiment(regions=True, subsets=8)
    synthetic.write_results(layout)
    halves = lds.read_halves(layout)
    found = lds.correlations(halves, lds.read_scores(layout), 200, 0)
    row = row_of(lds.summary(layout, found, halves.shape), method="random")
    by_image = [
        np.mean([found["random"][f"report-0{i}{side}"][0] for side in ("", "-side1", "-side2")]) for i in range(4)
    ]
    assert row["n_queries"] == 4
    assert row["mean"] == pytest.approx(np.mean(by_image))
    assert row["se"] >= np.std(by_image, ddof=1) / 2 - 1e-9
    pair = next(row for row in lds.comparisons(layout, found) if "random" in row and "unlearn" in row)
    pair = dict(zip(tables.COMPARISONS, pair, strict=True))
    assert (pair["n_queries"], pair["p"]) == (4, pytest.approx(2 / 2**4))
    assert pair["mean_difference"] == pytest.approx(1 - np.mean(by_image))


def test_dvc_reads_the_means(evaluated):
    assert read_json(evaluated.metrics)["lds"]["unlearn"] == {"report": 1, "tuning": 1}


def test_without_repetitions_there_is_no_ceiling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = experiment(subset_seeds=1)
    synthetic.write_results(layout)
    tables.evaluate(layout, flat_encoder)
    assert set(read_table(layout.table("lds"))["method"]) == {"unlearn", "pixel-l2", "random"}
    assert set(read_table(layout.table("lds"))["seeds"]) == {1}


def test_a_part_of_the_halves_when_asked(evaluated):
    for member in ("draw1", "draw1-seed1", "draw5", "draw7-seed1"):
        Path(evaluated.losses("half", 0, member)).unlink()
    with pytest.raises(UserError, match=r"half/k0/draw1.json is missing"):
        tables.evaluate(evaluated, flat_encoder)
    tables.evaluate(evaluated, flat_encoder, partial=True)
    table = read_table(evaluated.table("lds"))
    # draw7 lacks its repetition: the second seed does not count.
    assert set(table["halves"]) == {6}
    assert set(table["seeds"]) == {1}
    assert "ceiling" not in set(table["method"])
    Path(evaluated.losses("half", 0, "draw7")).unlink()
    tables.evaluate(evaluated, flat_encoder, partial=True)
    table = read_table(evaluated.table("lds"))
    assert set(table["halves"]) == {5}
    assert set(table["seeds"]) == {2}
    assert row_of(table, queries="report", method="unlearn")["mean"] == pytest.approx(1)


def test_scores_that_are_missing_when_asked(evaluated):
    Path(evaluated.score("unlearn", "report-01")).unlink()
    Path(evaluated.score("random", "report-02")).unlink()
    for name in evaluated.tables():  # rows of more queries would stay
        Path(evaluated.table(name)).unlink()
    tables.evaluate(evaluated, flat_encoder, partial=True)
    row = row_of(read_table(evaluated.table("lds")), queries="report", method="unlearn")
    assert row["n_queries"] == 2
    assert row["p_vs_random"] == 1  # one query is left that both have
    comparisons = read_table(evaluated.table("comparisons"))
    assert row_of(comparisons, metric="lds", method_a="unlearn", method_b="random")["n_queries"] == 1


def test_in_a_clone_without_scores_the_tables_stay_and_one_more_method_is_laid_beside(evaluated):
    names = ("lds_per_query", "lds", "agreement", "comparisons", "cost")
    measured = read_table(evaluated.table("cost")).assign(query_seconds=[1.5, 2.5, 3.5])  # on another machine
    write_table(evaluated.table("cost"), measured)
    before = {name: read_table(evaluated.table(name)) for name in names}
    shutil.rmtree(Path(evaluated.root, "score"))
    tables.evaluate(evaluated, flat_encoder, partial=True)
    for name in names:
        pd.testing.assert_frame_equal(read_table(evaluated.table(name)), before[name], rtol=1e-4)
    assert read_json(evaluated.metrics)["lds"]["unlearn"] == {"report": 1, "tuning": 1}

    # One score, looked at: the rows of all queries stay.
    ids = read_table(evaluated.index)["image_id"].tolist()
    some = evaluated.score("unlearn", "report-00")
    write_table(some, rank(ids, synthetic.scores(evaluated, "unlearn", "report-00")))
    tables.evaluate(evaluated, flat_encoder, partial=True)
    for name in names:
        pd.testing.assert_frame_equal(read_table(evaluated.table(name)), before[name], rtol=1e-4)
    Path(some).unlink()

    methods = {"mine": Method(attributor="pixel")} | evaluated.config.score.methods
    score = evaluated.config.score.model_copy(update={"methods": methods})
    layout = replace(evaluated, config=evaluated.config.model_copy(update={"score": score}))
    for query in layout.config.queries():
        for method in ("mine", "random"):
            scores = synthetic.scores(layout, "unlearn" if method == "mine" else method, query)
            write_table(layout.score(method, query), rank(ids, scores))
    tables.evaluate(layout, flat_encoder, partial=True)
    table = read_table(layout.table("lds"))
    own = table[table["queries"] == "report"]
    assert own["method"].tolist() == ["mine", "unlearn", "pixel-l2", "random", "seed", "ceiling"]
    assert (row_of(own, method="mine")["mean"], row_of(own, method="pixel-l2")["mean"]) == pytest.approx((1, -1))
    ps = own["p_vs_random"].dropna()
    assert own["p_vs_random_holm"].dropna().tolist() == pytest.approx(holm(ps.to_numpy()).tolist())
    family = read_table(layout.table("comparisons")).query("metric == 'lds'")
    assert list(zip(family["method_a"], family["method_b"], strict=True)) == [
        ("mine", "random"), ("unlearn", "pixel-l2"), ("unlearn", "random"), ("pixel-l2", "random"),
    ]  # fmt: skip
    assert family["p_holm"].tolist() == pytest.approx([1.0] * 4)  # four tests of p = .25
    costs = read_table(layout.table("cost"))
    assert costs["method"].tolist() == ["mine", "unlearn", "pixel-l2", "random"]
    assert costs["query_seconds"].tolist()[1:3] == [1.5, 2.5]


def test_before_any_half_is_trained(evaluated):
    for model in evaluated.half_models():
        Path(evaluated.losses(*model)).unlink()
    tables.evaluate(evaluated, flat_encoder, partial=True)
    assert read_table(evaluated.table("lds")).empty
    assert "lds" not in set(read_table(evaluated.table("comparisons"))["metric"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "says nothing of the query report-01"),
        (3, "says nothing of the query report-01"),
        ({"loss": "high"}, "says nothing of the query report-01"),
        ({"loss": float("nan")}, "holds the loss nan for report-01: the model diverged"),
        (None, "says nothing of the query report-01"),
    ],
)
def test_a_damaged_record_names_the_file(evaluated, entry, message):
    path = evaluated.losses("half", 0, "draw2-seed1")
    record = read_json(path)
    record["queries"]["report-01"] = entry
    write_json(path, record)
    with pytest.raises(UserError, match=f"{path} {message}"):
        tables.evaluate(evaluated, flat_encoder)
