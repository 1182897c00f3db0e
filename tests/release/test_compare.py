import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from forgetrace.artifacts import UserError, write_arrays, write_table
from forgetrace.attribution.ranking import rank
from forgetrace.cli import app
from forgetrace.config import parse_config
from forgetrace.layout import Layout
from forgetrace.release.compare import compare, compare_losses, unlearning_method
from forgetrace.release.pickles import read_pickle

from .published import write_influence

N = 300
IDS = [f"{(7 * i) % N:03d}" for i in range(N)]  # not in the order of their names
THEIRS = Path("theirs")


def experiment(*names: str) -> Layout:
    content = {
        "prepare": {"dataset": "coco", "path": "p", "tuning_captions": 0, "report_captions": 0},
        "synthesize": {"queries": [{"given": "given", "count": 2, "name": name} for name in names]},
        "unlearn": {"other": {"step_size": 1}},
        "score": {"methods": {"text": {}, "mine": {"attributor": "unlearning", "variant": "other"}}},
    }
    return Layout("tiny", parse_config(content, "config/tiny.yaml"))


@pytest.fixture
def layout(tmp_path, monkeypatch) -> Layout:
    monkeypatch.chdir(tmp_path)
    return scored(experiment("sample"))


def scores_of(query: str) -> np.ndarray:
    return np.random.default_rng(len(query) + int(query[-1])).standard_normal(N)


def scored(layout: Layout) -> Layout:
    write_table(layout.index, pd.DataFrame({"image_id": IDS}))
    for query in layout.config.queries():
        write_table(layout.score("mine", query), rank(IDS, scores_of(query)))
    return layout


def test_measures_are_those_of_the_definitions(layout):
    theirs = scores_of("sample-001") + np.random.default_rng(9).standard_normal(N)
    write_influence(THEIRS / "influence_1.pkl", theirs.astype(np.float32))
    write_influence(THEIRS / "influence_12.pkl", theirs)  # of a query that the experiment leaves out
    assert unlearning_method(layout) == "mine"
    (row,) = compare(layout, THEIRS, "mine").to_dict("records")
    own = scores_of("sample-001")
    assert (row["query"], row["images"]) == ("sample-001", N)
    assert row["spearman"] == pytest.approx(spearmanr(own, theirs).statistic, abs=1e-6)
    assert row["overlap_50"] == len(set(np.argsort(-own)[:50]) & set(np.argsort(-theirs)[:50])) / 50
    assert row["overlap_200"] == len(set(np.argsort(-own)[:200]) & set(np.argsort(-theirs)[:200])) / 200
    assert np.isnan(row["overlap_1000"])
    assert row["largest_difference"] == pytest.approx(np.abs(own - theirs).max(), abs=1e-6)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


# A dtype of objects whose state says that it has none: numpy itself would follow the bytes as pointers.
POINTERS = b"cnumpy\ndtype\n\x8c\x02O8\x89\x88\x87R(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
SCALAR = b"cnumpy._core.multiarray\nscalar\n" + POINTERS + b"C\x08AAAAAAAA\x86R"
EMPTY = b"cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
ARRAY = EMPTY + b"(K\x01K\x01\x85" + POINTERS + b"\x89C\x08AAAAAAAAtb"


def forged(value: bytes) -> bytes:
    """A pickle of {"influence": value}, written by hand."""
    return b"\x80\x04}\x8c\x09influence" + value + b"s."


