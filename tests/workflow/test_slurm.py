"""The Slurm profile: what it says of every rule, and a small experiment through a real Slurm.

The second part starts Slurm's daemons on this machine, as root, and runs where FORGETRACE_TEST_SLURM=1 says so.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from forgetrace.layout import Layout, load_layout

from . import loopback
from .conftest import REPRODUCE, ROOT, Checkout, layout_of, wait_for

PROFILE = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text(encoding="utf-8"))
RULE = re.compile(r"^ *(?:use rule (\w+) as|rule) (\w+)\b", re.MULTILINE)


def rules() -> dict[str, bool]:
    """Every rule that runs a command, and whether it asks for an accelerator."""
    found: dict[str, bool] = {}
    for file in sorted((ROOT / "workflow/rules").glob("*.smk")):
        parts = RULE.split(file.read_text(encoding="utf-8"))[1:]
        for parent, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            if not name.startswith("all_"):
                found[name] = "gpu=" in body or found.get(parent, False)
    return found


def test_the_profile_names_every_rule_and_puts_those_with_a_gpu_on_its_partition():
    named = PROFILE["set-resources"]
    assert set(named) == set(rules())
    assert {rule for rule, sizes in named.items() if sizes.get("slurm_partition") == "gpu"} == {
        rule for rule, gpu in rules().items() if gpu
    }


def test_every_retry_gets_more_memory():
    assert PROFILE["retries"] > 0
    assert all(re.fullmatch(r"\d+ \* attempt", sizes["mem_mb"]) for sizes in PROFILE["set-resources"].values())


def test_groups_and_arrays_are_of_rules_that_exist_and_a_group_stays_on_its_partition():
    arrays = PROFILE["slurm-array-jobs"].split(",")
    assert {*arrays, *PROFILE["groups"]} <= set(rules())
    assert not set(arrays).intersection(PROFILE["groups"]), "the plugin submits groups as ordinary jobs"
    for rule in PROFILE["groups"]:
        sizes = PROFILE["set-resources"][rule]
        assert "slurm_partition" not in sizes, "partitions are text, which must be the same for a whole group"
        assert sizes["turn"] == PROFILE["resources"]["turn"] == 1, "else a dozen jobs ask for a dozen cores"


def jobs_of(layout: Layout) -> int:
    """How many jobs an experiment has, but for the few that are there once, such as training θ0."""
    config, queries = layout.config, layout.config.queries()
    models = {*layout.half_models(), *layout.pooled_models()}
    models |= {model for query in queries for model in layout.measured_models(query)}
    # A variant's step and its scan, whole and in shards; generating and measuring a query.
    of_query = len(config.unlearn) * (2 + config.scan.shards) + len(config.score.methods) + 2
    return len(models) + len(queries) * of_query


def test_no_array_can_outgrow_what_is_submitted_at_once(checkout):
    """The plugin (2.8.0) forgets jobs of an array rule that are handed to it while more of that rule must wait."""
    at_once = min(PROFILE["jobs"], int(PROFILE["max-jobs-per-timespan"].partition("/")[0]))
    for config in (ROOT / "config").glob("*.yaml"):
        assert jobs_of(load_layout(config)) < at_once
    limits = yaml.safe_load((ROOT / "profiles/default/config.yaml").read_text(encoding="utf-8"))
    assert not {"jobs", "max-jobs-per-timespan"}.intersection(limits), "it would win over the cluster's profile"


@dataclass
class Story:
    """What an experiment went through on the cluster, and what was seen on the way.

    Attributes:
        checkout: where it happened; complete in the end.
        finished: files that were finished at the kill, with their time of modification in ns.
        refused: what a run said that was started while the killed one's jobs were in the queue.
        resumed: exit status and standard error of the run after that.
        jobs: Slurm's account of every job, in the order they were submitted.
        by_dvc: standard output of ``dvc repro`` after evaluation had been deleted, and Slurm's jobs of it.
        left: what both tools would do in the end.
    """

    checkout: Checkout
    finished: dict[Path, int] = field(default_factory=dict)
    refused: str = ""
    resumed: tuple[int, str] = (0, "")
    jobs: list[dict[str, str]] = field(default_factory=list)
    by_dvc: tuple[str, list[dict[str, str]]] = ("", [])
    left: tuple[dict, str] = ({}, "")


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    """Killed, resumed with a failing and a cancelled job, evaluated again by DVC; all of it on Slurm."""
    if os.environ.get("FORGETRACE_TEST_SLURM") != "1":
        pytest.skip("starts a Slurm of its own: FORGETRACE_TEST_SLURM=1")
    if len(sys.executable.split()) > 1:
        pytest.skip("Snakemake's Slurm jobs cannot start an interpreter whose path has a space")
    checkout = Checkout.create(tmp_path_factory.mktemp("slurm") / "a run")
    shutil.copy(ROOT / "tests/workflow/mini.yaml", checkout.folder / "config/digits.yaml")
    checkout.edit("profiles/slurm/config.yaml", "latency-wait: 60 ", "latency-wait: 5 ")  # files are local here
    checkout.environment["SNAKEMAKE_PROFILE"] = "profiles/slurm"
    story, layout = Story(checkout), layout_of(checkout)
    with loopback.slurm():
        kill_during_trainings(story, layout)
        resume_with_accidents(story, layout)
        repeat_evaluation_by_dvc(story)
        story.left = checkout.planned(), checkout("dvc", "status", "--json").stdout
    return story


def kill_during_trainings(story: Story, layout: Layout) -> None:
    """Kill Snakemake while trainings run; they go on, and nothing starts beside them."""
    run = story.checkout.start(*REPRODUCE, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: "rule_retrain_shared" in loopback.queue() or run.poll() is not None)
        wait_for(lambda: "RUNNING" in loopback.queue() or run.poll() is not None)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        said = run.communicate()[1]
        assert run.returncode == -signal.SIGKILL, f"it ended by itself: {said}"
    for path in (layout.metadata, layout.latents, layout.index):
        story.finished[story.checkout.folder / path] = (story.checkout.folder / path).stat().st_mtime_ns
    story.refused = story.checkout(*REPRODUCE, check=False).stderr
    wait_for(lambda: not loopback.queue())


def resume_with_accidents(story: Story, layout: Layout) -> None:
    """Run to the end, past a job that fails the first time and one that is cancelled."""
    failing = story.checkout.folder / "fails once"
    failing.mkdir()
    real = shutil.which("forgetrace", path=story.checkout.environment["PATH"])
    (failing / "forgetrace").write_text(
        f'#!/bin/sh\n[ "$1" = synthesize ] && mkdir "{failing}/failed" 2> /dev/null && exit 137\nexec "{real}" "$@"\n'
    )
    (failing / "forgetrace").chmod(0o755)
    path = story.checkout.environment["PATH"]
    story.checkout.environment["PATH"] = f"{failing}:{path}"
    run = story.checkout.start(*REPRODUCE, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: running("rule_unlearn") or run.poll() is not None)
        subprocess.run(["scancel", *running("rule_unlearn")], check=True)
        said = run.communicate(timeout=600)[1]
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    story.resumed, story.jobs = (run.returncode, said), accounts()
    story.checkout.environment["PATH"] = path


def running(comment: str) -> list[str]:
    """Ids of the jobs that run with a comment that starts like this: Snakemake names the rule there."""
    lines = (line.split() for line in loopback.queue().splitlines())
    return [words[0] for words in lines if words[2] == "RUNNING" and words[3].startswith(comment)]


def repeat_evaluation_by_dvc(story: Story) -> None:
    """Put what is there under DVC, delete the tables and let DVC make them."""
    checkout, known = story.checkout, {job["JobId"] for job in accounts()}
    checkout("git", "init", "--quiet")
    checkout("dvc", "add", "--quiet", "data")
    checkout("dvc", "commit", "--quiet", "--force")
    shutil.rmtree(checkout.folder / "results/digits/evaluate")
    said = checkout("dvc", "repro").stdout
    story.by_dvc = said, [job for job in accounts() if job["JobId"] not in known]


def accounts() -> list[dict[str, str]]:
    """Slurm's account of every job since its start."""
    lines = loopback.printed("scontrol", "show", "job", "--oneliner").splitlines()
    return sorted((dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines), key=lambda job: int(job["JobId"]))


