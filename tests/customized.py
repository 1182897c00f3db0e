"""The tiny experiment with customised models: two objects and a style, trained for a few steps."""

import pytest

from forgetrace.config import Config
from forgetrace.layout import Layout

from .conftest import settings
from .text_models import tiny_bert

PROMPTS = {
    "object": {"exemplar": "a V*", "template": ["a red V*"], "free": ["my V*"]},
    "style": {"exemplar": "V* style", "template": ["one V*"], "free": ["V* two"]},
}
WITH_CONTROLS = {kind: own | {"plain": ["a zero"]} for kind, own in PROMPTS.items()}
CUSTOMIZE = {
    "objects": {"test": 2, "validation": 2, "train": 2},
    "styles": {"test": 2},
    "exemplars": 3,
    "rare_token": "zu",
    "steps": 4,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "prior_images": 7,
    "prompts": PROMPTS,
}
SECTIONS = {
    "synthesize": {"queries": []},
    "retrain": {"methods": [], "random_draws": 1},
    "customize": CUSTOMIZE,
    "unlearn": {
        "unlearn": {"step_size": 1e-4, "steps": 2, "draws": 8, "weights": "cross-attn-kv"},
        "unlearn-sgd": {"curvature": "none", "weights": "attn", "step_size": 1e-2, "draws": 8},
    },
}


def customised(**sections: dict) -> Config:
    """The config, with some keys of some sections replaced."""
    merged = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in {**SECTIONS, **sections}}
    return settings(**merged)


def customised_layout(monkeypatch: pytest.MonkeyPatch, **sections: dict) -> Layout:
    """The experiment of the fixture ``tiny`` with this config, and a tiny text encoder."""
    monkeypatch.setattr("forgetrace.encoding.text.load", tiny_bert)
    return Layout("tiny", customised(**sections))
