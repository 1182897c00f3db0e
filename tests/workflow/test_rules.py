import shutil

import pytest
import yaml
import yte

from forgetrace.attribution import registry
from forgetrace.layout import load_layout

from ..datasets.pictures import write_folder
from .conftest import ROOT

# Those of the repository; one's own data are not in a copy of it.
EXPERIMENTS = sorted(
    path.stem for path in (ROOT / "config").glob("*.yaml") if load_layout(path).config.prepare.path is None
)
STAGES = (
    "encode",
    "train",
    "synthesize",
    "fit",
    "unlearn",
    "scan",
    "score",
    "retrain",
    "evaluate",
    "figures",
)


def test_the_workflow_follows_snakemakes_own_advice(checkout):
    checkout("snakemake", "--lint", "--configfile", "config/smoke.yaml")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_can_be_planned(checkout, experiment):
    layout = load_layout(ROOT / "config" / f"{experiment}.yaml")
    config, asked = layout.config, len(layout.config.judged_queries())
    queries, judged = len(config.queries()), len(set(config.retrain.methods) - {"random"})
    shared = max(len(layout.shared_models()) - 1, 0)
    if config.leaves_out:
        assert shared == len(config.retrain.k) * config.retrain.random_draws + config.retrain.seeds
    planned = checkout.planned("--configfile", f"config/{experiment}.yaml")
    assert planned["prepare"] == planned["encode"] == planned["train"] == planned["evaluate"] == 1
    together = len(registry.together(layout))
    assert planned.get("score", 0) == queries * (len(config.score.methods) - together)
    assert planned.get("score_together", 0) == (together if queries else 0)
    counts = {"retrain_shared": shared, "retrain": asked * judged * len(config.retrain.k)}
    counts |= {"retrain_half": len(layout.half_models()), "retrain_pool": len(layout.pooled_models())}
    if config.retrain.stack > 1:
        counts = {"retrain_shared_together": shared > 0, "retrain_together": judged}
        counts |= {
            "retrain_half_together": config.retrain.subsets > 0,
            "retrain_pools_together": config.retrain.pools > 0,
        }
    assert {rule: count for rule, count in planned.items() if rule.startswith("retrain")} == {
        rule: count for rule, count in counts.items() if count
    }


def test_the_default_experiment_is_digits(checkout):
    assert "results/digits/" in checkout("snakemake", "-n", "all_train").stdout


def test_other_settings_of_the_data_plan_a_folder_of_their_own(checkout):
    """So that no experiment's data are rewritten, and made invalid, by another experiment."""
    config = (ROOT / "config/smoke.yaml").read_text(encoding="utf-8")
    (checkout.folder / "other.yaml").write_text(config.replace("dataset: digits", "seed: 1"))
    planned = checkout("snakemake", "-n", "prepare", "encode", "--configfile", "other.yaml").stdout
    assert "data/digits-seed-1/metadata.jsonl" in planned
    assert "data/digits/" not in planned


def test_every_stage_has_a_target(checkout):
    listed = checkout("snakemake", "--list-target-rules").stdout.split()
    assert {"all", "prepare", *(f"all_{stage}" for stage in STAGES)} <= set(listed)


@pytest.mark.parametrize("graph", ["--dag", "--rulegraph"])
def test_graphs_can_be_drawn(checkout, graph):
    drawn = checkout("snakemake", graph, "dot", "--configfile", "config/smoke.yaml").stdout
    assert drawn.startswith("digraph")
    assert "retrain_shared" in drawn


def test_a_users_own_image_is_measured_but_not_regenerated(checkout):
    (checkout.folder / "mine.png").touch()
    config = (ROOT / "config/smoke.yaml").read_text(encoding="utf-8")
    own = "    - {pool: report, count: 2}\n    - {name: mine, image: mine.png, prompt: a red seven}\n"
    (checkout.folder / "own.yaml").write_text(config.replace("    - {pool: report, count: 2}\n", own))
    planned = checkout.planned("--configfile", "own.yaml")
    assert planned["measure"] == 2
    assert planned["measure_own_image"] == 1
    assert planned["retrain_own_image"] == 2


