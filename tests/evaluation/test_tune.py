from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from typer.testing import CliRunner

from forgetrace import cli
from forgetrace.artifacts import UserError, read_arrays, read_table, write_json
from forgetrace.attribution.gradients import Gradients
from forgetrace.attribution.registry import attributor
from forgetrace.attribution.score import score
from forgetrace.attribution.unlearning import Unlearning
from forgetrace.counterfactual.measure import query_losses
from forgetrace.counterfactual.sets import half
from forgetrace.diffusion.model import load_unet
from forgetrace.diffusion.synthesis import synthesize
from forgetrace.diffusion.training import Training, train
from forgetrace.encoding.store import load_encoded
from forgetrace.evaluation import tune as module
from forgetrace.evaluation.tune import best, compare, tune
from forgetrace.layout import Layout

from ..conftest import settings

HALVES = 6


def with_halves(tiny: Layout, **sections) -> Layout:
    """The tiny experiment with two tuning queries and what invented models of random halves say of them."""
    queries = [{"pool": "report", "count": 1}, {"pool": "tuning", "count": 2}]
    sections = {"synthesize": {"queries": queries}, "retrain": {"subsets": HALVES, "queries": 1}, **sections}
    layout = replace(tiny, config=settings(**sections))
    random = np.random.default_rng(3)
    for query in layout.config.queries():
        if not Path(layout.query(query)["record"]).exists():
            synthesize(layout, query, "cpu")
    for model in layout.half_models():
        said = {query: {"key": "", "loss": float(random.random())} for query in layout.config.queries()}
        write_json(layout.losses(*model), {"queries": said})
    return layout


def losses_of(layout: Layout, query: str) -> list[float]:
    from forgetrace.artifacts import read_json

    return [read_json(layout.losses(*model))["queries"][query]["loss"] for model in layout.half_models()]


def test_every_value_of_a_variants_option_is_scored_on_the_tuning_queries(tiny, monkeypatch):
    layout = with_halves(tiny)
    table = tune(layout, "unlearn", "step_size", ["1e-4", "1e-3"], "cpu")
    assert table["value"].tolist() == ["1e-4", "1e-4", "1e-3", "1e-3"]
    assert table["query"].tolist() == ["tuning-00", "tuning-01"] * 2
    assert (table["halves"] == HALVES).all()
    trial = module.trial(layout, "unlearn", "step_size", "1e-3")
    variant = trial.config.score.methods["unlearn"].variant
    assert trial.config.unlearn[variant].step_size == 1e-3
    other = replace(layout, config=layout.config.model_copy(update={"seed": 6}))  # θ0 and the scans would be others
    assert module.trial(other, "unlearn", "step_size", "1e-3").config.score.methods["unlearn"].variant != variant
    kept = np.array([half(layout, len(read_table(layout.index)), f"draw{i}") for i in range(HALVES)])
    scores = Unlearning(trial, "unlearn").scores("tuning-01")
    assert table["lds"][3] == pytest.approx(spearmanr(-(kept @ scores), losses_of(layout, "tuning-01")).statistic)

    def again(*arguments):
        raise AssertionError("what is there was made again")

    monkeypatch.setattr(module, "unlearn_query", again)
    monkeypatch.setattr(module, "scan", again)
    pd.testing.assert_frame_equal(tune(layout, "unlearn", "step_size", ["1e-4", "1e-3"], "cpu"), table)


@pytest.mark.parametrize("together", [True, False])
def test_an_option_of_the_method_itself_is_changed_there(tiny, monkeypatch, together):
    methods = {"influence": {"timesteps": 2}, "random": {}}
    layout = with_halves(tiny, score={"methods": methods}, retrain={"subsets": HALVES, "queries": 1, "methods": []})
    if not together:  # one query after the other, each with all settings
        monkeypatch.setattr(Gradients, "at_once", lambda self: 1)
    passes, products = [], Gradients.products
    monkeypatch.setattr(Gradients, "products", lambda *given: passes.append(1) or products(*given))
    table = tune(layout, "influence", "damping", ["0.01", "100"], "cpu")
    assert len(passes) == (1 if together else 2)
    for value, rows in table.groupby("value"):
        trial = module.trial(layout, "influence", "damping", value)
        kept = np.array([half(layout, len(read_table(layout.index)), f"draw{i}") for i in range(HALVES)])
        for _, row in rows.iterrows():
            scores = attributor(trial, "influence", "cpu").scores(row["query"])
            expected = spearmanr(-(kept @ scores), losses_of(layout, row["query"])).statistic
            assert row["lds"] == pytest.approx(expected)
    assert len(table) == 4
    assert module.trial(layout, "influence", "damping", "0.01").config.score.methods["influence"].damping == 0.01


def test_the_best_value_has_the_highest_mean():
    table = pd.DataFrame({"value": ["1", "1", "2", "2"], "lds": [0.9, -0.5, 0.3, 0.3]})
    assert best(table) == "2"


def test_values_that_cannot_be_are_refused_before_anything_runs(tiny, monkeypatch):
    layout = with_halves(tiny)
    monkeypatch.setattr(module, "unlearn_query", lambda *arguments: pytest.fail("it ran"))
    with pytest.raises(UserError, match=r"unlearn\.step_size = -1"):
        tune(layout, "unlearn", "step_size", ["1e-4", "-1"], "cpu")
    with pytest.raises(UserError, match="'pixel' has no such option"):
        tune(layout, "pixel", "damping", ["1"], "cpu")
    with pytest.raises(UserError, match=r"score.methods has no 'pixels'"):
        tune(layout, "pixels", "damping", ["1"], "cpu")


