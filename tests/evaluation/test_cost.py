from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from forgetrace.artifacts import write_table
from forgetrace.attribution import registry
from forgetrace.attribution.contract import Features, Together
from forgetrace.attribution.score import TOOK
from forgetrace.config import Method, Variant, parse_config
from forgetrace.evaluation.cost import COST, cost, needs, timings

from . import synthetic
from .test_tables import row_of

HEADER = "s\th:m:s\tmax_rss\tmax_vms\n"


def ran(path: str, seconds: float, megabytes: float) -> None:
    """A timing as Snakemake leaves it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(f"{HEADER}{seconds}\t0:00:01\t{megabytes}\t9999\n")


def weighs(path: str, count: int) -> None:
    """A file of this many bytes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(bytes(count))


@pytest.fixture
def layout(tmp_path, monkeypatch):
    """Four queries, of which nothing has been computed."""
    monkeypatch.chdir(tmp_path)
    return synthetic.experiment()


def test_an_unlearning_method_pays_for_its_fisher_scans_and_scores(layout):
    assert needs(layout, "unlearn", "report-01") == {
        "results/synthetic/fit/fisher.safetensors",
        "results/synthetic/unlearn/unlearn/report-01.safetensors",
        "results/synthetic/scan/base.npz",
        "results/synthetic/scan/unlearn/report-01.npz",
        "results/synthetic/score/unlearn/report-01.parquet",
    }
    once = {"fit/fisher": (100, 500), "scan/base": (60, 700)}
    single = {"unlearn/unlearn": (8, 300), "scan/unlearn": (40, 800), "score/unlearn": (2, 100)}
    for name, measured in once.items():
        ran(f"timings/synthetic/{name}.tsv", *measured)
    for number, query in enumerate(layout.config.queries()):
        for name, (seconds, memory) in single.items():
            ran(f"timings/synthetic/{name}/{query}.tsv", seconds + number, memory)
        for path in needs(layout, "unlearn", query):
            weighs(path, 1000)
    row = row_of(cost(layout), method="unlearn")
    assert row["once_seconds"] == 160
    assert row["query_seconds"] == pytest.approx(50 + 3 * 1.5)
    assert row["peak_mb"] == 800
    assert row["disk_mb"] == pytest.approx((2 + 3 * 4) * 1e-3)


def test_a_method_without_models_pays_for_its_scores(layout):
    assert needs(layout, "random", "report-00") == {layout.score("random", "report-00")}
    for query in layout.config.queries():
        ran(layout.timing("score", "random", query), 3, 150)
        weighs(layout.score("random", query), 500)
    row = row_of(cost(layout), method="random")
    assert (row["once_seconds"], row["query_seconds"], row["peak_mb"]) == (0, 3, 150)
    assert row["disk_mb"] == pytest.approx(0.002)


def test_what_was_not_measured_is_empty(layout):
    table = cost(layout)
    assert list(table.columns) == COST
    assert table["method"].tolist() == ["unlearn", "pixel-l2", "random"]
    assert table.drop(columns=["method", "once_seconds", "queries_at_once"]).isna().all().all()
    assert table["once_seconds"].tolist() == pytest.approx([np.nan, 0, 0], nan_ok=True)
    for query in layout.config.queries():
        ran(layout.timing("score", "random", query), 1, 50)
    Path(layout.timing("score", "random", "report-01")).write_text(f"{HEADER}1.5\t0:00:01\tNA\tNA\n")
    row = row_of(cost(layout), method="random")
    assert row["query_seconds"] == pytest.approx(4.5 / 4)
    assert np.isnan(row["peak_mb"])  # a job too short to be measured
    assert np.isnan(row["disk_mb"])


def scored(layout, query: str, took: dict, method: str = "pixel-l2") -> None:
    """Scores of a query that say what they took."""
    table = pd.DataFrame({"image_id": ["a"], "score": [1.0], "rank": [1]})
    write_table(layout.score(method, query), table, {TOOK: took})


def test_the_curvature_a_variant_steps_by_is_paid(layout):
    variants = {"unlearn": {"step_size": 1.0, "curvature": "ekfac"}, "unlearn-sgd": {"step_size": 1.0}}
    layout = replace(layout, config=layout.config.model_copy(update={"unlearn": parse_variants(variants)}))
    assert layout.ekfac in needs(layout, "unlearn", "report-00")
    assert layout.fisher not in needs(layout, "unlearn", "report-00")


