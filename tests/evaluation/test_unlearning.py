from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forgetrace.artifacts import UserError, read_arrays, read_image, read_table, write_arrays, write_json
from forgetrace.evaluation import tables
from forgetrace.evaluation.unlearning import UNLEARNING, unlearning
from forgetrace.figures.catalogue import draw, names

from . import synthetic
from .synthetic import flat_encoder
from .test_tables import row_of


def shifted(image: np.ndarray, levels: int) -> np.ndarray:
    return (image.astype(int) + levels).astype(np.uint8)


@pytest.fixture
def layout(results):
    """Queries that become lighter by 51 levels of 255, the more the higher their number; two others, by 1 and 2."""
    evaluate = results.config.evaluate.model_copy(update={"others": 2})
    layout = replace(results, config=results.config.model_copy(update={"evaluate": evaluate}))
    random = np.random.default_rng(0)
    targets = random.integers(0, 100, (4, 16, 16, 3), dtype=np.uint8)
    others = random.integers(0, 100, (2, 16, 16, 3), dtype=np.uint8)
    arrays = {
        "targets": targets,
        "targets_unlearned": np.stack([shifted(image, 51 + i) for i, image in enumerate(targets)]),
        "others": others,
        "others_unlearned": np.stack([[shifted(others[0], 1), shifted(others[1], 2 + i)] for i in range(4)]),
    }
    write_arrays(layout.regenerated("unlearn"), arrays, {})
    for i, query in enumerate(layout.config.queries()):
        record = {"before": {"query": 0.1, "others": 0.2}, "after": {"query": 0.15 + 0.01 * i, "others": 0.21}}
        write_json(layout.unlearned("unlearn", query)["losses"], record)
    return layout


def evaluated(layout):
    tables.evaluate(layout, flat_encoder)
    return read_table(layout.table("unlearning"))


def test_values_by_hand(layout):
    table = evaluated(layout)
    assert list(table.columns) == UNLEARNING
    assert table["metric"].tolist() == ["loss", "delta_mse", "similarity", "ssim"]
    loss = row_of(table, variant="unlearn", metric="loss")
    assert (loss["target"], loss["others"], loss["difference"]) == pytest.approx((0.065, 0.01, 0.055), abs=1e-6)
    assert loss["target_se"] == pytest.approx(0.01 * np.std(range(4), ddof=1) / 2, abs=1e-6)
    assert loss["others_se"] == pytest.approx(0, abs=1e-9)
    assert loss["p"] == pytest.approx(2 / 2**4)
    error = row_of(table, variant="unlearn", metric="delta_mse")
    assert error["target"] == pytest.approx(np.mean([(51 + i) ** 2 for i in range(4)]) / 255**2, rel=1e-4)
    assert error["others"] == pytest.approx(np.mean([(1 + (2 + i) ** 2) / 2 for i in range(4)]) / 255**2, rel=1e-4)
    assert error["ci_low"] <= error["difference"] <= error["ci_high"]
    assert (error["n_queries"], error["n_others"]) == (4, 2)
    assert row_of(table, variant="unlearn", metric="ssim")["target"] < 0.99


def test_an_image_and_its_region_count_as_one_query(layout):
    images = synthetic.experiment(queries=2, regions=True).config.synthesize
    two = images.queries[0].model_copy(update={"count": 2})
    regions = {"side1": images.regions["side1"]}
    synthesize = images.model_copy(update={"queries": [two], "regions": regions})
    layout = replace(layout, config=layout.config.model_copy(update={"synthesize": synthesize}))
    assert layout.config.forgotten_queries() == ["report-00", "report-00-side1", "report-01", "report-01-side1"]
    for i, query in enumerate(layout.config.queries()):
        record = {"before": {"query": 0.1, "others": 0.2}, "after": {"query": 0.15 + 0.01 * i, "others": 0.21}}
        write_json(layout.unlearned("unlearn", query)["losses"], record)
    loss = row_of(unlearning(layout, flat_encoder), variant="unlearn", metric="loss")
    assert (loss["n_queries"], loss["p"]) == (2, 0.5)
    assert loss["target"] == pytest.approx(0.065)
    assert loss["target_se"] == pytest.approx(0.02 / 2)  # .055 and .075


def test_queries_that_only_evaluate_others_change_no_other_table(layout, results):
    evaluated(layout)
    kept = Path(layout.table("counterfactual")).read_bytes()
    tables.evaluate(results, flat_encoder)
    assert Path(layout.table("counterfactual")).read_bytes() == kept
    assert "unlearning" not in results.tables()


def test_missing_and_damaged_files_are_named(layout):
    Path(layout.regenerated("unlearn")).write_bytes(b"no")
    with pytest.raises(UserError, match=r"unlearn/unlearn.npz"):
        evaluated(layout)
    tables.evaluate(layout, flat_encoder, partial=True)
    assert read_table(layout.table("unlearning")).empty


def test_the_figure_shows_before_and_after(layout):
    assert names(layout)[-1] == "unlearning"
    draw(layout, "unlearning")
    page = read_image(layout.figure("unlearning"))
    assert Path(layout.figure("unlearning", "pdf")).stat().st_size > 1000
    tile = round(0.8 * 160)
    arrays = read_arrays(layout.regenerated("unlearn"))
    left, top = round((0.25 + 1.25) * 160), round((0.25 + 0.5) * 160)
    shown = page[top : top + tile : 8, left : left + tile : 8]
    assert np.array_equal(shown, arrays["targets"][0])
    below = top + round((0.8 + 0.06) * 160)
    assert np.array_equal(page[below : below + tile : 8, left : left + tile : 8], arrays["targets_unlearned"][0])
