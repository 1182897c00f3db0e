"""The experiment of two digits in small: its regions through every stage of the workflow."""

import pytest
import yaml

from forgetrace.artifacts import read_json, read_table

from .conftest import Checkout, layout_of

CONFIG = "config/pairs.yaml"
SETTINGS = {
    "prepare": {"dataset": "digit-pairs"},
    "encode": {"max_images": 60},
    "train": {
        "channels": [16, 32], "steps": 20, "warmup_steps": 2, "batch_size": 8, "snapshots": 1, "checkpoint_every": 20,
    },
    "synthesize": {
        "queries": [{"pool": "report", "count": 1}],
        "sampler_steps": 3,
        "regions": {"left": {"boxes": [[0, 0, 16, 16]]}, "right": {"file": "boxes.yaml"}},
    },
    "fit": {"draws": 64},
    "unlearn": {"unlearn": {"step_size": 1e-4, "draws": 16}},
    "scan": {"timesteps": 2},
    "score": {
        "methods": {
            "unlearn": {"attributor": "unlearning"},
            "random": {},
        }
    },
    "retrain": {"methods": ["unlearn"], "k": [10], "random_draws": 1, "seeds": 0, "queries": 2, "stack": 2},
    "evaluate": {"timestep_stride": 100, "draws": 1, "bootstrap": 100, "precision_k": [5, 20]},
    "figures": {"top": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Checkout:
    """A checkout in which the experiment has run."""
    checkout = Checkout.create(tmp_path_factory.mktemp("pairs") / "a clone")
    (checkout.folder / CONFIG).write_text(yaml.safe_dump(SETTINGS))
    boxes = {"report-00": {"right": [16, 0, 32, 16]}}
    (checkout.folder / "boxes.yaml").write_text(yaml.safe_dump(boxes))
    checkout("snakemake", "--cores", "2", "--configfile", CONFIG)
    return checkout


def test_every_side_of_a_query_is_ranked_judged_and_drawn(pairs, monkeypatch):
    monkeypatch.chdir(pairs.folder)
    layout = layout_of(pairs, "pairs")
    table = read_table(layout.table("regions"))
    assert len(table) == 2 * 2 * 2 * 3  # sides, methods, K, what is shared
    assert table["own"].between(0, 1).all()
    summary = read_table(layout.table("regions_summary"))
    assert (summary["n_regions"] == 2).all()
    values = read_table(layout.table("per_query"))
    assert {"delta_loss", "delta_mse"} <= set(values.loc[values["query"] == "report-00", "metric"])
    assert "delta_loss_inside" in set(values.loc[values["query"] == "report-00-left", "metric"])
    record = read_json(layout.query("report-00-right")["record"])
    assert record["box"] == [16, 0, 32, 16]
    assert (pairs.folder / layout.figure("regions-report-00")).exists()
    assert (pairs.folder / layout.figure("precision")).exists()


def test_another_box_runs_that_region_again_and_nothing_of_the_others(pairs):
    planned = pairs.planned("--configfile", CONFIG)
    assert not planned
    path = pairs.folder / "boxes.yaml"
    path.write_text(path.read_text().replace("- 0\n", "- 1\n", 1))
    planned = pairs.planned("--configfile", CONFIG)
    assert "train" not in planned
    assert "synthesize" not in planned
    assert planned["synthesize_region"] == planned["unlearn"] == planned["scan"] == 1