def parse_variants(variants: dict) -> dict:
    """The section ``unlearn`` of a config."""
    return {name: Variant(**options) for name, options in variants.items()}


def test_a_job_for_all_queries_is_shared_and_features_are_paid_once(layout, monkeypatch):
    class Known(Features):
        name = "gradients-t10"

        def settings(self):
            return {}

        def inputs(self):
            return [layout.weights, layout.fisher]

        def fit(self):
            pass

    class Gradients(Together):
        summary = "a stand-in"

        def features(self):
            return [Known()]

        def inputs(self, query):
            return [layout.features("gradients-t10"), layout.weights, layout.query(query)["tensors"]]

        def scores_of(self, queries):
            return {}

    monkeypatch.setitem(registry.ATTRIBUTORS, "pixel-l2", Gradients)
    assert needs(layout, "pixel-l2", "report-00") == {
        layout.features("gradients-t10"),
        layout.fisher,
        layout.score("pixel-l2", "report-00"),
    }
    assert timings(layout, layout.score("pixel-l2", "report-00")) == ["timings/synthetic/score/pixel-l2/all.tsv"]
    ran("timings/synthetic/fit/gradients-t10.tsv", 30, 900)
    ran("timings/synthetic/fit/fisher.tsv", 70, 200)
    ran("timings/synthetic/score/pixel-l2/all.tsv", 20, 1000)
    assert np.isnan(row_of(cost(layout), method="pixel-l2")["query_seconds"])  # no scores say what they took
    queries = layout.config.queries()
    for query in queries[:-1]:
        scored(layout, query, {"seconds": 30, "queries": 3})
    # The last query came later: what its job took is its own, and the others keep theirs.
    scored(layout, queries[-1], {"seconds": 26, "queries": 1})
    row = row_of(cost(layout), method="pixel-l2")
    assert (row["once_seconds"], row["peak_mb"]) == (100, 1000)
    assert row["query_seconds"] == pytest.approx((3 * 10 + 26) / 4)
    assert row["queries_at_once"] == pytest.approx((3 * 3 + 1) / 4)


def test_a_sharded_scan_took_what_its_shards_took(layout):
    scan = layout.config.scan.model_copy(update={"shards": 2})
    layout = replace(layout, config=layout.config.model_copy(update={"scan": scan}))
    assert timings(layout, layout.base_scan) == [
        f"timings/synthetic/scan/{name}.tsv" for name in ("base", "base/shard-0", "base/shard-1")
    ]
    score = layout.score("unlearn", "report-00")
    assert timings(layout, score) == ["timings/synthetic/score/unlearn/report-00.tsv"]


def test_an_ensemble_costs_what_its_members_do(layout):
    plain = layout.config.model_dump(mode="json", exclude_unset=True)
    plain["score"]["methods"]["both"] = {"attributor": "ensemble", "methods": ["unlearn", "pixel-l2"]}
    layout = replace(layout, config=parse_config(plain, "config/synthetic.yaml"))
    own = {layout.score("both", "report-02")}
    assert needs(layout, "both", "report-02") == own | {
        path for member in ("unlearn", "pixel-l2") for path in needs(layout, member, "report-02")
    }


def test_a_pass_over_unlearned_models_costs_their_unlearning_too(layout):
    entry = Method(attributor="output-shift", variant="unlearn")
    score = layout.config.score.model_copy(update={"methods": {"shift": entry, "random": Method()}})
    layout = replace(layout, config=layout.config.model_copy(update={"score": score}))
    queries = layout.config.queries()
    ran(layout.timing("fit", "fisher"), 100, 500)
    ran(layout.timing("score", "shift", "all"), 40, 900)
    for query in queries:
        ran(layout.timing("unlearn", "unlearn", query), 8, 300)
        scored(layout, query, {"seconds": 36, "queries": len(queries)}, "shift")
    row = row_of(cost(layout), method="shift")
    assert (row["once_seconds"], row["peak_mb"]) == (100, 900)
    assert row["query_seconds"] == pytest.approx(8 + 36 / len(queries))
