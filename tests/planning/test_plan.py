import inspect
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import pytest
from typer.testing import CliRunner

from forgetrace import cli
from forgetrace.config import Narrowing, Scan
from forgetrace.datasets.prepare import prepare
from forgetrace.layout import Layout, load_layout
from forgetrace.planning import calibrate, estimate, work
from forgetrace.planning.calibrate import Unit, rate
from forgetrace.planning.work import Work, count

from ..conftest import settings

CONFIGS = Path(__file__).parents[2] / "config"
IMAGES = {"digits": 4730, "smoke": 300}
# By hand: jobs, trainings, UNet evaluations.
BY_HAND = {
    "digits": {
        "prepare": (1, 0, 0),
        "encode": (1, 0, 0),
        "train": (1, 1, 3000 * 32),
        "synthesize": (4, 0, 4 * 25 * 2),  # guidance asks twice
        "fit": (1, 0, 4000),
        "unlearn": (2 * 4, 0, 8 * (2048 + 2 * (1000 + 4 * 256))),
        "scan": (1 + 2 * 4, 0, 9 * 4730 * 20),
        "score": (6 * 4, 0, 0),
        "retrain": (2 + 1 + 2 * 4, 11, 11 * 3000 * 32 + 8 * (200 * 2 + 50)),
        "measure": (4, 0, 4 * (1 + 2 + 1) * (200 * 2 + 50)),
        "evaluate": (1, 0, 0),
        "figures": (1 + 2 * 4 + 1, 0, 0),
    },
    "smoke": {
        "prepare": (1, 0, 0),
        "encode": (1, 0, 0),
        "train": (1, 1, 60 * 16),
        "synthesize": (2, 0, 2 * 5),
        "fit": (1, 0, 200),
        # Each variant generates 2 queries and 2 others before, and 1 + 2 images for each query afterwards.
        "unlearn": (
            2 * 2 + 2,
            0,
            2 * (64 + 64) + 4 * 2 * (1000 + 4 * 256) + 2 * (2 + 2 + 2 * 3) * 5,
        ),
        "scan": (1 + 2 * 2, 0, 5 * 300 * 4),
        "score": (4 * 2 + 1, 0, 0),  # one method scores all queries in one job
        # Besides those of the queries: 2 halves twice, a pool of each method; asked about both queries.
        "retrain": (2 + 1 + 2 * 2 + 4 + 5, 16, 16 * 60 * 16 + (4 + 9 * 2) * (20 + 5)),
        "measure": (2, 0, 2 * (1 + 2 + 1) * (20 + 5)),
        "evaluate": (1, 0, 0),
        "figures": (1 + 2 * 2 + 3, 0, 0),
    },
}


@pytest.mark.parametrize("name", BY_HAND)
def test_work_is_what_a_hand_counts(name):
    layout = load_layout(CONFIGS / f"{name}.yaml")
    stages = count(layout, IMAGES[name], captions=100)
    batch = layout.config.train.batch_size
    for stage, one in stages.items():
        assert (one.jobs, one.trainings, one.evaluations(batch)) == BY_HAND[name][stage], stage


def test_reading_all_images_counts_for_each_query_and_method_that_compares_them():
    queries = len(settings().queries())
    methods = {"pixel": {}, "pixel-l2": {}, "text": {}, "random": {}}
    assert counted(score={"methods": methods}, retrain={"methods": []})["score"].units[work.IMAGE] == 2 * 40 * queries
    assert work.IMAGE not in counted(score={"methods": {"text": {}}}, retrain={"methods": []})["score"].units


def counted(**sections) -> dict[str, Work]:
    return count(Layout("tiny", settings(**sections)), images=40, captions=7)


def test_a_narrowed_scan_counts_its_budget_and_all_draws_of_the_base_model():
    scan = Scan(narrowing=Narrowing(mean=12, most=98, tops=[10]))
    narrowed = count(Layout("tiny", settings().model_copy(update={"scan": scan})), images=40, captions=7)
    assert narrowed["scan"].units[work.SCAN] == 40 * (98 + 2 * 3 * 12)


def test_shards_are_jobs_of_their_own_with_the_same_evaluations():
    whole, parts = counted()["scan"], counted(scan={"shards": 3})["scan"]
    assert parts.jobs == whole.jobs * (3 + 1)
    assert parts.units[work.SCAN] == whole.units[work.SCAN]


def test_twice_the_queries_are_twice_the_unlearned_scans():
    few, many = (counted(synthesize={"queries": [{"pool": "report", "count": n}]})["scan"] for n in (2, 4))
    assert (few.jobs, many.jobs) == (1 + 2 * 2, 1 + 2 * 4)
    assert (few.units[work.SCAN], many.units[work.SCAN]) == (5 * 40 * 4, 9 * 40 * 4)


