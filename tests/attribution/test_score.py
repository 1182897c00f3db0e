import os

import numpy as np
import pytest

from forgetrace.artifacts import read_table, read_table_provenance, write_array, write_json
from forgetrace.attribution import registry
from forgetrace.attribution.contract import Together
from forgetrace.attribution.score import score

from ..conftest import IMAGES

QUERIES = ["report-00", "report-01", "mine"]
FILE = "measured-by-the-method.npy"


class Fake(Together):
    """Scores the images by their number, times the number in a file; remembers what it was asked."""

    summary = "a stand-in"
    asked: list[list[str]]

    def inputs(self, query):
        return [FILE, self.layout.query(query)["tensors"]]

    def scores_of(self, queries):
        self.asked.append(queries)
        factor = float(np.load(FILE))
        return {query: factor * np.arange(IMAGES) + QUERIES.index(query) for query in queries}


@pytest.fixture
def asked(tiny, monkeypatch) -> list[list[str]]:
    """The queries of every call of the method, which stands in for ``pixel``; its file holds a 1."""
    monkeypatch.setitem(registry.ATTRIBUTORS, "pixel", Fake)
    monkeypatch.setattr(Fake, "asked", [], raising=False)
    write_array(FILE, np.array(1.0))
    return Fake.asked


def test_without_a_query_all_are_scored_in_one_call(tiny, asked):
    score(tiny, "pixel")
    assert asked == [QUERIES]
    for number, query in enumerate(QUERIES):
        table = read_table(tiny.score("pixel", query))
        assert table["score"].tolist() == [float(i + number) for i in range(IMAGES - 1, -1, -1)]
        assert FILE in read_table_provenance(tiny.score("pixel", query))["inputs"]


def test_scores_of_the_same_inputs_are_kept(tiny, asked):
    score(tiny, "pixel")
    before = {query: os.stat(tiny.score("pixel", query)).st_mtime_ns for query in QUERIES}
    os.utime(FILE)  # newer, but the same
    score(tiny, "pixel")
    assert asked == [QUERIES]
    assert {query: os.stat(tiny.score("pixel", query)).st_mtime_ns for query in QUERIES} == before


def test_a_query_without_scores_is_all_that_is_scored(tiny, asked):
    score(tiny, "pixel")
    os.remove(tiny.score("pixel", "report-01"))
    with open(tiny.score("pixel", "mine"), "r+b") as damaged:
        damaged.truncate(100)
    score(tiny, "pixel")
    assert asked[1:] == [["report-01", "mine"]]


def test_a_changed_input_of_one_query_scores_that_one_again(tiny, asked):
    score(tiny, "pixel")
    path = tiny.query("report-01")["tensors"]
    os.replace(tiny.query("report-00")["tensors"], path)
    os.link(path, tiny.query("report-00")["tensors"])
    score(tiny, "pixel")
    assert asked[1:] == [["report-01"]]


def test_a_changed_input_of_all_queries_scores_all_again(tiny, asked):
    score(tiny, "pixel")
    write_array(FILE, np.array(2.0))
    score(tiny, "pixel")
    assert asked == [QUERIES, QUERIES]
    assert read_table(tiny.score("pixel", "report-00"))["score"].max() == 2 * (IMAGES - 1)


def test_a_changed_version_or_seed_scores_all_again(tiny, asked):
    from dataclasses import replace

    score(tiny, "pixel")
    write_json("workflow/versions.yaml", {"score": 1})  # JSON is YAML
    score(tiny, "pixel")
    score(replace(tiny, config=tiny.config.model_copy(update={"seed": 6})), "pixel")
    assert asked == [QUERIES] * 3


def test_a_query_asked_for_is_scored_whatever_is_there(tiny, asked):
    score(tiny, "pixel")
    score(tiny, "pixel", "report-01")
    assert asked[1:] == [["report-01"]]


def test_scores_of_a_method_of_single_queries_are_kept_too(tiny, monkeypatch):
    asked = []
    scores = registry.ATTRIBUTORS["text"].scores
    monkeypatch.setattr(
        registry.ATTRIBUTORS["text"], "scores", lambda self, query: asked.append(query) or scores(self, query)
    )
    score(tiny, "text")
    os.remove(tiny.score("text", "mine"))
    score(tiny, "text")
    assert asked == [*QUERIES, "mine"]
