import json
from pathlib import Path

import numpy as np
import pytest
import torch

from forgetrace.artifacts import UserError
from forgetrace.release.abc import (
    check_cases,
    moved,
    read_calibrator,
    read_case_features,
    read_cases,
    read_features,
    read_heads,
)

from . import abc_files as made
from .abc_files import WIDTH


@pytest.fixture
def folder(tmp_path) -> Path:
    return made.write_benchmark(tmp_path / "abc")


def test_the_files_are_read_as_they_are(folder):
    cases = read_cases(folder / "json/test_art.json")
    assert [case.category for case in cases] == ["bird", "fish"]
    assert [case.class_id for case in cases] == ["m0", "m1"]
    assert [len(case.exemplars) for case in cases] == [1, 3]
    assert {kind: len(files) for kind, files in cases[1].queries.items()} == made.KINDS
    features = read_features(folder / "laion_subset.pth")
    assert torch.equal(features.values, made.background()["feats"])
    assert features.files[3] == "000003.png"
    own, published = read_case_features(folder / "test_art.pth", WIDTH), made.case_features()
    assert own.spans == [(0, 1), (1, 4)]
    assert own.models["media"] == [0, 0, 0, 1, 1, 1]
    assert torch.equal(own.queries["gpt"].values, published["synth_tensors"]["gpt"])
    check_cases(folder / "test_art.pth", own, cases)


def test_heads_are_the_published_maps(folder):
    inputs, published = torch.randn(7, WIDTH), made.heads()
    heads = read_heads(folder / "mapper.pth", WIDTH)
    for applied, name in ((heads.of_training_images, "real_mapper"), (heads.of_generated, "synth_mapper")):
        mapped = inputs @ published[name]["weight"].T + published[name]["bias"]
        torch.testing.assert_close(applied(inputs), mapped / mapped.norm(dim=1, keepdim=True))


def test_the_calibrator_by_hand(folder):
    calibration = read_calibrator(folder / "calibrator.pth")
    assert calibration.sharpness == 20
    assert calibration.cutoff == pytest.approx(0.3)
    # exp(20 (s - 0.9)) - 0.3 of 0.9, 0.85 and 0.5: 0.7, 0.0678794, and nothing.
    found = calibration.probabilities(np.array([0.85, 0.9, 0.5]))
    np.testing.assert_allclose(found, np.array([0.0678794, 0.7, 0.0]) / 0.7678794, rtol=1e-6)


def test_paths_move_by_their_folder_alone():
    assert moved(["dataset/a/dataset/b.png"], "dataset", "/here/abc/") == ["/here/abc/a/dataset/b.png"]
    assert moved(["dataset/a.png"], "dataset/", ".") == ["./a.png"]
    with pytest.raises(UserError, match=r"2 of 3 paths do not begin with dataset/, such as datasets/a\.png"):
        moved(["datasets/a.png", "dataset/a.png", "x/dataset/a.png"], "dataset", "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries[1].pop("class_id"), "entry 1: class_id"),
        (lambda entries: entries[0].update(exemplar="one.jpg"), "entry 0: exemplar"),
        (lambda entries: entries[0].update(exemplar=[]), "in entry 0"),
        (lambda entries: entries[1]["synth"].pop("gpt"), "media, gpt in entry 1"),
        (lambda entries: entries[1]["synth"].update(gpt=[3]), "in entry 1"),
        (lambda entries: entries.clear(), "no list of entries"),
    ],
)
def test_incomplete_cases_are_refused(folder, change, message):
    path, entries = folder / "json/test_art.json", made.cases()
    change(entries)
    path.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_cases(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("synth_ids"), "lacks synth_ids"),
        (lambda c: c.update(exemplar_chunks=[(0, 2), (1, 4)]), "one after the other"),
        (lambda c: c.update(exemplar_chunks=[(0, 1), (1, 3)]), "does not deal its 4 exemplars"),
        (lambda c: c.update(exemplar_chunks=[(0, 1), (1, 1), (1, 4)]), "one after the other"),
        (lambda c: c["synth_ids"].update(gpt=[0, 0, 1, 2]), "of gpt which of 2 models"),
        (lambda c: c["synth_ids"].update(gpt=[0, 0, 1]), "of gpt which of 2 models"),
        (lambda c: c["synth_paths"].pop("gpt"), "different kinds of prompts"),
        (lambda c: c["synth_paths"]["gpt"].pop(), "4 rows and 3 names as synth_tensors of gpt"),
        (lambda c: c.update(exemplar_tensors=torch.zeros(4, WIDTH + 1)), "of width 7, the background has 6"),
        (lambda c: c.update(exemplar_tensors=torch.full((4, WIDTH), torch.nan)), "NaN"),
    ],
)
def test_features_that_do_not_fit_together_are_refused(folder, change, message):
    content = made.case_features()
    change(content)
    torch.save(content, folder / "test_art.pth")
    with pytest.raises(UserError, match=message):
        read_case_features(folder / "test_art.pth", WIDTH)


def test_features_of_other_images_are_refused(folder):
    content = made.case_features()
    content["synth_paths"]["gpt"][2] += "x"
    torch.save(content, folder / "test_art.pth")
    features = read_case_features(folder / "test_art.pth", WIDTH)
    with pytest.raises(UserError, match=r"\(gpt: number 2 differs\)"):
        check_cases(folder / "test_art.pth", features, read_cases(folder / "json/test_art.json"))


@pytest.mark.parametrize(
    "change",
    [
        lambda heads: heads["synth_mapper"].pop("bias"),
        lambda heads: heads["real_mapper"].update(more=torch.zeros(1)),
        lambda heads: heads["real_mapper"].update(weight=torch.zeros(WIDTH, WIDTH + 1)),
    ],
)
def test_every_key_of_the_heads_must_match(folder, change):
    heads = made.heads()
    change(heads)
    torch.save(heads, folder / "mapper.pth")
    with pytest.raises(UserError, match="it is of other features, or damaged"):
        read_heads(folder / "mapper.pth", WIDTH)


@pytest.mark.parametrize(
    "content",
    [
        {"inv_tau": torch.tensor(-1.0), "bias": torch.tensor(0.0)},
        {"inv_tau": torch.tensor(1.0), "bias": torch.tensor(-1000.0)},
        {"inv_tau": torch.zeros(2), "bias": torch.tensor(0.0)},
        {"inv_tau": torch.tensor(1.0), "bias": torch.tensor(0.0), "scale": torch.tensor(1.0)},
        {"bias": torch.tensor(0.0)},
    ],
)
def test_a_calibrator_of_other_numbers_is_refused(folder, content):
    torch.save(content, folder / "calibrator.pth")
    with pytest.raises(UserError, match=r"calibrator\.pth"):
        read_calibrator(folder / "calibrator.pth")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize(
    "read",
    [
        read_features,
        lambda path: read_case_features(path, WIDTH),
        lambda path: read_heads(path, WIDTH),
        read_calibrator,
    ],
)
def test_nothing_of_a_file_is_run(tmp_path, read):
    torch.save({"feats": Evil(), "inv_tau": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth cannot be read as tensors alone"):
        read(tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"missing\.pth is missing"):
        read(tmp_path / "missing.pth")
