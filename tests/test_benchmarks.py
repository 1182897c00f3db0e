"""The machinery of ``make bench``; the figures themselves are nobody's test."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import __main__ as command
from benchmarks import common, narrowing, pipeline, recorded
from benchmarks.report import Reading, as_json, lines, ratio
from benchmarks.settings import Settings
from benchmarks.workers import fastest, interleave, rate, team, timed
from forgetrace.artifacts import UserError, write_json, write_table
from forgetrace.attribution.ranking import rank
from forgetrace.config import Narrowing
from forgetrace.datasets.digits import examples
from forgetrace.layout import Layout

from .conftest import settings


def stub(speed: float):
    """Work at a known rate that also tells where it ran."""
    return lambda seconds, factor=1: (speed * factor * seconds, seconds)


def place():
    return lambda: (os.getpid(), os.getcwd(), os.environ.get("OMP_NUM_THREADS"))


def broken(error: type[Exception]):
    def work():
        raise error("no such thing")

    return work


def test_sides_take_turns_and_the_first_round_does_not_count():
    turns = []
    sides = [lambda: turns.append("old") or len(turns), lambda: turns.append("new") or len(turns)]
    assert interleave(sides, 2) == [[3, 5], [4, 6]]
    assert turns == ["old", "new"] * 3


def test_a_ratio_is_the_median_of_the_pairs_with_their_quartiles():
    reading = ratio([1.0, 2.0, 4.0, 1.0, 1.0], [2.0, 4.0, 4.0, 3.0, 5.0], target=">= 1.9", unit="steps")
    assert (reading.value, reading.spread, reading.met) == (2.0, (2.0, 3.0), True)
    assert reading.details == {"reference_per_s": 1.0, "candidate_per_s": 4.0, "unit": "steps"}


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [(1.7, ">= 1.7", True), (1.69, ">= 1.7", False), (4, "<= 4", True), (4.1, "<= 4", False), (1, None, None)],
)
def test_met_follows_the_target(value, target, met):
    assert Reading(value, target=target).met is met


def test_time_is_measured_over_whole_pieces():
    units, seconds = timed(lambda: 3, 0.01)
    assert units >= 3
    assert units % 3 == 0
    assert seconds >= 0.01
    assert timed(lambda: 3, 0)[0] == 3


def test_workers_have_processes_and_threads_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.chdir(tmp_path)
    with team(1, place) as one, team(1, place, threads=None) as default:
        here, there = one[0].call(), default[0].call()
    assert len({here[0], there[0], os.getpid()}) == 3
    assert here[1] == there[1] == str(tmp_path)
    assert (here[2], there[2], os.environ["OMP_NUM_THREADS"]) == ("1", None, "3")


def test_rates_of_workers_add_up_and_the_fastest_option_is_found():
    with team(2, stub, 10.0) as workers:
        assert rate(workers, 0.5) == pytest.approx(20)
        assert fastest(workers, (1, 4, 2), 0.5) == (4, {1: 20, 4: 80, 2: 40})


def test_errors_of_a_worker_come_back():
    for error, raised in ((UserError, UserError), (KeyError, RuntimeError)):
        with team(1, broken, error) as (worker,), pytest.raises(raised, match="no such thing"):
            worker.call()


def test_a_failing_bench_is_named_and_the_others_run(tmp_path, capsys):
    def fails(settings):
        raise ValueError("not today")

    def refuses(settings):
        return settings.encoded()

    benches = {"bad": fails, "good": lambda settings: {"good-x": Reading(2, target="<= 1")}, "missing": refuses}
    (tmp_path / "lone.yaml").write_text("score: {methods: {random: {}}}\n")
    readings, failed = command.run(benches, Settings(str(tmp_path / "lone.yaml")))
    assert list(readings) == ["good-x"]
    assert failed["bad"] == "not today"
    assert failed["missing"].endswith("is missing: run `make reproduce EXPERIMENT=lone` first.")
    assert "MISSED" in capsys.readouterr().out


def test_exit_code_and_file_follow_errors_not_targets(tmp_path, monkeypatch):
    monkeypatch.setattr(command.report, "machine", lambda: {"cores": 1})
    monkeypatch.setattr(recorded, "pipeline", lambda settings: {"x": Reading(2, target="<= 1", spread=(1, 3))})
    assert command.main(["pipeline", "--folder", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["targets"]["x"].items() >= {"value": 2, "target": "<= 1", "met": False, "spread": [1, 3]}.items()
    assert written["machine"] == {"cores": 1}
    monkeypatch.setattr(recorded, "pipeline", lambda settings: 1 / 0)
    assert command.main(["pipeline", "--folder", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "results.json").read_text())["failed"] == {"pipeline": "division by zero"}


def test_everything_written_is_plain_json():
    reading = Reading(1.5, target=">= 1", details={"seconds": {"start": 1.0}, 20: 3.0})
    assert json.loads(json.dumps(as_json({"a": reading}, {}, {})))["targets"]["a"]["met"] is True
    assert any("seconds: start 1" in line for line in lines({"a": reading}))


def test_recorded_measurements_are_read_back(tmp_path):
    settings = Settings("config/digits.yaml", folder=tmp_path)
    assert recorded.pipeline(settings) == recorded.narrowing(settings) == {}
    found = {"when": "2030-01-01", "machine": {"processors": {"cpu": "P"}}, "cores": 2, "seconds": 1200, "outside": 0.2}
    (tmp_path / "pipeline.json").write_text(json.dumps(found | {"definition": "idle"}))
    (tmp_path / "narrowing.csv").write_text(
        "query,evaluations_per_image,overlap200,overlap20,reference_overlap200,reference_overlap20\n"
        "a,10,0.9,0.8,0.9,0.9\nb,14,0.9,0.8,0.9,0.9\n"
    )
    found = recorded.pipeline(settings) | recorded.narrowing(settings)
    assert {name: reading.met for name, reading in found.items()} == {
        "pipeline": True,
        "pipeline-outside": False,
        "narrowing-evaluations": True,
        "narrowing-overlap200": True,
        "narrowing-overlap20": False,
    }


def test_what_is_outside_computation_is_counted_from_the_timings(tmp_path):
    for job, seconds in {"scan/base": 40, "scan/unlearn/q": 30, "figures/delta": 2}.items():
        path = tmp_path / f"{job}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"s\th:m:s\n{seconds}\t0:00:40\n")
    walls = pipeline.jobs(tmp_path)
    assert walls == {"figures/delta": 2, "scan/base": 40, "scan/unlearn/q": 30}
    # 35 + 25 + 0 seconds of 2 × 40 computed.
    assert pipeline.outside(walls, 5, 40, 2) == pytest.approx(0.25)


def test_a_real_bench_on_the_tiny_experiment(tiny, tmp_path):
    from benchmarks import ours, plain
    from tests.conftest import SETTINGS

    config = tmp_path / "config" / "tiny.yaml"
    config.parent.mkdir()
    config.write_text(json.dumps(SETTINGS))
    for side, request in ((plain, (0.0, 8)), (ours, (0.0,))):
        units, seconds = side.scan(str(config), "cpu")(*request)
        assert units > 0
        assert seconds > 0
    weights, rows = Settings(str(config)).weights(1)[1], np.array([0, 7, 30])
    old, new = (side.losses(str(config), "cpu")(weights, rows) for side in (plain, ours))
    assert old.shape == (3, 4)
    assert abs(old - new).max() < 1e-5


def test_a_narrowed_scan_is_judged_by_references_that_are_kept_until_the_weights_change(tiny, monkeypatch):
    monkeypatch.setattr(narrowing, "DRAWS", 12)
    monkeypatch.setattr(narrowing, "TOPS", (10, 3))
    scans = narrowing.Scans(tiny, "unlearn", Path("references"))
    assert not scans.judgeable("report-00")
    row = narrowing.judged(scans, "report-00", Narrowing(first=2, mean=4, most=10, tops=[3, 10]))
    assert row["query"] == "report-00"
    assert 4 <= row["evaluations_per_image"] <= 10
    assert all(0 <= row[f"{kind}{top}"] <= 1 for kind in ("overlap", "reference_overlap") for top in (10, 3))
    assert scans.judgeable("report-00")
    monkeypatch.setattr(narrowing, "scan_losses", lambda *arguments: pytest.fail("scanned again"))
    first, second = narrowing.increases(scans, "report-00")
    assert not np.array_equal(first, second)
    assert not np.isnan(first).any()
    Path(tiny.unlearned("unlearn", "mine")["weights"]).replace(tiny.unlearned("unlearn", "report-00")["weights"])
    assert not scans.judgeable("report-00")


def test_what_a_caption_says_of_a_digit():
    captions = [example.caption for _, example in zip(range(50), examples(0), strict=False)]
    for caption in captions:
        weight, ink, digit, slant, background = common.described(caption)
        assert caption == f"a {weight} {ink} {digit} {slant} on a {background} background"
    with pytest.raises(UserError, match="'my own' is no caption of the dataset digits"):
        common.described("my own")


def test_what_first_images_have_in_common_with_the_prompt_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    queries = [
        {"name": name, "image": f"{name}.png", "prompt": "a thin red one upright on a white background"}
        for name in "ab"
    ]
    layout = Layout(
        "common",
        settings(
            synthesize={"queries": queries}, score={"methods": {"pixel": {}, "random": {}}}, retrain={"methods": []}
        ),
    )
    monkeypatch.setattr(type(layout.config), "reported_queries", lambda _: ["a", "b"])
    captions = [
        "a thin red one upright on a white background",
        "a bold red one leaning left on a black background",
        "a thin blue two upright on a white background",
    ]
    ids = ["x", "y", "z"]
    write_table(layout.index, pd.DataFrame({"image_id": ids}))
    rows = [{"id": i, "file_name": i, "text": text, "split": "train"} for i, text in zip(ids, captions, strict=True)]
    Path(layout.metadata).parent.mkdir(parents=True)
    Path(layout.metadata).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for query, scores in (("a", [3.0, 2.0, 1.0]), ("b", [3.0, 1.0, 2.0])):
        write_json(layout.query(query)["record"], {"prompt": queries[0]["prompt"]})
        write_table(layout.score("pixel", query), rank(ids, np.array(scores)), {})
    table = common.in_common(layout, 2)
    assert table.index.tolist() == ["pixel"]  # random has not ranked
    assert table.loc["pixel"].tolist() == [0.75, 0.75, 0.75, 0.75, 0.75, 0.5]
