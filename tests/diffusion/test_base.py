"""θ0 and queries that are there: kept whatever machine they are of, made again where the recipe is another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import read_json, read_tensors, sha256_of, write_json, write_tensors
from forgetrace.diffusion import base, synthesis, training
from forgetrace.diffusion.base import train_base
from forgetrace.diffusion.device import resolve_precision
from forgetrace.diffusion.synthesis import synthesize
from forgetrace.diffusion.training import Training
from forgetrace.encoding.store import load_encoded
from forgetrace.layout import BASE

from ..conftest import IMAGES, settings


def of_another_machine(layout) -> None:
    """The same θ0 with other rounding, and captions of other rounding."""
    weights = read_tensors(layout.weights)
    write_tensors(layout.weights, {name: value * (1 + 1e-6) for name, value in weights.items()}, {})
    write_json(layout.recipe, read_json(layout.recipe) | {"sha256": sha256_of(layout.weights)})
    encoded_elsewhere(layout)


def encoded_elsewhere(layout) -> None:
    """Captions of other rounding."""
    np.save(layout.captions, np.load(layout.captions) * np.float32(1 + 1e-6))
    manifest = read_json(layout.encode_manifest)
    manifest["sha256"]["captions"] = sha256_of(layout.captions)
    write_json(layout.encode_manifest, manifest)


@pytest.fixture
def untrained(monkeypatch):
    def train(*arguments):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(base, "train", train)


def test_a_theta0_of_another_machine_is_kept(tiny, untrained, caplog):
    of_another_machine(tiny)
    before = {path: Path(path).read_bytes() for path in (*tiny.model_files, *tiny.snapshots, tiny.curve, tiny.recipe)}
    train_base(tiny, "cpu")
    assert {path: Path(path).read_bytes() for path in before} == before
    assert "already there" in caplog.text


@pytest.mark.parametrize("change", ["recipe", "seed", "snapshot", "curve", "torn", "mixed"])
def test_any_other_theta0_is_trained(tiny, untrained, change):
    layout = tiny
    if change == "recipe":
        layout = replace(tiny, config=settings(train={"learning_rate": 1e-3}))
    elif change == "seed":
        layout = replace(tiny, config=tiny.config.model_copy(update={"seed": 6}))
    elif change == "torn":
        write_json(tiny.recipe, {})
    elif change == "mixed":  # two machines' files
        write_tensors(tiny.weights, read_tensors(tiny.weights), {"other": 1})
    else:
        Path({"snapshot": tiny.snapshots[0], "curve": tiny.curve}[change]).unlink()
    with pytest.raises(AssertionError, match="trained again"):
        train_base(layout, "cpu")


def test_a_theta0_without_a_snapshot_is_not_made_again_without_a_word(tiny, untrained, caplog):
    Path(tiny.snapshots[0]).unlink()
    with pytest.raises(AssertionError, match="trained again"):
        train_base(tiny, "cpu")
    assert f"without {tiny.snapshots[0]}: made again" in caplog.text


def test_the_precision_that_is_left_open_is_theta0s(tiny, monkeypatch, caplog):
    """A retraining on a node with other hardware is compared with that model."""
    monkeypatch.setattr(training, "native_bf16", lambda device: False)
    of = lambda layout: training.precision_of(layout, torch.device("cpu"))  # noqa: E731
    open_ = replace(tiny, config=settings(train={"precision": "auto"}))
    own = Training(BASE, 5, np.zeros(IMAGES, dtype=bool))
    write_json(tiny.recipe, {"precision": "bf16", "key": training.training_key(open_, own, "bf16")})
    assert of(open_) == "bf16"
    monkeypatch.delattr(training, "Accelerator")  # of which a process has one, with one precision
    with pytest.raises(NameError):
        training.begin(open_, load_encoded(tiny), [own], "cpu")
    assert "slow on this" in caplog.text
    assert of(replace(tiny, config=settings(train={"precision": "fp32"}))) == "fp32"
    left = resolve_precision("auto", torch.device("cpu"))
    assert of(replace(tiny, config=settings(train={"precision": "auto", "steps": 9}))) == left  # another θ0 to come
    for torn in ("{}", "no JSON"):
        Path(tiny.recipe).write_text(torn)
        assert of(open_) == left


def test_a_query_is_kept_with_the_theta0_that_made_it(tiny, monkeypatch):
    def generate(*arguments):
        raise AssertionError("it was generated again")

    monkeypatch.setattr(synthesis, "generate_query", generate)
    files = tiny.query("report-00")
    before = {role: Path(path).read_bytes() for role, path in files.items()}
    encoded_elsewhere(tiny)
    synthesize(tiny, "report-00", "cpu")
    assert {role: Path(path).read_bytes() for role, path in files.items()} == before
    of_another_machine(tiny)  # another θ0
    with pytest.raises(AssertionError, match="generated again"):
        synthesize(tiny, "report-00", "cpu")


def test_an_old_record_does_not_vouch_for_files_of_a_run_that_was_killed(tiny, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    other = replace(tiny, config=settings(synthesize={"guidance": 2.0}))
    with monkeypatch.context() as patch:
        patch.setattr(synthesis, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            synthesize(other, "report-00", "cpu")
    before = read_json(tiny.query("report-01")["record"])
    synthesize(tiny, "report-00", "cpu")
    assert read_json(tiny.query("report-00")["record"])["guidance"] == before["guidance"]
    recipe = tiny.recipe
    with monkeypatch.context() as patch:
        patch.setattr(base, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            train_base(replace(tiny, config=settings(train={"learning_rate": 1e-3})), "cpu")
    assert not Path(recipe).exists()


def test_a_query_of_other_settings_is_generated_again(tiny):
    before = read_json(tiny.query("report-00")["record"])
    other = replace(tiny, config=settings(synthesize={"guidance": 2.0}))
    synthesize(other, "report-00", "cpu")
    after = read_json(tiny.query("report-00")["record"])
    assert (before["guidance"], after["guidance"]) == (tiny.config.synthesize.guidance, 2)
    assert before["key"] != after["key"]
    Path(tiny.query("report-01")["image"]).unlink()
    synthesize(tiny, "report-01", "cpu")
    assert Path(tiny.query("report-01")["image"]).exists()
