import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgetrace.artifacts import UserError, read_image, read_json, sha256_of
from forgetrace.config import Prepare
from forgetrace.datasets import prepare as module
from forgetrace.datasets.contract import Example
from forgetrace.datasets.prepare import prepare, read_metadata, read_pool, split_captions

SETTINGS = Prepare(tuning_captions=2, report_captions=3)


def some_examples(seed: int) -> list[Example]:
    """Twenty images of ten captions, in an order that is not alphabetical."""
    random = np.random.default_rng(seed)
    return [
        Example(f"z-{(7 * i) % 20:02d}", random.integers(0, 256, (4, 6, 3), dtype=np.uint8), f"a caption, {i % 10}")
        for i in range(20)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(module.SOURCES, "digits", some_examples)
    prepare(SETTINGS, tmp_path / "data")
    return tmp_path / "data"


def test_images_captions_and_order_are_the_sources(folder):
    rows = read_metadata(folder / "metadata.jsonl")
    for row, example in zip(rows, some_examples(0), strict=True):
        assert (row["id"], row["text"]) == (example.id, example.caption)
        np.testing.assert_array_equal(read_image(folder / row["file_name"]), example.image)


def test_held_out_captions_are_never_trained_on(folder):
    rows, manifest = read_metadata(folder / "metadata.jsonl"), read_json(folder / "manifest.json")
    pools = {name: set(captions) for name, captions in manifest["pools"].items()}
    assert {name: len(captions) for name, captions in pools.items()} == {"tuning": 2, "report": 3}
    assert not pools["tuning"] & pools["report"]
    captions = {split: {row["text"] for row in rows if row["split"] == split} for split in ("train", *pools)}
    assert captions["tuning"] == pools["tuning"]
    assert captions["report"] == pools["report"]
    assert not captions["train"] & (pools["tuning"] | pools["report"])
    assert manifest["counts"] == Counter(row["split"] for row in rows) == {"train": 10, "tuning": 4, "report": 6}


@given(st.integers(0, 100), st.integers(1, 8), st.integers(1, 8), st.randoms(use_true_random=False))
def test_pools_do_not_depend_on_the_order_of_the_images(seed, tuning, report, random):
    examples = some_examples(0)
    settings = Prepare(seed=seed, tuning_captions=tuning, report_captions=report)
    if tuning + report >= 10:
        with pytest.raises(UserError, match=r"tuning_captions \+ prepare.report_captions = \d+ leaves nothing"):
            split_captions(examples, settings)
        return
    pools = split_captions(examples, settings)
    assert (len(pools["tuning"]), len(pools["report"])) == (tuning, report)
    assert not set(pools["tuning"]) & set(pools["report"])
    random.shuffle(examples)
    assert split_captions(examples, settings) == pools


def test_a_larger_report_pool_keeps_the_queries_there_are():
    one, two = (
        split_captions(some_examples(0), Prepare(tuning_captions=2, report_captions=count))["report"]
        for count in (3, 5)
    )
    assert two[:3] == one


def test_the_seed_chooses_the_pools():
    settings = (Prepare(seed=seed, tuning_captions=2, report_captions=3) for seed in range(5))
    assert len({tuple(split_captions(some_examples(0), each)["report"]) for each in settings}) > 1


def test_a_rebuild_gives_the_same_bytes_and_the_manifest_says_so(folder, tmp_path):
    prepare(SETTINGS, tmp_path / "again")
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) == 22
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    manifest = read_json(folder / "manifest.json")
    assert manifest["sha256"]["metadata.jsonl"] == sha256_of(folder / "metadata.jsonl")
    assert manifest["image_shape"] == [4, 6, 3]
    assert manifest["settings"] == SETTINGS.model_dump()
    (folder / "images/z-00.png").write_bytes(b"changed")
    other = module._manifest(SETTINGS, some_examples(0), read_metadata(folder / "metadata.jsonl"), {}, folder)
    assert other["sha256"]["images"] != manifest["sha256"]["images"]


def test_the_manifest_is_written_last(folder, monkeypatch):
    (folder / "manifest.json").unlink()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_manifest", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(SETTINGS, folder)
    assert (folder / "metadata.jsonl").is_file()
    assert not (folder / "manifest.json").exists()


def test_a_pool_is_read_in_query_order(folder):
    assert read_pool(folder / "manifest.json", "report") == split_captions(some_examples(0), SETTINGS)["report"]


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'"text"', b"", b'{"id": "a", "file_name": "b", "text": "c"}', b"null", b'{"id": "\xff"}']
)
def test_a_damaged_line_is_named(folder, line):
    path = folder / "metadata.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[11] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"metadata.jsonl, line 12: not a record with id, file_name, text and split"):
        read_metadata(path)


def test_a_caption_may_hold_any_character(folder):
    path = folder / "metadata.jsonl"
    row = {"id": "a", "file_name": "b", "text": "two lines\u2028and \x85 ä\n“", "split": "train"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_metadata(path) == [row]


def test_missing_metadata_say_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*metadata.jsonl \(No such file.*run `snakemake prepare`"):
        read_metadata(tmp_path / "metadata.jsonl")
