"""dvc.yaml is written by hand; Snakemake's own account of the DAG says whether it is right."""

from pathlib import PurePosixPath

import pytest
import yaml

from .conftest import ROOT

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
STAGE_OF = {
    "fit_ekfac": "fit",
    "fit_features": "fit",
    "regenerate_unlearned": "unlearn",
    "scan_base": "scan",
    "score_together": "score",
    "retrain_shared": "retrain",
    "retrain_own_image": "retrain",
    "retrain_half": "retrain",
    "retrain_pool": "retrain",
    "retrain_together": "retrain",
    "retrain_shared_together": "retrain",
    "retrain_half_together": "retrain",
    "retrain_pools_together": "retrain",
    "measure": "retrain",
    "measure_own_image": "retrain",
    "figure_training": "figures",
    "figure_attribution": "figures",
    "figure_counterfactual": "figures",
    "figure_delta": "figures",
    "figure_lds": "figures",
    "figure_unlearning": "figures",
}
# What other methods would read.
SPARE = {"score": {"results/digits/fit"}}


@pytest.fixture(scope="module")
def jobs(checkout) -> dict[str, dict[str, set[str]]]:
    """Files every stage's jobs read and write, its own intermediate files left out.

    Read from a dry run where nothing exists: ``--detailed-summary`` knows the inputs only of what ran.
    """
    files: dict[str, dict[str, set[str]]] = {}
    for line in checkout("snakemake", "-n").stdout.splitlines():
        kind, _, value = line.strip().partition(": ")
        if line.startswith("rule "):
            rule = line.removeprefix("rule ").rstrip(":")
            stage = files.setdefault(STAGE_OF.get(rule, rule), {"deps": set(), "outs": set()})
        elif kind in ("input", "output"):
            # An output marked update() is printed with a remark.
            paths = {path.removesuffix(" (update)") for path in value.split(", ")}
            stage["deps" if kind == "input" else "outs"] |= paths
    del files["all"]
    for stage in files.values():
        stage["deps"] -= stage["outs"]
    return files


def declared(stage: str, kind: str) -> list[str]:
    entries = STAGES[stage].get(kind, []) + (STAGES[stage].get("metrics", []) if kind == "outs" else [])
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def covers(folder: str, file: str) -> bool:
    return PurePosixPath(file).is_relative_to(folder)


def test_dvc_has_the_stages_of_the_dag(jobs):
    assert set(jobs) == {"prepare", *STAGES}
    assert all(STAGES[stage]["cmd"] == f"snakemake all_{stage}" for stage in STAGES)


@pytest.mark.parametrize("kind", ["deps", "outs"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_what_its_jobs_read_and_write(jobs, stage, kind):
    paths = declared(stage, kind)
    undeclared = {file for file in jobs[stage][kind] if not any(covers(path, file) for path in paths)}
    unused = {path for path in paths if not any(covers(path, file) for file in jobs[stage][kind])}
    assert not undeclared
    assert unused <= SPARE.get(stage, set())


def test_the_data_are_tracked_as_a_whole(jobs):
    assert all(covers("data", file) for file in jobs["prepare"]["outs"])


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_stands_in_its_file(stage):
    # A key that only has its default would make DVC hold the stage as changed for ever.
    for entry in STAGES[stage]["params"]:
        (file, keys), *_ = entry.items()
        content = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
        assert not [key for key in keys if key not in content], file


@pytest.mark.parametrize("stage", STAGES)
def test_no_data_or_weights_go_to_git(stage):
    small = ("results/digits/retrain/measures", "results/digits/evaluate", "results/digits/figures")
    for entry in STAGES[stage]["outs"]:
        (path, options), *_ = entry.items()
        assert options["persist"]
        assert (options.get("cache") is False) == any(covers(folder, path) for folder in small)


@pytest.mark.parametrize("stage", STAGES)
def test_the_committed_results_are_those_of_the_committed_config(stage):
    locked = yaml.safe_load((ROOT / "dvc.lock").read_text(encoding="utf-8"))["stages"][stage]
    for entry in STAGES[stage]["params"]:
        (file, keys), *_ = entry.items()
        content = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
        assert {key: content[key] for key in keys} == locked["params"][file]
