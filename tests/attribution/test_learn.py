import numpy as np
import pandas as pd
import pytest
import torch

from forgetrace.artifacts import UserError, read_json, read_table, read_tensors, sha256_of
from forgetrace.attribution import learn as module
from forgetrace.attribution.candidates import candidates
from forgetrace.attribution.image_features import EncodedImages
from forgetrace.attribution.learn import learn
from forgetrace.attribution.registry import all_features
from forgetrace.attribution.retrieve import retrieve
from forgetrace.datasets.concepts import names
from forgetrace.diffusion.customization import customize
from forgetrace.encoding.image_encoder import ImageEncoder
from forgetrace.evaluation import reliability
from forgetrace.evaluation.retrieval import per_query

from ..customized import WITH_CONTROLS, customised_layout

ENCODER = ImageEncoder(lambda images: images.reshape(len(images), -1)[:, ::16].astype(np.float32) / 99, lambda x: x, {})


@pytest.fixture
def layout(tiny, monkeypatch):
    monkeypatch.setattr("forgetrace.encoding.images.SHIPPED", {"efficientnet-lite0": lambda device: ENCODER})
    layout = customised_layout(monkeypatch, learn={"steps": 4, "every": 2}, score={"methods": {"random": {}}})
    for part in names(layout.config.customize, 5).values():
        for model in part:
            customize(layout, model, "cpu")
    EncodedImages(layout, "efficientnet-lite0").fit()
    return layout


def test_test_models_are_ranked_as_by_any_method_and_models_to_learn_from_are_not(layout):
    learn(layout, "cpu")
    found, test = read_table(layout.learned["ranks"]), names(layout.config.customize, 5)["test"]
    assert set(found["model"]) == set(test)
    assert set(found["method"]) == {"learned"}
    assert found.groupby("query")["image_id"].count().to_dict() == {
        f"{model}-{i:02d}": 3 if model.startswith("style") else 1 for model in test for i in range(2)
    }
    assert found["rank"].between(1, 43).all()
    assert read_table(layout.learned["curve"])["step"].tolist() == [0, 2, 4]


def test_its_encoders_features_are_made_though_no_method_compares_them(layout):
    assert set(all_features(layout)) == {EncodedImages(layout, "efficientnet-lite0").name}
    assert not all_features(candidates(layout, names(layout.config.customize, 5)["test"][0], ["random"]))


def test_the_heads_that_are_kept_are_those_validation_prefers(layout, monkeypatch):
    """Where every step makes validation worse, the identity is kept: cosines of the encoder's features."""
    looks = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(module.np, "mean", lambda values: next(looks))
    models = {part: [] for part in ("train", "validation")}
    models["train"] = [module.Model("a", ["q"], torch.rand(1, 4), torch.rand(1, 4), [True]) for _ in range(3)]
    heads, curve = module.fit_heads(layout, models | {"validation": models["train"]}, torch.rand(5, 4), list("vwxyz"))
    assert curve["ap"].tolist() == [0.9, 0.5, 0.4]
    kept = heads.state_dict()
    assert all(torch.equal(kept[f"{name}.weight"], torch.eye(4)) for name in ("training_image", "generated"))


def test_probabilities_of_a_query_sum_to_one_and_hold_every_exemplar(layout):
    learn(layout, "cpu")
    found = read_table(layout.learned["probabilities"])
    np.testing.assert_allclose(found.groupby("query")["probability"].sum(), 1)
    ranks = read_table(layout.learned["ranks"])
    assert set(found.loc[found["exemplar"], "image_id"]) == set(ranks["image_id"])
    assert 0 < read_json(layout.learned["calibration"])["cutoff"] < 1
    assert set(read_tensors(layout.learned["heads"])) == {
        f"{head}.{kind}" for head in ("training_image", "generated") for kind in ("weight", "bias")
    }
    tables = reliability.tables(layout)
    assert set(tables["calibration"]["kind"]) == {"object", "style"}
    assert tables["calibration"]["mass"].between(0, 1).all()


def test_controls_are_ranked_for_and_teach_nothing(layout, monkeypatch):
    learn(layout, "cpu")
    before = {role: sha256_of(path) for role, path in layout.learned.items() if role != "ranks"}
    ranks = read_table(layout.learned["ranks"])
    controlled = customised_layout(
        monkeypatch,
        customize={"prompts": WITH_CONTROLS},
        learn={"steps": 4, "every": 2},
        score={"methods": {"random": {}}},
    )
    for part in names(layout.config.customize, 5).values():
        for model in part:
            customize(controlled, model, "cpu")
    learn(controlled, "cpu")
    assert before == {role: sha256_of(layout.learned[role]) for role in before}
    found = read_table(layout.learned["ranks"])
    control = found["query"].str.endswith("-02")
    assert set(found.loc[control, "model"]) == set(found["model"])
    pd.testing.assert_frame_equal(found[~control].reset_index(drop=True), ranks)


def test_it_has_a_row_beside_the_methods_that_ranked(layout):
    learn(layout, "cpu")
    models = names(layout.config.customize, 5)["test"]
    retrieve(layout, models[0], "cpu")
    with pytest.raises(UserError, match="is missing"):
        per_query(layout)
    found = per_query(layout, partial=True)
    assert set(found["method"]) == {"random", "learned"}
    assert set(found["model"]) == {models[0]}
