from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from forgetrace.attribution.calibration import Calibration
from forgetrace.cli import app
from forgetrace.release.abc import read_case_features, read_features, read_heads
from forgetrace.release.abc_judge import MASS, exemplar_ranks, judge, summarised

from . import abc_files as made
from .abc_files import BACKGROUND, EXEMPLARS, KINDS, WIDTH

QUERIES = len(EXEMPLARS) * sum(KINDS.values())


@pytest.fixture
def folder(tmp_path) -> Path:
    return made.write_benchmark(tmp_path / "abc")


def one(values: pd.DataFrame, query: str, metric: str) -> float:
    (found,) = values.loc[(values["query"] == query) & (values["metric"] == metric), "value"]
    return found


def slow(folder: Path, heads: dict | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of every query, which candidates are exemplars in the order of their cosine, and those cosines."""
    content, background = made.case_features(), made.background()["feats"]
    images, asked = (lambda x: x, lambda x: x)
    if heads:
        images, asked = (
            lambda x, head=heads[name]: x @ head["weight"].T + head["bias"] for name in ("real_mapper", "synth_mapper")
        )
    found = {}
    for kind in KINDS:
        for i, query in enumerate(content["synth_tensors"][kind]):
            start, end = content["exemplar_chunks"][content["synth_ids"][kind][i]]
            candidates = images(torch.cat([background, content["exemplar_tensors"][start:end]]))
            cosines = torch.cosine_similarity(candidates, asked(query[None]), dim=1)
            order = cosines.argsort(descending=True)
            found[content["synth_paths"][kind][i]] = (order.numpy() >= BACKGROUND, cosines[order].numpy())
    return found


@pytest.mark.parametrize("mapped", [False, True])
def test_metrics_are_those_of_a_plain_loop(folder, mapped):
    heads = read_heads(folder / "mapper.pth", WIDTH) if mapped else None
    cases, calibration = read_case_features(folder / "test_art.pth", WIDTH), Calibration(5.0, 0.2)
    values = judge(read_features(folder / "laion_subset.pth"), cases, heads, calibration)
    assert len(values) == QUERIES * 8
    expected = slow(folder, made.heads() if mapped else None)
    for query, (hits, cosines) in expected.items():
        places = np.flatnonzero(hits) + 1
        precision = np.mean([hits[:place].sum() / place for place in places])
        assert one(values, query, "ap") == pytest.approx(precision)
        assert one(values, query, "recall_5") == pytest.approx(hits[:5].sum() / hits.sum())
        weights = np.maximum(np.exp(5 * (cosines - cosines[0])) - 0.2, 0)
        assert one(values, query, MASS) == pytest.approx(weights[hits].sum() / weights.sum(), abs=1e-5)
    # Features of the fixture know their exemplars, those of invented heads do not.
    assert (values.loc[values["metric"] == "ap", "value"].mean() > 0.9) != mapped


def test_ranks_by_hand():
    background = torch.tensor([0.1, 0.7, 0.5, 0.7])
    np.testing.assert_array_equal(exemplar_ranks(torch.tensor([0.6, 0.9]), background), [1, 4])
    # Equal similarities: the background first, and then the exemplars one after the other.
    np.testing.assert_array_equal(exemplar_ranks(torch.tensor([0.7, 0.7]), background), [3, 4])
    np.testing.assert_array_equal(exemplar_ranks(torch.tensor([0.0, 0.0]), torch.zeros(5)), [6, 7])


def test_models_count_alike_whatever_their_queries():
    rows = [
        (0, "gpt", "a", "ap", 1.0),
        (0, "gpt", "b", "ap", 1.0),
        (0, "gpt", "c", "ap", 1.0),
        (1, "gpt", "d", "ap", 0.0),
    ]
    found = summarised(pd.DataFrame(rows, columns=["model", "prompts", "query", "metric", "value"]))
    assert found["mean"].tolist() == [0.5]
    assert found[["n_models", "n_queries"]].to_numpy().tolist() == [[2, 4]]


def test_the_command_prints_a_table_and_writes_every_query(folder):
    arguments = ["evaluate-abc", "--background", folder / "laion_subset.pth", "--features", folder / "test_art.pth"]
    arguments += ["--cases", folder / "json/test_art.json", "--heads", folder / "mapper.pth"]
    arguments += ["--calibrator", folder / "calibrator.pth", "--table", folder / "queries.csv", "--device", "cpu"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["prompts", "metric", "n_models", "n_queries", "mean", "ci_low", "ci_high"]
    assert {(line[0], line[1]) for line in lines[1:]} >= {("media", "ap"), ("gpt", "recall_100"), ("gpt", MASS)}
    written = pd.read_csv(folder / "queries.csv")
    assert set(written["query"]) == {q for case in made.cases() for files in case["synth"].values() for q in files}