def test_a_variant_waits_for_the_curvature_it_steps_by(checkout):
    config = (ROOT / "config/smoke.yaml").read_text(encoding="utf-8")
    changed = config.replace("curvature: none", "curvature: ekfac")
    assert changed != config
    (checkout.folder / "ekfac.yaml").write_text(changed)
    planned = checkout("snakemake", "-n", "-p", "all_fit", "all_unlearn", "--configfile", "ekfac.yaml").stdout
    jobs = planned.split("\nrule ")
    ekfac, diagonal = (next(job for job in jobs if job.startswith(f"{rule}:")) for rule in ("fit_ekfac", "fit"))
    assert "forgetrace fit --config ekfac.yaml --curvature ekfac --threads 1" in ekfac
    assert "--curvature" not in diagonal
    steps = [job for job in jobs if job.startswith("unlearn:")]
    read = {job.partition("output:")[0].count("fit/ekfac.safetensors") for job in steps if "variant=unlearn-sgd" in job}
    assert read == {1}
    read = {job.partition("output:")[0] for job in steps if "variant=unlearn," in job}
    assert read
    assert all("fit/fisher.safetensors" in files and "ekfac.s" not in files for files in read)
    assert "ekfac" not in checkout("snakemake", "-n", "--configfile", "config/smoke.yaml").stdout


def test_tables_are_made_of_what_the_config_asks_for(checkout):
    config = (ROOT / "config/smoke.yaml").read_text(encoding="utf-8")
    for leave_out, missing in (
        ("  subsets: 2\n  subset_seeds: 2\n", "lds"),
        ("  pools: 1\n  pooled_k: [10]\n", "pooled"),
        ("  others: 2\n", "unlearning"),
    ):
        assert leave_out in config
        (checkout.folder / "less.yaml").write_text(config.replace(leave_out, ""))
        planned = checkout("snakemake", "-n", "all_evaluate", "--configfile", "less.yaml").stdout
        outputs = next(job for job in planned.split("rule ") if job.startswith("evaluate:")).partition("output:")[2]
        tables = {"counterfactual", "comparisons", "per_query", "agreement", "cost", "unlearning"}
        tables |= {"lds", "lds_per_query", "pooled"}
        left = {name for name in tables if not name.startswith(missing)}
        assert {name for name in tables if f"evaluate/{name}.csv" in outputs.partition("log:")[0]} == left


def test_files_of_an_encoder_that_is_a_folder_are_inputs(checkout):
    folder = checkout.folder / "enc"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    config = (ROOT / "config/smoke.yaml").read_text(encoding="utf-8")
    own = "    own: {attributor: image-features, encoder: enc}\n    random: {}\n"
    (checkout.folder / "encoder.yaml").write_text(config.replace("    random: {}\n", own))
    planned = checkout("snakemake", "-n", "all_fit", "--configfile", "encoder.yaml").stdout
    shutil.rmtree(folder)
    fits = [job for job in planned.split("\nrule ") if job.startswith("fit_features:")]
    assert any("enc/model.safetensors" in job.partition("output:")[0] for job in fits)


def test_shards_are_jobs_that_their_scan_waits_for(checkout):
    config = (ROOT / "config/smoke.yaml").read_text(encoding="utf-8")
    (checkout.folder / "shards.yaml").write_text(config.replace("timesteps: 4", "timesteps: 4\n  shards: 3"))
    planned = checkout.planned("all_scan", "--configfile", "shards.yaml")
    assert (planned["scan_base"], planned["scan_base_shard"]) == (1, 3)
    assert planned["scan_shard"] == 3 * planned["scan"]


def test_a_narrowed_scan_waits_for_the_base_models(checkout):
    config = (ROOT / "config/smoke.yaml").read_text(encoding="utf-8")
    rounds = "narrowing: {first: 2, mean: 3, most: 6, tops: [10, 20]}"
    (checkout.folder / "narrowed.yaml").write_text(config.replace("timesteps: 4", rounds).replace(", score: skew", ""))
    planned = checkout("snakemake", "-n", "all_scan", "--configfile", "narrowed.yaml").stdout
    jobs = [job for job in planned.split("rule ") if job.startswith("scan:")]
    assert jobs
    assert all("results/narrowed/scan/base.npz" in job.partition("output:")[0] for job in jobs)


