"""One small experiment run for real, and what a changed, killed or cloned one does afterwards.

The smoke experiment takes the place of ``digits`` in a checkout, so that dvc.yaml applies to it. All
tests share that one run; those that change something plan it only, or work in a copy. Over SSH, data and results go
through a server on this machine's loopback interface, where FORGETRACE_TEST_SSH=1 says so.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from . import loopback
from .conftest import REPRODUCE, Checkout, clone_of, copy_of, edited, layout_of, pull, wait_for
from .test_dvc_stages import STAGE_OF, STAGES

pytestmark = pytest.mark.slow

AFTER_UNLEARN = {
    "unlearn", "regenerate_unlearned", "scan", "score", "figure_attribution", "retrain", "retrain_pool", "evaluate",
    "figure_counterfactual", "figure_delta", "figure_lds", "figure_unlearning",
}  # fmt: skip


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
    variants, judged, together = len(config.unlearn), len(config.retrain.methods), 1
    assert planned == {
        "synthesize": 1,
        "unlearn": variants,
        "regenerate_unlearned": variants,  # of all queries together
        "scan": variants,
        "score": len(config.score.methods) - together,
        # One job for all queries, which keeps the scores that are there; grids show all methods.
        "score_together": together,
        "figure_attribution": len(config.queries()),
        "retrain": judged,
        "measure": 1,
        "figure_counterfactual": 1,
        # Models of halves and pools are asked about every query; their weights are not kept.
        "retrain_half": config.retrain.subsets * config.retrain.subset_seeds,
        "retrain_pool": len(config.score.methods) * config.retrain.pools,
        "evaluate": 1,
        "figure_delta": 1,
        "figure_lds": 1,
        "figure_unlearning": 1,
    }


def test_another_experiment_finds_the_data_prepared(smoke):
    shutil.copy(smoke.folder / "config/digits.yaml", smoke.folder / "config/other.yaml")
    assert smoke.planned("all_encode", "--configfile", "config/other.yaml").keys() == {"encode", "all_encode"}
    (smoke.folder / "config/other.yaml").unlink()


def test_a_docstring_reruns_nothing(smoke):
    with edited(smoke, "src/forgetrace/unlearning/step.py", '"""', '"""In other words: '):
        assert smoke.planned() == {}


def test_a_raised_version_reruns_its_stage(smoke):
    with edited(smoke, "workflow/versions.yaml", "figures: ", "figures: 1"):
        assert {rule.partition("_")[0] for rule in smoke.planned()} == {"figure"}


# A key by what it stands in front of, its new value, and the first rules that run again.
RERUN = {
    "encode": ("encode", {"max_images": 299}, {"encode"}),
    "train": ("train", {"learning_rate": 1e-3}, {"train", "retrain_shared"}),
    "synthesize": ("synthesize", {"guidance": 2.0}, {"synthesize"}),
    "fit": ("fit", {"draws": 201}, {"fit"}),
    "scan": ("scan", {"timesteps": 5}, {"scan_base", "scan"}),
    "method": ("score", {"methods": {"trak": {"damping": 2.0}}}, {"score_together"}),
    "measure": ("evaluate", {"draws": 2}, {"measure", "retrain", "retrain_half", "retrain_pool"}),
    "evaluate": ("evaluate", {"bootstrap": 201}, {"evaluate"}),
    "figures": ("figures", {"top": 5}, {"figure_attribution"}),
    "how": ("scan", {"batch_size": 7}, set()),
}


@pytest.mark.parametrize("change", RERUN)
def test_a_key_reruns_what_hangs_on_it(smoke, change):
    section, values, first = RERUN[change]
    before = (smoke.folder / "config/digits.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(before)
    merge(config[section], values)
    with edited(smoke, "config/digits.yaml", before, yaml.safe_dump(config, sort_keys=False)):
        planned = smoke("snakemake", "-n", "--cores", "1").stdout
    assert rules_changed(planned) == first
    assert first or not re.search(r"^rule ", planned, flags=re.MULTILINE)  # for no other reason either


def merge(into: dict, values: dict) -> None:
    """Set values in nested sections."""
    for key, value in values.items():
        if isinstance(value, dict):
            merge(into[key], value)
        else:
            into[key] = value


def rules_changed(planned: str) -> set[str]:
    """Rules of which a job runs for its own sake and not because an input does."""
    jobs = re.findall(r"^rule (\w+):\n(.*?)(?=^rule|^\[|\Z)", planned, flags=re.MULTILINE | re.DOTALL)
    return {rule for rule, job in jobs if re.search(r"reason: .*Params have changed", job)}


def test_shards_leave_the_same_scans_and_nothing_else(smoke, tmp_path):
    checkout = copy_of(smoke, tmp_path)
    shrink(checkout)
    layout = layout_of(checkout)
    scans = [checkout.folder / path for path in (layout.base_scan, layout.scan("unlearn", "report-00"))]
    whole = [path.read_bytes() for path in scans]
    for path in scans:
        path.unlink()
    checkout.edit("config/digits.yaml", "scan:\n", "scan:\n  shards: 2\n")
    checkout("snakemake", "--cores", "2", "all_scan")
    assert [path.read_bytes() for path in scans] == whole
    assert (checkout.folder / layout.timing("scan", "base", "shard-1")).exists()
    assert not list((checkout.folder / layout.checkpoints("scan")).rglob("*.npz"))
    assert checkout.planned("all_scan") == {}


@dataclass
class Story:
    """What an experiment went through, and what was seen on the way.

    Attributes:
        checkout: where it happened; complete in the end.
        finished: files that were finished at a kill, with their time of modification in ns.
        logs: what the killed trainings said when they ran again.
        first, second: exit status and standard error of two runs started at once in the end.
    """

    checkout: Checkout
    finished: dict[Path, int]
    logs: list[str]
    first: tuple[int, str]
    second: tuple[int, str]


@pytest.fixture(scope="module")
def story(smoke, tmp_path_factory) -> Story:
    """Killed in the training, killed in a retraining, then started twice at once; by ``make reproduce``."""
    checkout = copy_of(smoke, tmp_path_factory.mktemp("killed"))
    shrink(checkout)
    layout = layout_of(checkout)
    # Data, encoded images and shared retrainings stay: they are finished from the start.
    for stage in ("train", "synthesize", "fit", "unlearn", "scan", "score", "retrain/measures", "evaluate", "figures"):
        shutil.rmtree(checkout.folder / layout.root / stage)
    finished = kill_during(checkout, "base")
    finished |= kill_during(checkout, "unlearn-k20-report-00")
    runs = [checkout.start(*REPRODUCE, stderr=subprocess.PIPE) for _ in range(2)]
    ended = [(run.communicate()[1], run.returncode)[::-1] for run in runs]
    logs = [checkout.folder / "logs/digits" / name for name in ("train/train.log", "retrain/unlearn/k20/report-00.log")]
    return Story(checkout, finished, [log.read_text(encoding="utf-8") for log in logs], *sorted(ended))


def shrink(checkout: Checkout) -> None:
    """Reduce the experiment to one query and one method; what is left has the same results."""
    path = checkout.folder / "config/digits.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["synthesize"]["queries"][0]["count"] = 1
    config["retrain"]["methods"] = ["unlearn"]
    for section, key in (
        ("retrain", "subsets"),
        ("retrain", "subset_seeds"),
        ("retrain", "pools"),
        ("retrain", "pooled_k"),
        ("evaluate", "others"),
    ):
        del config[section][key]
    for methods in (config["unlearn"], config["score"]["methods"]):
        for name in set(methods) - {"unlearn"}:
            del methods[name]
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


def kill_during(checkout: Checkout, training: str) -> dict[Path, int]:
    """Kill a run at a random moment after the training's first checkpoint; the files that were finished by then."""
    checkpoint = checkout.folder / layout_of(checkout).checkpoints(training) / "last.pt"
    run = checkout.start(*REPRODUCE)
    try:
        wait_for(lambda: checkpoint.exists() or run.poll() is not None)
        time.sleep(random.uniform(0, 0.3))
    finally:
        if run.poll() is None:
            # The whole group, as when the machine dies: jobs do not outlive their Snakemake.
            os.killpg(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL, "it ended by itself"
    wait_for(lambda: not group_lives(run.pid))  # the rest of the group goes one by one
    # Snakemake names the outputs of running jobs by a file each.
    running = [urlsafe_b64decode(path.name).decode() for path in (checkout.folder / ".snakemake/incomplete").iterdir()]
    assert any(path.startswith(("results/digits/train", "results/digits/retrain")) for path in running)
    files = {path for folder in ("data", "results") for path in (checkout.folder / folder).rglob("*") if path.is_file()}
    files -= {checkout.folder / path for path in running}
    return {
        path: path.stat().st_mtime_ns for path in files if "checkpoints" not in path.parts and path.suffix != ".partial"
    }


def group_lives(group: int) -> bool:
    """Whether any process of a group is left; one that has ended and waits to be looked at does not count."""
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except ProcessLookupError:
            continue
    return False


def test_a_killed_run_ends_with_the_same_scores_and_measures(smoke, story):
    layout = layout_of(story.checkout)
    score = layout.score("unlearn", "report-00")
    pd.testing.assert_frame_equal(*(pd.read_parquet(checkout.folder / score) for checkout in (smoke, story.checkout)))
    models = layout.measured_models("report-00")
    assert len(models) == 5
    for path in (path for model in models for path in layout.measure(*model, "report-00").values()):
        assert (smoke.folder / path).read_bytes() == (story.checkout.folder / path).read_bytes(), path


def test_a_killed_run_does_nothing_again_that_was_finished(story):
    layout, names = layout_of(story.checkout), {str(path) for path in story.finished}
    for path in (layout.latents, layout.weights, layout.base_scan, layout.score("unlearn", "report-00")):
        assert str(story.checkout.folder / path) in names
    again = [path for path, modified in story.finished.items() if path.stat().st_mtime_ns != modified]
    assert again == []
    assert all("Resuming the training" in log for log in story.logs)


def test_of_two_runs_at_once_one_ends_well_and_the_other_refuses(story):
    (status, said), (refused, sentence) = story.first, story.second
    assert status == 0, said
    assert "A killed run left its lock: removing it" in said
    assert refused != 0
    sentence, makes = sentence.splitlines()
    assert re.fullmatch(r"Another run is alive in this folder \(process \d+\): wait for it, or end it .*", sentence)
    assert makes.startswith("make: ***")
    assert list((story.checkout.folder / ".snakemake").glob("locks/*")) == []
    assert story.checkout.planned() == {}


def ordinary(*command: str) -> tuple[str, ...]:
    """The command as run by someone whom the modes of files bind.

    Root without the capabilities that override them: another user could not read an interpreter in /root.
    """
    if os.geteuid() != 0:
        return command
    if not shutil.which("setpriv"):
        pytest.skip("root, and no setpriv to become an ordinary user")
    return "setpriv", "--bounding-set=-dac_override,-dac_read_search", *command


@contextmanager
def read_only(folder: Path):
    """A folder in which nothing can be made or removed, for the length of a block."""
    folder.chmod(0o555)
    try:
        yield
    finally:
        folder.chmod(0o755)


def contents(checkout: Checkout) -> dict[Path, bytes]:
    """Every file of data and results."""
    files = (path for name in ("data", "results") for path in (checkout.folder / name).rglob("*"))
    return {path: path.read_bytes() for path in files if path.is_file()}


def test_read_only_results_are_named_before_any_job(checkout):
    results = checkout.folder / "results"
    results.mkdir()
    before = contents(checkout)
    with read_only(results):
        refused = checkout(*ordinary(*REPRODUCE), check=False)
    assert refused.returncode != 0
    sentence, makes = refused.stderr.splitlines()
    assert sentence == (
        f"No permission to write to {results}: check its owner and mode "
        "(`sudo chown -R $USER .` after a run as root), then run again."
    )
    assert makes.startswith("make: ***")
    assert contents(checkout) == before
    results.rmdir()


def test_a_read_only_stage_is_one_sentence_and_nothing_is_damaged(smoke, tmp_path):
    checkout = copy_of(smoke, tmp_path)
    layout = layout_of(checkout)
    figures = checkout.folder / layout.root / "figures"
    for suffix in ("png", "pdf"):
        (checkout.folder / layout.figure("training", suffix)).unlink()
    before = contents(checkout)
    with read_only(figures):
        refused = checkout(*ordinary(*REPRODUCE), check=False)
    assert refused.returncode != 0
    assert "Traceback" not in refused.stderr
    said = [line for line in refused.stderr.splitlines() if line.startswith("forgetrace: ")]
    assert said == [
        f"forgetrace: Cannot write {layout.figure('training')}: no permission to write there; "
        "check the folder's owner and mode, then run again."
    ]
    assert contents(checkout) == before
    checkout(*ordinary(*REPRODUCE))
    assert contents(checkout).keys() - before.keys() == {figures / "training.png", figures / "training.pdf"}


def test_a_changed_parameter_reruns_the_same_stages_in_snakemake_and_dvc(clone):
    change = ("config/digits.yaml", "unlearn: {step_size: 2.0e-4", "unlearn: {step_size: 3.0e-4")
    with edited(clone, *change):
        stages = {STAGE_OF.get(rule, rule) for rule in clone.planned()}
        changed = set(json.loads(clone("dvc", "status", "--json").stdout))
    changed.discard("fit")  # looks whether anything must be fitted whenever a variant or method changes
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


# DVC remotes, in a folder and over SSH, and parameters that DVC changes


@pytest.fixture(scope="session")
def clone_over_ssh(smoke, tmp_path_factory) -> Iterator[Checkout]:
    """The same over SSH, by a name of the user's own SSH configuration."""
    if os.environ.get("FORGETRACE_TEST_SSH") != "1":
        pytest.skip("starts an SSH server of its own: FORGETRACE_TEST_SSH=1")
    folder = tmp_path_factory.mktemp("ssh")
    ours = copy_of(smoke, folder)
    ours("dvc", "remote", "remove", "store", check=False)
    ours.environment["HOME"] = str(folder)
    with loopback.ssh(folder) as host:
        yield clone_of(ours, folder, f"ssh://{host}{folder}/remote")


@pytest.mark.parametrize("remote", ["clone", "clone_over_ssh"])
def test_a_clone_has_the_data_and_the_model_and_nothing_to_do(smoke, request, remote):
    ours, clone = smoke, request.getfixturevalue(remote)
    layout = layout_of(ours)
    for path in (layout.metadata, layout.weights, *layout.snapshots, layout.base_scan):
        assert (clone.folder / path).read_bytes() == (ours.folder / path).read_bytes(), path
    assert clone.planned() == {}
    assert json.loads(clone("dvc", "status", "--json").stdout) == {}
    assert clone("git", "status", "--porcelain").stdout == ""


def test_an_experiment_of_dvc_changes_a_parameter_and_is_compared(smoke, tmp_path):
    checkout = copy_of(smoke, tmp_path)
    table = checkout.folder / layout_of(checkout).table("counterfactual")
    made = table.stat().st_mtime_ns
    checkout("dvc", "exp", "run", "--name", "fewer", "-S", "config/digits.yaml:evaluate.bootstrap=100")
    config = yaml.safe_load((checkout.folder / "config/digits.yaml").read_text(encoding="utf-8"))
    assert config["evaluate"]["bootstrap"] == 100
    assert table.stat().st_mtime_ns > made
    assert checkout.planned() == {}
    _, commit, *_ = json.loads(checkout("dvc", "exp", "show", "--json").stdout)
    (fewer,) = (row for experiment in commit["experiments"] for row in experiment["revs"])
    assert fewer["name"] == "fewer"
    assert [bootstrap(row) for row in (commit, fewer)] == [200, 100]


def bootstrap(row: dict) -> int:
    """A parameter as a row of ``dvc exp show`` has it."""
    return row["data"]["params"]["config/digits.yaml"]["data"]["evaluate"]["bootstrap"]


def test_garbage_collection_keeps_what_the_workspace_and_commits_need(smoke, tmp_path):
    checkout = copy_of(smoke, tmp_path)
    layout = layout_of(checkout)
    stray = checkout.folder / ".dvc/cache/files/md5/00/0123456789abcdef0123456789abcd"
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("of a result that no commit names")
    checkout("dvc", "gc", "--workspace", "--all-commits", "--force")
    assert not stray.exists()
    shutil.rmtree(checkout.folder / layout.model)
    checkout("dvc", "checkout", "--quiet", "train")
    assert (checkout.folder / layout.weights).exists()