def test_a_users_image_has_losses_but_is_not_sampled():
    mine = counted(synthesize={"queries": [{"name": "mine", "image": "mine.png", "prompt": "my own"}]})
    assert [mine[stage].units[work.SAMPLER] for stage in ("synthesize", "retrain", "measure")] == [0, 0, 0]
    assert mine["measure"].units[work.LOSS] == 4 * 5 * 2


def test_queries_that_are_not_judged_cost_no_models_of_their_own():
    queries = [{"pool": "report", "count": 3}]
    stages = counted(synthesize={"queries": queries}, retrain={"queries": 1, "subsets": 5, "subset_seeds": 2})
    assert (stages["synthesize"].jobs, stages["measure"].jobs) == (3, 1)
    assert stages["retrain"].jobs == 2 + 1 + 1 + 10
    assert stages["retrain"].units[work.LOSS] == (1 + 10 * 3) * 5 * 2


def test_models_trained_as_one_are_a_job_of_each_set_with_as_many_steps():
    recipe = {"subsets": 5, "methods": ["unlearn"], "k": [10, 20]}
    alone, as_one = (counted(retrain=recipe | {"stack": stack})["retrain"] for stack in (1, 4))
    assert alone.jobs == alone.trainings == as_one.trainings == 2 * 2 + 1 + 5 + 2 * 3  # of three queries
    assert as_one.jobs == 3  # the shared ones, the halves, the judged method's
    assert as_one.units[work.STACKED] == alone.units[work.STEP]
    assert as_one.evaluations(7) == alone.evaluations(7)


def test_a_set_of_one_model_is_timed_as_models_trained_as_one_are(tmp_path, monkeypatch):
    one = {"methods": ["unlearn"], "random_draws": 1, "seeds": 0, "queries": 1, "stack": 8}
    assert work.STACKED in counted(retrain=one)["retrain"].units
    monkeypatch.setattr(calibrate, "training_step", lambda *_, models=1: Unit(models, 0, 0))
    monkeypatch.setattr(calibrate, "rate", lambda *_, **__: Unit(0, 0, 0))
    config = (CONFIGS / "smoke.yaml").read_text(encoding="utf-8").replace("retrain:\n", "retrain:\n  stack: 3\n")
    (tmp_path / "stacked.yaml").write_text(config, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    layout = load_layout("stacked.yaml")
    prepare(layout.config.prepare, layout.data, look=False)
    units, _ = calibrate.heavy(layout, "cpu")
    assert (units[work.STEP].each, units[work.STACKED].each) == (1, 3)


def test_the_models_of_a_query_are_counted_where_the_first_one_is_not_judged():
    recipe = {"methods": ["unlearn"], "k": [10], "queries": ["report-01"]}
    assert counted(retrain=recipe)["retrain"].units[work.LOSS] == 5 * 2


def test_no_fisher_is_fitted_and_no_random_set_trained_that_nobody_asks_for():
    plain = {"curvature": "none", "step_size": 1e-2}
    assert counted(unlearn={"unlearn": plain, "unlearn-sgd": plain})["fit"].jobs == 0
    # Random sets are shared by all queries, though random is judged by name.
    assert counted(retrain={"methods": ["unlearn", "random"], "k": [10]})["retrain"].jobs == 2 + 1 + 3


def test_the_draws_of_ekfac_are_passed_over_twice():
    both = counted(unlearn={"unlearn": {"step_size": 1}, "unlearn-sgd": {"curvature": "ekfac", "step_size": 1}})["fit"]
    assert both == Work(2, {work.TORCH: 2, work.FISHER: 60, work.EKFAC: 2 * 60})
    assert both.evaluations(1) == 3 * 60


def test_mucs_is_counted_with_all_its_steps_and_its_untrained_model():
    adam = {"procedure": "adam", "step_size": 1e-3, "steps": 3, "draws": 8}
    done = counted(unlearn={"unlearn": adam, "unlearn-sgd": {"procedure": "mucs", "steps": 5, "draws": 7}})
    assert done["fit"].jobs == 0
    assert done["unlearn"].units[work.GRADIENT] == 3 * (3 * 8 + 5 * 2 * 7)
    assert done["unlearn"].units[work.LOSS] == 3 * (2 * 2 * (1000 + 4 * 40) + 1000)


def test_the_checks_of_unlearning_are_as_many_as_it_makes():
    from forgetrace.unlearning import sample, step

    assert inspect.signature(step.query_loss).parameters["draws"].default == work.QUERY_DRAWS
    assert (sample.SAMPLE, sample.DRAWS) == (work.OTHERS, work.OTHERS_DRAWS)


def test_a_rate_leaves_out_what_is_done_once(monkeypatch):
    now, warm = [0.0], []

    def run(repetitions: int) -> None:
        now[0] += 0.5 + 0.01 * repetitions + (0 if warm else 2)
        warm.append(repetitions)

    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    unit = rate(run, size=10, seconds=0.3)
    assert unit.each == pytest.approx(0.001)
    assert unit.first == pytest.approx(2.5)
    assert max(warm) == 32  # the first of 1, 2, 4, … to take 0.3 s longer than one


def test_a_long_unit_is_timed_once(monkeypatch):
    now, calls = [0.0], []

    def run(repetitions: int) -> None:
        now[0] += 30 * repetitions
        calls.append(repetitions)

    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    unit = rate(run, size=4)
    assert (unit.each, unit.first, calls) == (7.5, 0, [1])


def test_a_step_of_a_stack_is_timed_per_model_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout, captions = Layout("tiny", settings()), ["a red four", "a blue two"]
    encoded = calibrate.stand_in([16, 16, 3], layout.config.encode, captions)
    monkeypatch.setattr(calibrate, "rate", lambda run, size, seconds: run(2) or Unit(size, 0, 0))
    unit = calibrate.training_step(layout, encoded, "cpu", models=3)
    assert unit.each == 3
    assert unit.first > 0  # the models are made
    assert not Path("checkpoints").exists() or not any(Path("checkpoints").rglob("*.pt"))


def test_a_job_takes_its_start_and_its_share_of_units():
    units = {work.TORCH: Unit(3, 0, 0), work.SCAN: Unit(0.01, 0.5, 0)}
    assert estimate.job_seconds(Work(2, {work.TORCH: 2, work.SCAN: 200}), units) == pytest.approx(3 + 0.5 + 1)
    assert estimate.job_seconds(Work(0, {work.TORCH: 0, work.SCAN: 0}), units) == 0


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (1, 10 + 100 + (100 + 10 * (4 + 2 * 2) + 300 + 8) + 2 + 4),  # everything, one after another
        (2, 10 + 100 + (100 + 80 + 300 + 8 - 100) / 2 + 2 + 2),  # one shared retraining fits beside the base training
        (64, 10 + 100 + (10 + 10 + 10 + 10 + 100) + 2 + 4 / 64),  # the chain of one query
    ],
)
def test_the_wall_time_is_that_of_the_schedule(cores, expected):
    stages = dict.fromkeys(work_stages := ("fit", "unlearn", "scan", "score"), Work(2, {}))
    stages |= {"prepare": Work(1, {}), "encode": Work(1, {}), "train": Work(1, {}), "retrain": Work(4, {})}
    stages |= {"synthesize": Work(0, {}), "measure": Work(8, {}), "evaluate": Work(1, {}), "figures": Work(4, {})}
    seconds = dict.fromkeys(work_stages, 10) | {"prepare": 4, "encode": 6, "train": 100, "retrain": 100}
    seconds |= {"synthesize": 0, "measure": 1, "evaluate": 2, "figures": 1}
    assert estimate.wall_seconds(stages, seconds, shared=1, cores=cores) == pytest.approx(expected)


