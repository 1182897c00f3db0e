from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError
from forgetrace.config import Narrowing, Scan
from forgetrace.datasets import prepare as prepare_module
from forgetrace.datasets.contract import Example
from forgetrace.encoding.check import check_data
from forgetrace.layout import Layout

from ..conftest import settings

POOLS = {"tuning_captions": 2, "report_captions": 3}


def examples(seed: int) -> list[Example]:
    """Twenty images, two of each of ten captions: the pools leave ten."""
    return [Example(f"i-{i}", np.zeros((8, 16, 3), dtype=np.uint8), f"caption {i % 10}") for i in range(20)]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = {"digits": examples}
    monkeypatch.setattr(prepare_module, "SOURCES", sources)
    return sources


def layout(**sections) -> Layout:
    return Layout("tiny", settings(**{"prepare": POOLS, "retrain": {"k": [9]}, **sections}))


@pytest.fixture(params=["before prepare", "prepared", "damaged"])
def data(request, sources):
    """The answer is the same whether it comes from the source or from the manifest."""
    made = layout()
    if request.param != "before prepare":
        prepare_module.prepare(made.config.prepare, made.data)
        sources.clear()
    if request.param == "damaged":
        Path(made.data_manifest).write_text("{")
        sources["digits"] = examples


@pytest.mark.usefixtures("data")
def test_what_the_data_allow_passes():
    check_data(layout())
    check_data(layout(encode={"max_images": 100, "factor": 8}))
    check_data(layout(encode={"max_images": 5}, retrain={"k": [4]}))


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"retrain": {"k": [1, 10]}}, r"retrain.k: 10 images cannot be left out of 10; choose a smaller K\."),
        ({"encode": {"max_images": 9}}, "retrain.k: 9 images cannot be left out of 9"),
        ({"encode": {"factor": 3}}, "encode.factor: images of 8x16 do not divide into 3x3 patches"),
        ({"encode": {"factor": 16}}, "encode.factor: images of 8x16 do not divide into 16x16 patches"),
    ],
)
def test_what_they_do_not_is_named(sections, message):
    with pytest.raises(UserError, match=message):
        check_data(layout(**sections))


@pytest.mark.usefixtures("data")
def test_a_boundary_below_all_images_is_named():
    made = layout(retrain={"k": [1]})
    config = made.config.model_copy(update={"scan": Scan(narrowing=Narrowing(tops=[1, 10]))})
    with pytest.raises(UserError, match=r"scan.narrowing.tops: there is no top 10 of 10 images"):
        check_data(replace(made, config=config))


@pytest.mark.usefixtures("sources")
def test_pools_that_take_every_caption_are_named():
    pools = {"tuning_captions": 5, "report_captions": 5}
    with pytest.raises(UserError, match=r"^prepare.tuning_captions \+ prepare.report_captions = 10 leaves nothing"):
        check_data(layout(prepare=pools))


def test_the_default_experiment_is_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    default = Layout("digits", settings())
    largest = replace(default, config=settings(retrain={"k": [4729]}))
    check_data(largest)
    with pytest.raises(UserError, match="4730 images cannot be left out of 4730"):
        check_data(replace(default, config=settings(retrain={"k": [4730]})))
