import shutil

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_table
from forgetrace.attribution.candidates import exemplar_ids, validation_images
from forgetrace.attribution.retrieve import retrieve
from forgetrace.diffusion.customization import customize
from forgetrace.evaluation import tune_exemplars as module
from forgetrace.evaluation.retrieval import average_precision
from forgetrace.evaluation.tune import best, trial
from forgetrace.evaluation.tune_exemplars import tune_on_exemplars

from ..customized import customised_layout

METHODS = {"unlearn": {"attributor": "unlearning"}, "influence": {"timesteps": 2}, "pixel": {}}


@pytest.fixture
def layout(tiny, monkeypatch):
    layout = customised_layout(monkeypatch, score={"methods": METHODS})
    for model, _ in validation_images(layout, 2):
        customize(layout, model, "cpu")
    return layout


def test_a_value_is_judged_by_the_ranking_that_a_run_with_it_would_print(layout):
    tried = tune_on_exemplars(layout, "unlearn", "step_size", ["1e-4", "3e-3"], 2, "cpu")
    assert tried["value"].tolist() == ["1e-4", "1e-4", "3e-3", "3e-3"]
    assert list(map(tuple, tried[["model", "query"]].values[:2])) == validation_images(layout, 2)
    for value, model, query, ap in tried.itertuples(index=False):
        own = trial(layout, "unlearn", "step_size", value)
        retrieve(own, model, "cpu")
        ranks = read_table(own.retrieved(model, "unlearn", query)).set_index("image_id")["rank"]
        assert ap == average_precision(np.array([ranks[exemplar_ids(model, 1)[0]]]))
        shutil.rmtree(f"{layout.root}/retrieve")  # the next value starts anew
    means = tried.groupby("value")["ap"].mean()
    assert means[best(tried)] == means.max()


def test_values_that_were_tried_are_not_tried_again(layout, monkeypatch):
    first = tune_on_exemplars(layout, "influence", "damping", ["0.1"], 1, "cpu")

    def again(*arguments):
        raise AssertionError("what is there was made again")

    monkeypatch.setattr(module, "candidates", again)
    assert tune_on_exemplars(layout, "influence", "damping", ["0.1"], 1, "cpu").equals(first)
    with pytest.raises(AssertionError):
        tune_on_exemplars(layout, "influence", "damping", ["0.1", "10"], 1, "cpu")


def test_there_must_be_so_many_images(layout):
    with pytest.raises(UserError, match="--queries 9: validation models make 4 images"):
        tune_on_exemplars(layout, "influence", "damping", ["1"], 9, "cpu")