def states(story: Story, rule: str) -> list[str]:
    return [job["JobState"] for job in story.jobs if job["Comment"].startswith(rule)]


def test_a_killed_run_resumes_once_its_jobs_have_ended(story):
    assert re.search(r"Another run is alive in this folder|Slurm still has jobs of a run in this folder", story.refused)
    status, said = story.resumed
    assert status == 0, said
    assert "A killed run left its lock: removing it" in said
    assert [path for path, modified in story.finished.items() if path.stat().st_mtime_ns != modified] == []
    assert states(story, "rule_encode") == ["COMPLETED"]


def test_a_failed_job_is_submitted_again_with_more_memory(story):
    jobs = [job for job in story.jobs if job["Comment"].startswith("rule_synthesize")]
    assert [job["JobState"] for job in jobs] == ["FAILED", "COMPLETED"]
    assert [job["MinMemoryNode"] for job in jobs] == ["2000M", "4000M"]


def test_a_cancelled_job_is_submitted_again(story):
    assert states(story, "rule_unlearn") == ["CANCELLED", "COMPLETED"]


def test_retrainings_are_arrays_and_tiny_jobs_share_one(story):
    arrays = [job for job in story.jobs if job["Comment"].startswith("rule_retrain_shared")]
    assert all(job.get("ArrayTaskId") in ("1", "2") for job in arrays)
    scores = [job for job in story.jobs if job["Comment"].startswith("rule_scores")]
    assert [(job["JobState"], job["NumCPUs"], job["MinMemoryNode"]) for job in scores] == [("COMPLETED", "1", "2000M")]
    assert len([job for job in story.jobs if job["Comment"].startswith("rule_results_evaluate_figure")]) == 1


def test_models_run_with_a_gpu_on_its_partition_and_nothing_else_does(story):
    assert {job["Partition"] for job in story.jobs} == {"cpu", "gpu"}
    for job in story.jobs:
        cpu = job["Comment"].startswith(("rule_prepare", "rule_encode", "rule_scores", "rule_grids", "rule_results"))
        if not job["Comment"].startswith("rule_figure"):
            assert job["Partition"] == ("cpu" if cpu else "gpu"), job["Comment"]
        assert (job.get("TresPerJob") == "gres:gpu:1") == (job["Partition"] == "gpu"), job["Comment"]


def test_dvc_runs_its_stages_on_the_cluster(story):
    said, jobs = story.by_dvc
    assert "Running stage 'evaluate'" in said
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    assert any("evaluate" in job["Comment"] for job in jobs)


def test_neither_tool_has_anything_left_to_do(story):
    planned, status = story.left
    assert planned == {}
    assert json.loads(status) == {}


def test_a_slurm_that_is_not_ours_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loopback, "CONFIGURATION", tmp_path)
    monkeypatch.setattr(loopback, "refuse_unless_ready", lambda *programs: None)
    for content, reason in (("ClusterName=theirs\n", "has a Slurm of its own"), (loopback.MARK, "of a test that runs")):
        (tmp_path / "slurm.conf").write_text(content)
        with pytest.raises(loopback.Refused, match=reason), loopback.slurm():
            pass
        assert (tmp_path / "slurm.conf").read_text() == content