def test_a_k_that_leaves_no_images_is_told_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = (CONFIGS / "smoke.yaml").read_text(encoding="utf-8").replace("k: [20]", "k: [300]")
    Path("large.yaml").write_text(config, encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["plan", "--config", "large.yaml"])
    assert str(result.exception) == "retrain.k: 300 images cannot be left out of 300; choose a smaller K."


def test_the_smoke_experiment_is_estimated_before_its_data_are_there(tmp_path):
    """In a process of its own, as for users: what accelerate is set up with in a process holds for all of it."""
    command = [sys.executable, "-m", "forgetrace.cli", "plan", "--config", str(CONFIGS / "smoke.yaml")]
    command += ["--cores", "3", "--device", "cpu"]
    before = sum(getrusage(RUSAGE_CHILDREN)[:2])  # a busy machine takes longer, but no more work
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert sum(getrusage(RUSAGE_CHILDREN)[:2]) - before < 60
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line[:1].isalpha()}
    for stage, (jobs, trainings, evaluations) in BY_HAND["smoke"].items():
        assert [float(cell.replace(",", "")) for cell in rows[stage][:3]] == [jobs, trainings, evaluations]
        assert float(rows[stage][4].replace(",", "")) > 20  # MB of memory
    assert "Wall time on 3 cores: 0:" in result.stdout
    assert not list(tmp_path.iterdir())


def test_images_and_models_are_found_from_another_folder_and_names_of_the_hub_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own", "sd", "model"):
        Path(name).mkdir()
    changed = {
        "prepare": {"dataset": "folder", "path": "own", "size": 16},
        "encode": {"image_encoder": "autoencoder-kl", "pipeline": "sd"},
        "train": {"pretrained": "model", "parent": "owner/model"},
    }
    sections = {name: getattr(settings(), name).model_copy(update=update) for name, update in changed.items()}
    moved = calibrate.anywhere(Layout("x", settings().model_copy(update=sections))).config
    assert moved.prepare.path == str(tmp_path / "own")
    assert moved.encode.pipeline == str(tmp_path / "sd")
    assert (moved.train.pretrained, moved.train.parent, moved.train.lora) == (
        str(tmp_path / "model"), "owner/model", None,
    )  # fmt: skip
