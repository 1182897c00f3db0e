"""One small experiment run for real, and what a changed, killed or cloned one does afterwards.

The smoke experiment takes the place of ``digits`` in a checkout, so that dvc.yaml applies to it. All
tests share that one run; those that change something plan it only, or work in a copy.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import yaml

from forgetrace.layout import Layout, load_layout

from .conftest import Checkout
from .test_dvc_stages import STAGE_OF, STAGES

pytestmark = pytest.mark.slow

AFTER_UNLEARN = {
    "unlearn", "scan", "score", "figure_attribution", "retrain", "evaluate", "figure_counterfactual",
    "figure_delta",
}  # fmt: skip


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Checkout:
    """A checkout in which the whole smoke experiment has run and is in git."""
    checkout = Checkout.create(tmp_path_factory.mktemp("smoke") / "a run")
    shutil.copy(checkout.folder / "config/smoke.yaml", checkout.folder / "config/digits.yaml")
    checkout("snakemake", "--cores", "2")
    checkout("git", "init", "--quiet")
    for key, value in (("user.name", "Test"), ("user.email", "test@example.org")):
        checkout("git", "config", key, value)
    checkout("dvc", "add", "--quiet", "data")
    checkout("dvc", "commit", "--quiet", "--force")
    commit(checkout)
    return checkout


def commit(checkout: Checkout) -> None:
    checkout("git", "add", "--all")
    checkout("git", "commit", "--quiet", "--message", "state")


def layout_of(checkout: Checkout) -> Layout:
    return load_layout(checkout.folder / "config/digits.yaml")


@contextmanager
def edited(checkout: Checkout, path: str, old: str, new: str):
    """A file changed for the length of a block."""
    file = checkout.folder / path
    before = file.read_bytes()
    checkout.edit(path, old, new)
    try:
        yield
    finally:
        file.write_bytes(before)


def score_tables(checkout: Checkout) -> dict[str, pd.DataFrame]:
    layout = layout_of(checkout)
    paths = [layout.score(m, q) for m in layout.config.score.methods for q in layout.config.queries()]
    return {path: pd.read_parquet(checkout.folder / path) for path in paths}


def test_everything_is_there_and_nothing_is_left_to_do(smoke):
    layout = layout_of(smoke)
    for path in (
        layout.weights,
        layout.table("counterfactual"),
        layout.metrics,
        layout.figure("delta", "pdf"),
    ):
        assert (smoke.folder / path).stat().st_size > 0
    assert not list((smoke.folder / "results").rglob(".*.partial"))
    assert smoke.planned() == {}


def test_only_what_the_config_asks_for_is_there(smoke):
    tidy = ("forgetrace", "tidy", "--config", "config/digits.yaml")
    assert smoke(*tidy).stdout == ""
    with edited(smoke, "config/digits.yaml", "count: 2", "count: 1"):
        stale = smoke(*tidy).stdout.splitlines()
    assert stale
    assert all("report-01" in path for path in stale)


def test_git_holds_tables_and_figures_but_no_data_or_weights(smoke):
    tracked = smoke("git", "ls-files", "results", "data").stdout
    assert "results/digits/evaluate/counterfactual.csv" in tracked
    assert "results/digits/figures/delta.png" in tracked
    assert ".safetensors" not in tracked
    assert not [line for line in tracked.splitlines() if line.startswith("data/")]


def test_the_report_is_one_page_with_captions(smoke):
    smoke("snakemake", "--report", "report.html")
    assert "attribution" in (smoke.folder / "report.html").read_text(encoding="utf-8")
    (smoke.folder / "report.html").unlink()


def test_a_step_size_reruns_unlearning_and_what_follows(smoke):
    with edited(smoke, "config/digits.yaml", "unlearn: {step_size: 2.0e-4", "unlearn: {step_size: 3.0e-4"):
        planned = smoke.planned()
    queries = len(layout_of(smoke).config.queries())
    assert set(planned) == AFTER_UNLEARN
    assert planned["unlearn"] == planned["scan"] == planned["score"] == planned["retrain"] == queries


def test_a_query_adds_only_its_own_jobs(smoke):
    with edited(smoke, "config/digits.yaml", "count: 2", "count: 3"):
        planned = smoke.planned()
        config = layout_of(smoke).config
    variants, judged = len(config.unlearn), len(config.retrain.methods)
    assert planned == {
        "synthesize": 1,
        "unlearn": variants,
        "scan": variants,
        "score": len(config.score.methods),
        "figure_attribution": 1,
        "retrain": judged,
        "measure": 1,
        "figure_counterfactual": 1,
        "evaluate": 1,
        "figure_delta": 1,
    }


def test_a_docstring_reruns_nothing(smoke):
    with edited(smoke, "src/forgetrace/unlearning/step.py", '"""', '"""In other words: '):
        assert smoke.planned() == {}


def test_a_raised_version_reruns_its_stage(smoke):
    with edited(smoke, "workflow/versions.yaml", "figures: 1", "figures: 2"):
        assert {rule.partition("_")[0] for rule in smoke.planned()} == {"figure"}


def test_how_a_stage_computes_reruns_nothing(smoke):
    with edited(smoke, "config/digits.yaml", "scan:\n", "scan:\n  batch_size: 7\n"):
        assert smoke.planned() == {}


def test_a_killed_run_resumes_to_equal_scores(smoke, tmp_path):
    again = Checkout(tmp_path / "killed")
    shutil.copytree(smoke.folder, again.folder)
    again.environment["PYTHONPATH"] = str(again.folder / "src")
    for stage in ("train", "synthesize", "fit", "unlearn", "scan", "score"):
        shutil.rmtree(again.folder / "results/digits" / stage)
    seconds = random.uniform(5, 40)
    run = again.start("snakemake", "--cores", "2", "all_score")
    try:
        run.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        # The whole group, as when the machine dies: jobs do not outlive their Snakemake.
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    time.sleep(1)
    finished = {path: path.stat().st_mtime_ns for path in (again.folder / "results/digits/scan").rglob("*.npz")}
    again("python", "workflow/scripts/clear_stale_lock.py")
    again("snakemake", "--cores", "2", "all_score")
    for path, modified in finished.items():
        assert path.stat().st_mtime_ns == modified, f"{path} was finished and made again"
    expected, resumed = score_tables(smoke), score_tables(again)
    for path, table in expected.items():
        pd.testing.assert_frame_equal(table, resumed[path], obj=f"{path} after a kill at {seconds:.1f} s")


@pytest.fixture(scope="session")
def clone(smoke, tmp_path_factory) -> Checkout:
    """A fresh clone that has pulled from a local DVC remote with ``make pull``."""
    folder = tmp_path_factory.mktemp("clone")
    smoke("dvc", "remote", "add", "--quiet", "--default", "local", str(folder / "remote"))
    commit(smoke)
    smoke("dvc", "push", "--quiet")
    smoke("git", "clone", "--quiet", str(smoke.folder), str(folder / "a clone"))
    clone = Checkout(folder / "a clone")
    pull(clone)
    return clone


def pull(checkout: Checkout, check: bool = True) -> subprocess.CompletedProcess:
    """``make pull`` in the environment of the tests instead of one of its own."""
    return checkout("make", "-o", "environment", "pull", check=check)


def test_a_clone_that_has_pulled_has_nothing_to_do(clone):
    assert clone.planned() == {}
    assert json.loads(clone("dvc", "status", "--json").stdout) == {}
    assert clone("git", "status", "--porcelain").stdout == ""


def test_a_changed_parameter_reruns_the_same_stages_in_snakemake_and_dvc(clone):
    change = ("config/digits.yaml", "unlearn: {step_size: 2.0e-4", "unlearn: {step_size: 3.0e-4")
    with edited(clone, *change):
        stages = {STAGE_OF.get(rule, rule) for rule in clone.planned()}
        changed = set(json.loads(clone("dvc", "status", "--json").stdout))
    assert changed <= stages
    assert stages == downstream(changed)


def downstream(changed: set[str]) -> set[str]:
    """Stages of dvc.yaml that read, directly or not, what the changed ones write."""
    reached = set(changed)
    for stage, entry in STAGES.items():  # in the order of the pipeline
        written = [path for done in reached for path in STAGES[done].get("outs", [])]
        folders = [path if isinstance(path, str) else next(iter(path)) for path in written]
        if any(Path(dep).is_relative_to(folder) for dep in entry["deps"] for folder in folders):
            reached.add(stage)
    return reached


def test_pull_refuses_what_the_lock_does_not_describe(clone, tmp_path):
    damaged = Checkout(tmp_path / "damaged")
    clone("git", "clone", "--quiet", str(clone.folder), str(damaged.folder))
    lock = damaged.folder / "dvc.lock"
    content = yaml.safe_load(lock.read_text(encoding="utf-8"))
    content["stages"]["train"]["params"]["config/digits.yaml"]["train"]["steps"] = 61
    lock.write_text(yaml.safe_dump(content), encoding="utf-8")
    shutil.copy(clone.folder / ".dvc/config", damaged.folder / ".dvc/config")
    refused = pull(damaged, check=False)
    assert refused.returncode != 0
    assert "nothing was marked as up to date" in refused.stderr
    assert not (damaged.folder / ".snakemake/metadata").exists()