PICKLES = {
    "code": (lambda: pickle.dumps({"influence": Malicious()}), r"asks to load (posix|nt).mkdir, which is no array"),
    "code in an array": (
        lambda: pickle.dumps({"influence": np.array([Malicious()])}),
        r"asks to load (posix|nt).mkdir",
    ),
    "code by an old protocol": (lambda: pickle.dumps({"influence": Malicious()}, 0), r"asks to load (posix|nt).mkdir"),
    "a builtin": (lambda: b"cbuiltins\neval\n(S'1'\ntR.", "asks to load builtins.eval"),
    "a way around": (lambda: b"cbuiltins\ngetattr\n(S'1'\nS'2'\ntR.", "asks to load builtins.getattr"),
    "a codec": (lambda: b"c_codecs\nencode\n(S'1'\nS'zip'\ntR.", "asks to load _codecs.encode with zip"),
    "a class": (lambda: pickle.dumps(OrderedDict(a=1)), "asks to load collections.OrderedDict"),
    "half a file": (lambda: pickle.dumps({"influence": np.zeros(N)})[:-9], "is no whole pickle of arrays"),
    "no pickle": (lambda: b"<html>", "is no whole pickle of arrays"),
    "no mapping": (lambda: pickle.dumps([np.zeros(N)]), "holds a list, expected a dict of arrays"),
    "other names": (lambda: pickle.dumps({"scores": np.zeros(N)}), r"lacks 'influence' \(it has scores\)"),
    "too few images": (
        lambda: pickle.dumps({"influence": np.zeros(N - 1)}),
        r"is float64 of \(299,\), expected numbers of 300",
    ),
    "no numbers": (lambda: pickle.dumps({"influence": np.array(["a"] * N)}), r"asks to load numpy.dtype\('U1'\)"),
    "fields": (lambda: pickle.dumps({"influence": np.zeros(N, "f8,f8")}), "asks to load numpy.dtype with fields"),
    "pointers": (lambda: forged(ARRAY), r"asks to load numpy.dtype\('O8'\)"),
    "a pointer": (lambda: forged(SCALAR), r"asks to load numpy.dtype\('O8'\)"),
    "memory": (lambda: b"\x80\x04cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.", "asks to load builtins.bytearray"),
    "no array": (lambda: pickle.dumps({"influence": [1.0] * N}), "is list, expected numbers of 300"),
    "NaN": (lambda: pickle.dumps({"influence": np.full(N, np.nan)}), "holds NaN or infinity"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_of_anything_else_are_a_sentence_and_run_nothing(layout, case):
    content, sentence = PICKLES[case]
    THEIRS.mkdir()
    (THEIRS / "influence_0.pkl").write_bytes(content())
    with pytest.raises(UserError, match=sentence):
        compare(layout, THEIRS, "mine")
    assert not Path("owned").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_of_every_protocol_and_older_numpy_are_read(tmp_path, protocol):
    content = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.float32(2),
        "c": [(1, "x"), None],
        "e": np.array([True, False]),
        "d": np.arange(3)[::2],
    }
    text = pickle.dumps(content, protocol)
    for raw in (text, text.replace(b"numpy._core", b"numpy.core") if protocol < 4 else text):
        (tmp_path / "x.pkl").write_bytes(raw)
        found = read_pickle(tmp_path / "x.pkl")
        np.testing.assert_array_equal(found["a"], content["a"])
        np.testing.assert_array_equal(found["d"], content["d"])
        np.testing.assert_array_equal(found["e"], content["e"])
        assert (found["b"], found["c"]) == (content["b"], content["c"])


def test_files_of_other_queries_are_refused(layout):
    with pytest.raises(UserError, match=r"--influence nowhere: name a folder of influence_<i>.pkl, or a file"):
        compare(layout, Path("nowhere"), "mine")
    with pytest.raises(UserError, match=r"expected the set 'test' of a release's queries, there is sample"):
        compare(layout, Path("influence_test.pkl"), "mine")
    THEIRS.mkdir()
    with pytest.raises(UserError, match=r"there is no influence_<i>.pkl"):
        compare(layout, THEIRS, "mine")
    with pytest.raises(UserError, match=r"--method that: the experiment has no such method \(it has text, mine\)"):
        compare(layout, THEIRS, "that")
    write_influence(THEIRS / "influence_0.pkl", np.zeros(N))
    with pytest.raises(UserError, match=r"expected one set of a release's queries, there is test, train"):
        compare(scored(experiment("test", "train")), THEIRS, "mine")
    with pytest.raises(UserError, match=r"text has scored none of the queries in theirs: run `make reproduce EXPERIM"):
        compare(layout, THEIRS, "text")


def written(name: str, content: object) -> Path:
    path = Path(f"influence_{name}.pkl")
    path.write_bytes(pickle.dumps(content))
    return path


def test_files_of_all_queries_are_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layout = scored(experiment("test", "train"))
    with pytest.raises(UserError, match=r"influence_test.pkl is missing: name the published"):
        compare(layout, Path("influence_test.pkl"), "mine")
    with pytest.raises(UserError, match=r"lacks the mapping 'random'"):
        compare(layout, written("test", {"influence": np.zeros((2, N))}), "mine")
    few = {"influence": np.zeros((1, N)), "rank": np.arange(N)[None]}
    with pytest.raises(UserError, match=r"has scores of 1 queries, the experiment has 2"):
        compare(layout, written("test", {"random": few}), "mine")
    own = np.stack([scores_of("test-000"), scores_of("test-001"), np.zeros(N)])
    full = {"influence": own, "rank": np.argsort(-own, axis=1)}
    with pytest.raises(UserError, match=r"has no ranking for test-000 that has each image once, the most influential"):
        compare(layout, written("test", {"random": full | {"rank": np.argsort(own, axis=1)}}), "mine")
    compared = compare(layout, written("test", {"random": full}), "mine")
    assert compared["spearman"].tolist() == pytest.approx([1, 1])
    assert compared["largest_difference"].tolist() == [0, 0]
    images = np.stack([np.arange(100), np.arange(100) + 150])
    subset = np.stack([scores_of(query)[own] for query, own in zip(("train-000", "train-001"), images, strict=True)])
    places = np.argsort(-subset, axis=1)
    content = {"influence_subset": subset, "rank_influence_subset": places}
    content["rank"] = np.take_along_axis(images, places, axis=1)
    compared = compare(layout, written("train", {"random": content}), "mine")
    assert compared["images"].tolist() == [100, 100]
    assert compared["overlap_50"].tolist() == [1, 1]
    assert compared["largest_difference"].isna().all()
    for wrong in (
        {"rank": content["rank"] + N},
        {"rank": content["rank"][:, ::-1] * 0},
        {"rank_influence_subset": places * 0},
        {"rank_influence_subset": places[:, ::-1].copy()},
    ):
        with pytest.raises(
            UserError, match=r"has no ranking for train-000 that|ranks image 399 for train-000, the exp"
        ):
            compare(layout, written("train", {"random": content | wrong}), "mine")


def test_losses_of_the_model_are_compared(layout):
    random = np.random.default_rng(0)
    losses = random.random((2 * N, 4), dtype=np.float32)
    write_arrays(layout.base_scan, {"losses": losses, "timesteps": np.arange(4)}, {})
    theirs = losses.mean(axis=1) - random.random(2 * N)
    np.save("pretrain_loss.npy", theirs)
    found = compare_losses(layout, Path("pretrain_loss.npy"))
    assert found["latents"] == 2 * N
    assert found["spearman"] == pytest.approx(spearmanr(losses.mean(axis=1), theirs).statistic, abs=1e-6)
    assert found["mean_difference"] == pytest.approx((losses.mean(axis=1) - theirs).mean(), rel=1e-5)
    assert found["largest_difference"] == pytest.approx(np.abs(losses.mean(axis=1) - theirs).max(), rel=1e-5)
    for wrong in (theirs[:N], theirs * np.nan, np.arange(2 * N)):
        np.save("pretrain_loss.npy", wrong)
        with pytest.raises(UserError, match=r"pretrain_loss.npy has .*, expected finite losses of shape \(600,\)"):
            compare_losses(layout, Path("pretrain_loss.npy"))
    Path("config").mkdir()
    Path("config/c.yaml").write_text("score: {methods: {random: {}}}")
    done = CliRunner().invoke(app, ["compare-release", "--config", "config/c.yaml"])
    assert "Give --influence" in str(done.exception)