def test_without_tuning_queries_or_halves_there_is_nothing_to_tune_on(tiny):
    with pytest.raises(UserError, match="Tuning needs queries of the tuning pool"):
        tune(tiny, "unlearn", "step_size", ["1e-4"], "cpu")


def test_without_any_half_trained_the_way_out_is_said(tiny):
    layout = with_halves(tiny)
    for model in layout.half_models():
        Path(layout.losses(*model)).unlink()
    with pytest.raises(UserError, match="No model of a random half has been trained yet"):
        tune(layout, "unlearn", "step_size", ["1e-4"], "cpu", partial=True)


def test_a_half_not_yet_asked_about_a_new_query_waits(tiny):
    layout = with_halves(tiny)
    write_json(layout.losses(*layout.half_models()[2]), {"queries": {"report-00": {"key": "", "loss": 1.0}}})
    assert set(tune(layout, "pixel", "timesteps", [], "cpu", partial=True).columns) == {
        "value",
        "query",
        "lds",
        "halves",
    }
    assert len(module.read_halves(layout, partial=True).kept) == HALVES - 1
    with pytest.raises(UserError, match="forgetrace retrain --method half --k 0 --member draw2 again"):
        module.read_halves(layout)


def test_what_is_no_value_is_named(tiny):
    with pytest.raises(UserError, match=r"--values: '\[' is no value"):
        tune(with_halves(tiny), "unlearn", "step_size", ["["], "cpu")
    assert [module._parsed(text) for text in ("1e-3", " ekfac", "10", "null")] == [1e-3, "ekfac", 10.0, None]


def test_a_value_is_judged_by_a_model_without_the_tops_of_all_tuning_queries(tiny, monkeypatch):
    """Against a training by hand; without a half anywhere, and once for each set of images."""
    queries = [{"pool": "report", "count": 1}, {"pool": "tuning", "count": 2}]
    layout = replace(tiny, config=settings(synthesize={"queries": queries}))
    for query in layout.config.queries():
        if not Path(layout.query(query)["record"]).exists():
            synthesize(layout, query, "cpu")
    with pytest.raises(UserError, match=r"retrain.subsets\) or --leave-out K"):
        tune(layout, "unlearn", "step_size", ["1e-4"], "cpu")
    rankings = {"tuning-00": np.arange(40.0), "tuning-01": -np.arange(40.0)}
    monkeypatch.setattr(module, "_scores", lambda *_: rankings)
    table = tune(layout, "unlearn", "step_size", ["1e-4", "1e-3"], "cpu", leave_out=6)
    assert table.columns.tolist() == ["value", "query", "delta_loss", "removed"]
    assert (table["removed"] == 12).all()
    encoded = load_encoded(layout)
    removed = np.zeros(40, dtype=bool)
    removed[[*range(6), *range(34, 40)]] = True
    weights, _, _ = train(layout, encoded, Training("by-hand", 5, removed), "cpu")
    unet, theta0 = (load_unet(layout, torch.device("cpu")) for _ in range(2))
    unet.load_state_dict(weights)
    for _, row in table.iterrows():
        arrays = read_arrays(layout.query(row["query"])["tensors"])
        rise = query_losses(layout, unet, arrays)[1].mean() - query_losses(layout, theta0, arrays)[1].mean()
        assert row["delta_loss"] == pytest.approx(rise, abs=1e-7)
    assert best(table) == "1e-4"  # of equals the first
    assert len(list(Path(layout.root, "tune/models").iterdir())) == 1
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("what is there was trained again"))
    pd.testing.assert_frame_equal(tune(layout, "unlearn", "step_size", ["1e-4", "1e-3"], "cpu", leave_out=6), table)
    with pytest.raises(UserError, match=r"--leave-out: 20 images of each query are all there are"):
        tune(layout, "unlearn", "step_size", ["1e-4"], "cpu", leave_out=20)


def test_methods_are_judged_as_they_are_by_the_images_they_rank_first(tiny, monkeypatch):
    layout = with_halves(tiny)
    for method in ("pixel", "random"):
        score(layout, method)
    asked = []

    def rises(_, queries, scores, leave_out, device):
        asked.append((scores, leave_out))
        return dict.fromkeys(queries, float(len(asked))), 11

    monkeypatch.setattr(module, "rise_without", rises)
    table = compare(layout, ["pixel", "random"], 6, "cpu")
    assert table["value"].tolist() == ["pixel", "pixel", "random", "random"]
    assert table["query"].tolist() == ["tuning-00", "tuning-01"] * 2
    assert table["delta_loss"].tolist() == [1.0, 1.0, 2.0, 2.0]
    assert best(table) == "random"
    for method, (scores, leave_out) in zip(("pixel", "random"), asked, strict=True):
        assert leave_out == 6
        for query in ("tuning-00", "tuning-01"):
            np.testing.assert_allclose(scores[query], attributor(layout, method, "cpu").scores(query))
    monkeypatch.setattr(module, "rise_without", lambda *_: pytest.fail("it trained"))
    with pytest.raises(UserError, match="score/text/tuning-00"):
        compare(layout, ["pixel", "text"], 6, "cpu")
    with pytest.raises(UserError, match=r"score\.methods has no 'pixels'"):
        compare(layout, ["pixels"], 6, "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--option", "damping"], "--option and --values go together"),
        (["--values", "1,2"], "--option and --values go together"),
        ([], "judged as they are by --leave-out K alone"),
        (["--leave-out", "3", "--partial"], "judged as they are by --leave-out K alone"),
    ],
)
def test_what_is_to_be_judged_is_said_whole(options, message):
    config = str(Path(__file__).parents[2] / "config" / "digits-benchmark.yaml")
    result = CliRunner().invoke(cli.app, ["tune", "--config", config, "--method", "pixel", *options])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
