import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from forgetrace import cli
from forgetrace.attribution.registry import ATTRIBUTORS

from .conftest import SETTINGS


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    return "tiny.yaml"


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of the command line."""
    monkeypatch.setattr(sys, "argv", ["forgetrace", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code or 0, capsys.readouterr().err


def assert_one_sentence(result: tuple[int, str], *parts: str) -> None:
    code, error = result
    assert code == 1
    assert error.startswith("forgetrace: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for part in parts:
        assert part in error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["scan", "--variant", "unlearn"], ["--variant and --query go together"]),
        (["scan", "--query", "report-00"], ["--variant and --query go together"]),
        (["scan", "--shard", "1"], ["--shard 1: scan.shards of", "is 1, and the first shard is 0"]),
        (["scan", "--variant", "nope", "--query", "report-00"], ["--variant nope", "unlearn, unlearn-sgd"]),
        (
            ["unlearn", "--variant", "unlearn", "--query", "report-07"],
            ["--query report-07", "report-00, report-01, mine"],
        ),
        (["unlearn", "--variant", "nope", "--query", "mine"], ["--variant nope", "the section 'unlearn'"]),
        (["sweep", "--variant", "nope"], ["--variant nope"]),
        (["sweep", "--variant", "unlearn", "--queries", "99"], ["--queries 99", "only 60 captions"]),
        (["synthesize", "--query", "nope"], ["--query nope"]),
        (["score", "--method", "nope", "--query", "mine"], ["score.methods has no 'nope'", "skewed"]),
        (["score", "--method", "pixel", "--query", "nope"], ["--query nope"]),
        (["measure", "--query", "nope"], ["--query nope"]),
        (["retrain", "--together", "nope"], ["--together nope", "it has shared, unlearn"]),
        (["retrain", "--together", "unlearn", "--k", "10"], ["Give --method, --k and --member for one model, or"]),
        (["retrain", "--method", "unlearn", "--k", "10"], ["Give --method, --k and --member for one model, or"]),
        (["train"], ["results/tiny/encode/manifest.json is missing", "run the stage that makes it"]),
        (["encode"], ["metadata.jsonl", "snakemake prepare"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_users_mistake_is_one_sentence(config, monkeypatch, capsys, arguments, parts):
    result = run(monkeypatch, capsys, arguments[0], "--config", config, *arguments[1:])
    assert_one_sentence(result, *parts)


def test_a_missing_or_wrong_config_is_one_sentence(config, monkeypatch, capsys, tmp_path):
    assert_one_sentence(run(monkeypatch, capsys, "train", "--config", "none.yaml"), "Cannot read the config none.yaml")
    (tmp_path / "bad.yaml").write_text("trian: {}\nscore: {methods: {random: {}}}")
    assert_one_sentence(run(monkeypatch, capsys, "train", "--config", "bad.yaml"), "bad.yaml", "unknown key 'trian'")
    (tmp_path / "bad.yaml").write_text("score: {methods: {voodoo: {}}}")
    assert_one_sentence(run(monkeypatch, capsys, "train", "--config", "bad.yaml"), "'voodoo' is no attribution method")


def test_a_mistake_in_the_options_is_exit_code_2(config, monkeypatch, capsys):
    assert run(monkeypatch, capsys, "train", "--config", config, "--colour", "red")[0] == 2
    assert run(monkeypatch, capsys, "score", "--config", config)[0] == 2


def test_other_errors_are_not_hidden(config, monkeypatch):
    """A bug of ours must show its traceback."""
    monkeypatch.setattr(sys, "argv", ["forgetrace", "prepare", "--config", config])
    monkeypatch.setattr("forgetrace.datasets.prepare.prepare", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_there_is_one_command_per_stage_and_each_has_help():
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    stages = {"prepare", "encode", "train", "synthesize", "fit", "unlearn", "scan", "score"}
    assert stages | {"retrain", "evaluate", "figures"} <= names
    for name in names:
        result = CliRunner().invoke(cli.app, [name, "--help"])
        assert result.exit_code == 0
        assert "Usage" in result.output


def test_the_help_of_score_lists_the_methods():
    output = CliRunner().invoke(cli.app, ["score", "--help"], env={"COLUMNS": "200"}).output
    for name, kind in ATTRIBUTORS.items():
        assert f"{name}: {kind.summary}" in output


def test_a_stage_runs_from_the_command_line(tiny, tmp_path):
    """In a process of its own: the exit code, and nothing said but by the stage."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    command = [sys.executable, "-m", "forgetrace.cli", "score", "--config", "tiny.yaml", "--method"]
    done = subprocess.run([*command, "pixel", "--query", "report-00"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / tiny.score("pixel", "report-00")).is_file()
    done = subprocess.run([*command, "unlearn", "--query", "report-01"], capture_output=True, text=True)
    assert_one_sentence((done.returncode, done.stderr), "scan/unlearn/report-01.npz is missing")


@pytest.mark.parametrize(("options", "curvature"), [([], "diagonal"), (["--curvature", "ekfac"], "ekfac")])
def test_the_curvature_that_is_asked_for_is_fitted(config, monkeypatch, options, curvature):
    from forgetrace.curvature import fit

    asked = []
    monkeypatch.setattr(fit, "fit", lambda layout, *arguments: asked.append(arguments))
    assert CliRunner().invoke(cli.app, ["fit", "--config", config, *options]).exit_code == 0
    assert asked == [(curvature, "auto")]


def test_tidy_finds_checkpoints_of_trainings_the_config_does_not_have(config, tmp_path):
    folder = tmp_path / "results/tiny/checkpoints"
    wanted = [
        "base/last.pt",
        "base/step-000004.safetensors",
        "scan/0123.npy",
        "features/0123.npy",
        "seed-k0-draw0/last.pt",
    ]
    wanted += ["random-k10-draw1/last.pt", "unlearn-k10-report-01/last.pt", "unlearn-k10-mine/last.pt"]
    orphans = ["pixel-k10-mine/last.pt", "random-k10-draw2/last.pt", "unlearn-k10-report-02/last.pt"]
    orphans += ["unlearn-k99-mine/last.pt", "unlearn-k99-mine/step-000004.safetensors"]
    for name in wanted + orphans:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    listed = CliRunner().invoke(cli.app, ["tidy", "--config", config]).output.splitlines()
    assert listed == [f"results/tiny/checkpoints/{name}" for name in orphans]
    assert all((folder / name).exists() for name in orphans)
    assert CliRunner().invoke(cli.app, ["tidy", "--config", config, "--remove"]).output.splitlines() == listed
    assert {path for path in folder.rglob("*") if path.is_file()} == {folder / name for name in wanted}


def tidied(config: str, *files: str) -> list[str]:
    """What ``forgetrace tidy`` lists of these files of ``results/x/fit``."""
    Path("x.yaml").write_text(config)
    for file in files:
        path = Path("results/x/fit", file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return CliRunner().invoke(cli.app, ["tidy", "--config", "x.yaml"]).output.splitlines()


def test_tidy_keeps_what_the_config_s_methods_were_fitted_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [f"features/loss-all-t{timesteps}-d4096.npy" for timesteps in (3, 4)]
    assert tidied("score: {methods: {trak: {timesteps: 3}}}", *files) == [f"results/x/fit/{files[1]}"]


def test_tidy_leaves_the_curvature_that_only_a_method_needs(tmp_path, monkeypatch):
    """Customised models rank with θ0's; the config has no query of its own to ask for it."""
    monkeypatch.chdir(tmp_path)
    methods = "score: {methods: {influence: {curvature: ekfac}}}"
    concepts = "customize: {objects: {test: 1}, prompts: {object: {exemplar: a V*, template: [V*]}}}"
    config = f"synthesize: {{queries: []}}\n{concepts}\n{methods}\nretrain: {{methods: []}}\n"
    listed = tidied(config, "ekfac.safetensors", "ekfac.json", "fisher.safetensors")
    assert listed == ["results/x/fit/fisher.safetensors"]


def test_tidy_leaves_the_features_that_methods_need(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [f"features/unet-t25-{name}" for name in ("noises2.npy", "noises2.json", "noises4.npy")]
    assert tidied("score: {methods: {unet-features: {noises: 2}}}\n", *files) == [f"results/x/fit/{files[2]}"]


def test_tidy_keeps_features_and_weights_of_halves_and_pools(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    retrain = SETTINGS["retrain"] | {"subsets": 1, "subset_seeds": 2, "pools": 1, "pooled_k": [3]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS | {"retrain": retrain}))
    features = type("Known", (), {"name": "known"})
    monkeypatch.setattr(ATTRIBUTORS["pixel"], "features", lambda self: [features])
    folder = tmp_path / "results/tiny"
    weights = "retrain/weights/"
    wanted = ["fit/features/known.npy", f"{weights}half/k0/draw0-seed1.safetensors"]
    wanted += [f"{weights}text/k3/pool0.safetensors", "retrain/measures/text/k3/pool0.json"]
    stale = ["fit/features/other.npy", f"{weights}half/k0/draw1.safetensors", f"{weights}text/k3/pool1.safetensors"]
    for name in wanted + stale:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    listed = CliRunner().invoke(cli.app, ["tidy", "--config", "tiny.yaml"]).output.splitlines()
    assert listed == [f"results/tiny/{name}" for name in stale]


def test_a_partial_evaluation_is_asked_for(config, monkeypatch):
    from forgetrace.evaluation import tables

    asked = []
    monkeypatch.setattr(tables, "evaluate", lambda layout, partial: asked.append(partial))
    for options in ([], ["--partial"]):
        assert CliRunner().invoke(cli.app, ["evaluate", "--config", config, *options]).exit_code == 0
    assert asked == [False, True]


def test_the_sweep_prints_the_chosen_step_size(config, monkeypatch):
    import pandas as pd

    from forgetrace.unlearning import sweep

    columns = ["step_size", "query", "query_before", "query_after", "others_before", "others_after"]
    tried = pd.DataFrame([[2.5e-4, "tuning-00", 0.1, 0.2, 0.3, 0.301]], columns=columns)
    asked = []
    monkeypatch.setattr(sweep, "tuning_subjects", lambda layout, count, device: [device] * count)
    monkeypatch.setattr(sweep, "sweep", lambda *arguments: asked.append(arguments[1:]) or (2.5e-4, tried))
    arguments = ["sweep", "--config", config, "--variant", "unlearn", "--queries", "3", "--table", "tried.csv"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "step_size: 2.5e-04  # largest that raises other images' loss by at most 1.0%" in result.output
    assert asked == [("unlearn", ["auto"] * 3, 0.01, "auto")]
    assert pd.read_csv("tried.csv").to_dict("records") == tried.to_dict("records")
