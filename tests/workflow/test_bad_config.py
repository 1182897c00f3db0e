"""What cannot work stops before any job, with one sentence that names the key."""

import re

import pytest

from .conftest import ROOT

SMOKE = (ROOT / "config/smoke.yaml").read_text(encoding="utf-8")

MISTAKES = {
    "a typo in a section": ("scan:", "scann:", ["scann"]),
    "a typo in a key": ("max_images: 300", "max_image: 300", ["encode.max_image"]),
    "an impossible value": ("sampler_steps: 5", "sampler_steps: 0", ["synthesize.sampler_steps"]),
    "K not below N": ("k: [20]", "k: [300]", ["retrain.k", "300"]),
    "K not below what the pools leave": (
        SMOKE,
        SMOKE.replace("max_images: 300", "factor: 2").replace("k: [20]", "k: [4730]"),
        ["retrain.k", "out of 4730"],
    ),
    "a factor that does not divide": ("max_images: 300", "factor: 3", ["encode.factor", "16x16"]),
    "pools of all captions": ("dataset: digits", "tuning_captions: 1998", ["prepare.tuning_captions", "2058 distinct"]),
    "a seed too long for the generator": ("dataset: digits", f"seed: {2**128}", ["prepare.seed"]),
    "an unknown method": ("trak: {", "traks: {", ["score.methods.traks"]),
    "an unknown variant": ("unlearn: {step_size", "forget: {step_size", ["score.methods.unlearn", "forget"]),
    "an unknown pool": ("pool: report", "pool: reports", ["pool"]),
    "more queries than captions": ("count: 2", "count: 2000", ["synthesize.queries", "report"]),
}


def test_numbers_that_yaml_takes_for_text_are_numbers(checkout):
    assert "step_size: " in SMOKE
    changed = re.sub(r"step_size: [0-9.e-]+", "step_size: 8e-5", SMOKE)
    (checkout.folder / "smoke-text.yaml").write_text(changed, encoding="utf-8")
    assert "Job stats" in checkout("snakemake", "-n", "--configfile", "smoke-text.yaml").stdout


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_any_job(checkout, mistake):
    old, new, named = MISTAKES[mistake]
    assert old in SMOKE
    (checkout.folder / "bad.yaml").write_text(SMOKE.replace(old, new), encoding="utf-8")
    refused = checkout("snakemake", "-n", "--configfile", "bad.yaml", check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    sentence = refused.stderr.strip().splitlines()[-1]
    assert all(word in sentence for word in named), refused.stderr
    assert "Job stats" not in refused.stdout


def test_values_on_the_command_line_are_refused_because_jobs_would_not_see_them(checkout):
    refused = checkout("snakemake", "-n", "--configfile", "config/smoke.yaml", "--config", "seed=1", check=False)
    assert refused.returncode == 1
    assert "config/smoke.yaml" in refused.stderr.strip().splitlines()[-1]