def test_a_given_model_without_its_parent_has_no_counterfactual(checkout):
    given = {
        "encode": {"image_encoder": "autoencoder-kl", "text_encoder": "clip", "pipeline": "sd"},
        "train": {"pretrained": "sd"},
        "unlearn": {"unlearn": {"step_size": 0.01}},
        "score": {"methods": {"unlearn": {"attributor": "unlearning"}, "random": {}}},
        "evaluate": {"others": 9},
    }
    for part in ("unet", "scheduler", "vae"):
        (checkout.folder / "sd" / part).mkdir(parents=True)
        (checkout.folder / "sd" / part / "config.json").write_text("{}")
    (checkout.folder / "given.yaml").write_text(yaml.safe_dump(given))
    done = checkout("snakemake", "-n", "--configfile", "given.yaml")
    assert "No leave-K-out models: name what the given θ0 was fine-tuned from in train.parent" in done.stderr
    jobs = {job.partition(":")[0]: job for job in done.stdout.split("\nrule ")}
    assert not any(name.startswith(("retrain", "measure", "figure_delta")) for name in jobs)
    assert {"train", "unlearn", "regenerate_unlearned", "scan", "score", "evaluate", "figure_unlearning"} <= jobs.keys()
    # The encoders of a pipeline have work for a GPU.
    assert "gpu=1" in jobs["encode_pipeline"]
    assert "encode" not in jobs
    # A model that is a folder here is an input like any other; changing it runs what reads it again.
    assert "sd/unet/config.json" in jobs["train"]
    assert "sd/vae/config.json" in jobs["encode_pipeline"]
    recipe = {"steps": 200, "batch_size": 8}
    for rate, trains in ({}, False), ({"learning_rate": 1e-4}, True):
        parent = given | {"train": {"pretrained": "sd", "parent": "other/model", **recipe, **rate}}
        (checkout.folder / "given.yaml").write_text(yaml.safe_dump(parent))
        assert ({"retrain_shared", "measure"} <= checkout.planned("--configfile", "given.yaml").keys()) == trains
    (checkout.folder / "given.yaml").write_text(yaml.safe_dump(given | {"train": {"parent": "sd", "steps": 200}}))
    planned = checkout("snakemake", "-n", "all_retrain", "--configfile", "given.yaml").stdout
    trainings = [job for job in planned.split("rule ") if job.startswith(("train:", "retrain"))]
    assert trainings
    assert all("sd/unet/config.json" in job.partition("output:")[0] for job in trainings)
    shutil.rmtree(checkout.folder / "sd")


@pytest.mark.parametrize(
    ("visible", "limit"),
    [("0,2", {"gpu": 2}), ("GPU-1a", {"gpu": 1}), ("0,-1,1", {"gpu": 1}), ("-1", None), ("", None)],
)
def test_on_one_machine_no_more_models_run_than_there_are_gpus(monkeypatch, visible, limit):
    profile = (ROOT / "profiles/default/config.yaml").read_text(encoding="utf-8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    assert yte.process_yaml(profile).get("resources") == limit
    monkeypatch.setenv("SNAKEMAKE_PROFILE", "profiles/slurm")
    assert "resources" not in yte.process_yaml(profile), "Slurm gives every job its own"


def test_own_data_are_prepared_again_when_their_list_changes_and_broken_ones_stop_before_any_job(checkout):
    folder = checkout.folder / "own ä"
    write_folder(folder, {f"{i}.png": f"caption {i}" for i in range(9)})
    prepare = "dataset: folder\n  path: own ä\n  size: 16\n  tuning_captions: 2\n  report_captions: 2"
    config = (ROOT / "config/smoke.yaml").read_text(encoding="utf-8").replace("dataset: digits", prepare)
    (checkout.folder / "own.yaml").write_text(config.replace("k: [20]", "k: [2]").replace("[10]", "[1]"))
    arguments = ("--configfile", "own.yaml", "--cores", "1", "prepare")
    checkout("snakemake", "--quiet", "all", *arguments)
    assert checkout.planned(*arguments) == {}
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as lines:
        lines.write('{"file_name": "9.png", "text": "another"}\n')
    assert checkout.planned(*arguments) == {"prepare": 1}
    shutil.rmtree(next((checkout.folder / "data").glob("folder-own-*")))
    refused = checkout("snakemake", "-n", *arguments, check=False)
    assert refused.returncode != 0
    assert "line 10: the file 9.png is missing" in refused.stderr
    assert "Traceback" not in refused.stderr
