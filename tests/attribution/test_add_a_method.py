"""The guide's methods, taken from the guide, run as they stand there."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import read_array, read_arrays, read_table
from forgetrace.attribution.registry import ATTRIBUTORS, attributor, check_methods, describe
from forgetrace.attribution.score import score

from ..conftest import settings

GUIDE = Path(__file__).parents[2] / "docs" / "add-a-method.md"
MODULES = [block for block in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S) if block.startswith('"""')]


def class_of(module: str) -> type:
    """The attributor that a module of the guide defines."""
    names = {}
    exec(compile(module, str(GUIDE), "exec"), names)
    return names[re.findall(r"^class (\w+)", module, re.M)[0]]


@pytest.fixture
def added(tiny, monkeypatch):
    """The tiny experiment with both of the guide's methods in registry and config."""
    for name, module in zip(("nearest-latent", "gradient-product"), MODULES, strict=True):
        monkeypatch.setitem(ATTRIBUTORS, name, class_of(module))
    methods = {"nearest-latent": {}, "gradient-product": {"timesteps": 2}, "random": {}}
    return replace(tiny, config=settings(score={"methods": methods}, retrain={"methods": ["nearest-latent"]}))


def test_a_method_takes_less_than_forty_lines():
    assert all(module.count("\n") + 2 < 40 for module in MODULES)  # with a line each in registry and config


def test_the_guides_methods_rank_the_training_images(added):
    check_methods(added.config)
    assert "nearest-latent: negative distance of the latents" in describe()
    for method in ("nearest-latent", "gradient-product"):
        score(added, method, "report-00", "cpu")
    latents, query = read_array(added.latents), read_arrays(added.query("report-00")["tensors"])["latent"]
    nearest = int(np.linalg.norm((latents - query).reshape(len(latents), -1), axis=1).argmin())
    ranking = read_table(added.score("nearest-latent", "report-00"))
    assert ranking["image_id"][0] == read_table(added.index)["image_id"][nearest]
    assert read_table(added.score("gradient-product", "report-00"))["score"].std() > 0


def test_without_a_query_all_that_are_missing_are_scored(added):
    score(added, "gradient-product", None, "cpu")
    assert all(Path(added.score("gradient-product", query)).exists() for query in added.config.queries())
    alone = attributor(added, "gradient-product", "cpu").scores("mine")
    ranking = read_table(added.score("gradient-product", "mine")).set_index("image_id")["score"]
    np.testing.assert_allclose(ranking[read_table(added.index)["image_id"]], alone, rtol=1e-4, atol=1e-12)
