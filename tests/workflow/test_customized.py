"""Customised models in miniature: the whole workflow from digits to the figures."""

import json

import pandas as pd
import pytest
import yaml
from PIL import Image

from forgetrace.datasets.concepts import names as concepts
from forgetrace.figures.catalogue import names

from .conftest import ROOT, Checkout, layout_of

CONFIG = "config/mini-abc.yaml"
SETTINGS = {
    "encode": {"max_images": 60},
    "train": {"channels": [8, 16], "norm_groups": 4, "steps": 10, "warmup_steps": 2, "batch_size": 8, "snapshots": 1},
    "synthesize": {"queries": [], "sampler_steps": 2},
    "customize": {
        "objects": {"test": 1, "validation": 2, "train": 2},
        "styles": {"test": 1},
        "exemplars": 2,
        "rare_token": "zu",
        "steps": 2,
        "batch_size": 2,
        "prior_images": 5,
        "prompts": {
            "object": {
                "exemplar": "a V* on a {background} background",
                "template": ["a red V*"],
                "free": ["my V*"],
                "plain": ["a one"],
            },
            "style": {"exemplar": "a {digit} in V* style", "template": ["a zero in V* style"], "free": ["three as V*"]},
        },
    },
    "retrieve": {"costly": {"methods": ["unlearn-ekfac"], "models": 1, "queries": 1}},
    "learn": {"steps": 4, "every": 2},
    "fit": {"draws": 40},
    "unlearn": {
        "unlearn": {"weights": "cross-attn-kv", "step_size": 1e-4, "steps": 2, "draws": 8},
        "unlearn-ekfac": {"curvature": "ekfac", "weights": "cross-attn-kv", "step_size": 1e-4, "draws": 8},
    },
    "scan": {"timesteps": 2},
    "score": {
        "methods": {
            "unlearn": {"attributor": "unlearning"},
            "unlearn-ekfac": {"attributor": "unlearning"},
            "pixel": {},
            "efficientnet": {},
            "unet-features": {},
            "random": {},
        }
    },
    "evaluate": {"bootstrap": 50},
    "figures": {"top": 4},
}


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Checkout:
    """A checkout in which the experiment has run."""
    checkout = Checkout.create(tmp_path_factory.mktemp("customized") / "a clone")
    (checkout.folder / CONFIG).write_text(yaml.safe_dump(SETTINGS))
    checkout("snakemake", "--cores", "2", "--configfile", CONFIG)
    return checkout


@pytest.fixture
def layout(miniature, monkeypatch):
    monkeypatch.chdir(miniature.folder)
    return layout_of(miniature, "mini-abc")


def test_every_stage_ends_and_there_is_nothing_left_to_do(miniature):
    assert miniature.planned("--configfile", CONFIG) == {}


def test_the_tables_hold_every_method_by_kind_and_manner_and_the_figures_are_pictures(layout):
    found = pd.read_csv(layout.table("retrieval"))
    everywhere = {"unlearn", "pixel", "efficientnet", "unet-features", "random", "learned"}
    asked = found[found["manner"] != "plain"]
    assert set(asked[asked["queries"] == "all"]["method"]) == everywhere
    assert set(asked[asked["queries"] == "subset"]["method"]) == everywhere | {"unlearn-ekfac"}
    assert set(found["kind"]) == {"object", "style"}
    assert set(found["manner"]) == {"all", "template", "free", "plain"}
    assert set(found[found["manner"] == "plain"]["kind"]) == {"object"}
    assert found["mean"].between(0, 1).all()
    with open(layout.metrics) as metrics:
        assert set(json.load(metrics)["retrieval"]) == {"object", "style"}
    shown = names(layout)
    first = "exemplars-" + concepts(layout.config.customize, 0)["test"][0]
    assert {"retrieval", "reliability", *(f"{first}-{i:02d}" for i in range(3))} <= set(shown)
    for name in shown:
        with Image.open(layout.figure(name, "png")) as picture:
            assert min(picture.size) > 100


def test_one_more_model_to_learn_from_leaves_the_others_as_they_are(miniature):
    more = SETTINGS | {"customize": SETTINGS["customize"] | {"objects": {"test": 1, "validation": 2, "train": 3}}}
    (miniature.folder / CONFIG).write_text(yaml.safe_dump(more))
    planned = miniature.planned("--configfile", CONFIG)
    (miniature.folder / CONFIG).write_text(yaml.safe_dump(SETTINGS))
    assert planned["customize"] == planned["learn"] == planned["evaluate"] == 1
    assert not {"train", "retrieve", "fit"} & set(planned)


def test_an_experiment_without_customised_models_has_none_of_it(checkout):
    planned = checkout.planned("--configfile", "config/smoke.yaml")
    assert "synthesize" in planned
    assert not {"customize", "retrieve", "learn"} & set(planned)


MISTAKES = {
    "no V* in a prompt": ('"my V*"', '"my own"', ["customize.prompts.object", "'my own' lacks the new token V*"]),
    "too many concepts": ('"test": 1', '"test": 100', ["customize.objects asks for", "only"]),
    "an unknown costly method": ('["unlearn-ekfac"]', '["ekfac"]', ["retrieve.costly.methods", "ekfac"]),
    "queries of its own": ('"queries": []', '"queries": [{"pool": "report", "count": 1}]', ["synthesize.queries"]),
    "a place that cannot be filled": ("{digit}", "{letter}", ["customize.prompts", "{letter}", "digit"]),
    "no models to learn from": ('"train": 2', '"train": 1', ["learn", "two train models"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_any_job(checkout, mistake):
    old, new, named = MISTAKES[mistake]
    text = json.dumps(SETTINGS)
    assert old in text
    (checkout.folder / "bad.yaml").write_text(text.replace(old, new, 1))
    refused = checkout("snakemake", "-n", "--configfile", "bad.yaml", check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    sentence = refused.stderr.strip().splitlines()[-1]
    assert all(word in sentence for word in named), refused.stderr


def test_the_benchmark_of_the_repository_is_of_the_promised_size():
    layout = layout_of(Checkout(ROOT), "abc-digits")
    config = layout.config.customize
    test = concepts(config, layout.config.seed)["test"]
    assert len(test) >= 20
    assert sum(len(config.prompts[name.partition("-")[0]].queries()) for name in test) >= 200
