import numpy as np

from forgetrace.artifacts import read_arrays
from forgetrace.attribution.candidates import candidates
from forgetrace.attribution.registry import attributor
from forgetrace.attribution.retrieve import rank_for
from forgetrace.datasets.concepts import names
from forgetrace.diffusion.customization import customize
from forgetrace.layout import Layout

from ..conftest import settings
from ..customized import customised_layout


def test_scores_are_the_losses_of_the_scan_and_no_query_matters(tiny):
    layout = Layout("tiny", settings(score={"methods": {"low-loss": {}}}, retrain={"methods": []}))
    source = attributor(layout, "low-loss")
    losses = read_arrays(layout.base_scan)["losses"]
    np.testing.assert_allclose(source.scores("report-00"), -losses.mean(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(source.scores("mine"), source.scores("report-00"))


def test_customised_models_are_scanned_for_it(tiny, monkeypatch):
    layout = customised_layout(monkeypatch, score={"methods": {"low-loss": {}}})
    model = names(layout.config.customize, layout.config.seed)["test"][0]
    customize(layout, model, "cpu")
    own = candidates(layout, model, ["low-loss"])
    rank_for(own, "low-loss", own.config.queries(), "cpu")
    assert read_arrays(own.base_scan)["losses"].shape == (41, 4)
