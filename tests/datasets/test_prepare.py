import json
import shutil
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetrace.artifacts import UserError, read_image, read_json, sha256_of
from forgetrace.config import Prepare
from forgetrace.datasets import prepare as module
from forgetrace.datasets.contract import Example
from forgetrace.datasets.prepare import prepare, read_metadata, read_pool, split_captions

from .pictures import write_folder

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
    chosen = Prepare(seed=seed, tuning_captions=tuning, report_captions=report)
    if tuning + report >= 10:
        with pytest.raises(UserError, match=r"tuning_captions \+ prepare.report_captions = \d+ leaves nothing"):
            split_captions(examples, chosen)
        return
    pools = split_captions(examples, chosen)
    assert (len(pools["tuning"]), len(pools["report"])) == (tuning, report)
    assert not set(pools["tuning"]) & set(pools["report"])
    random.shuffle(examples)
    assert split_captions(examples, chosen) == pools


def test_a_larger_report_pool_keeps_the_queries_there_are():
    one, two = (
        split_captions(some_examples(0), Prepare(tuning_captions=2, report_captions=count))["report"]
        for count in (3, 5)
    )
    assert two[:3] == one


def test_the_seed_chooses_the_pools():
    seeds = (Prepare(seed=seed, tuning_captions=2, report_captions=3) for seed in range(5))
    assert len({tuple(split_captions(some_examples(0), each)["report"]) for each in seeds}) > 1


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


def own(path: Path, **settings) -> Prepare:
    return Prepare(dataset="folder", path=str(path), size=8, **{"tuning_captions": 1, "report_captions": 1, **settings})


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Six images in two folders; ``b`` and ``c`` share a caption, and so do ``c`` and ``d``."""
    captions = {"sub/ä.png": "one", "b.jpg": ["two", "three"], "c.png": ["three", "four"], "d.png": ["five", "four"]}
    return write_folder(tmp_path / "my pictures", captions | {"e.png": "six", "f.png": "seven"})


def test_own_images_stay_where_they_are(pictures, tmp_path):
    before = {path: path.read_bytes() for path in pictures.rglob("*") if path.is_file()}
    prepare(own(pictures), tmp_path / "data")
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"metadata.jsonl", "manifest.json"}
    assert {path: path.read_bytes() for path in pictures.rglob("*") if path.is_file()} == before
    rows, manifest = read_metadata(tmp_path / "data/metadata.jsonl"), read_json(tmp_path / "data/manifest.json")
    assert [row["id"] for row in rows] == ["sub/ä.png", "b.jpg", "c.png", "d.png", "e.png", "f.png"]
    assert [row["text"] for row in rows[:2]] == ["one", ["two", "three"]]
    assert [row["sha256"] for row in rows] == [sha256_of(pictures / row["file_name"]) for row in rows]
    assert manifest["image_shape"] == [8, 8, 3]


@settings(max_examples=20)
@given(st.integers(0, 50))
def test_an_image_with_any_held_out_caption_is_never_trained_on(tmp_path_factory, seed):
    folder = tmp_path_factory.mktemp("own")
    captions = {f"{i}.png": [f"caption {i}", f"caption {i + 1}"] for i in range(8)}
    prepare(own(write_folder(folder / "in", captions), seed=seed, report_captions=2), folder / "out", look=False)
    pools = read_json(folder / "out/manifest.json")["pools"]
    for row in read_metadata(folder / "out/metadata.jsonl"):
        held_out = {pool for pool, captions in pools.items() if set(captions) & set(row["text"])}
        assert row["split"] in (held_out or {"train"})


def test_pools_may_be_empty(pictures, tmp_path):
    prepare(own(pictures, tuning_captions=0, report_captions=0), tmp_path / "data")
    manifest = read_json(tmp_path / "data/manifest.json")
    assert manifest["pools"] == {"tuning": [], "report": []}
    assert manifest["counts"] == {"train": 6}


def test_captions_of_all_images_cannot_be_held_out(tmp_path):
    """Fewer captions than there are, and yet one of every image."""
    folder = write_folder(tmp_path / "in", {"a.png": ["all", "one"], "b.png": ["all", "two"]})
    held = [own(folder, seed=seed, tuning_captions=0) for seed in range(20)]
    outcomes = set()
    for each in held:
        try:
            prepare(each, tmp_path / "out", look=False)
            outcomes.add("trained")
        except UserError as error:
            outcomes.add(str(error).partition(":")[0])
    nothing = "prepare.tuning_captions + prepare.report_captions = 1 leaves nothing to train on"
    assert outcomes == {"trained", nothing}


def test_what_cannot_be_used_is_told_all_at_once(pictures, tmp_path):
    with open(pictures / "metadata.jsonl", "a", encoding="utf-8") as lines:
        lines.write('{"file_name": "none.png", "text": "a"}\n{\n')
    (pictures / "b.jpg").write_bytes((pictures / "b.jpg").read_bytes()[:300])
    (pictures / "d.png").write_text("no image")
    with pytest.raises(UserError) as error:
        prepare(own(pictures), tmp_path / "data")
    first, *problems = str(error.value).split("\n  ")
    assert first == f"{pictures}/metadata.jsonl: mend or remove what cannot be used (4), then run again:"
    for problem, start in zip(
        problems, ["line 2: b.jpg", "line 4: d.png", "line 7: the", "line 8: is no"], strict=True
    ):
        assert problem.startswith(start)
    assert "cannot be read as an image (" in problems[0]
    assert not (tmp_path / "data").exists()


def test_a_list_of_nothing_says_so(tmp_path):
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"metadata.jsonl lists no image"):
        prepare(own(tmp_path), tmp_path / "data")


def test_data_that_moved_as_a_whole_are_the_same_data(pictures, tmp_path):
    prepare(own(pictures), tmp_path / "one")
    shutil.move(pictures, tmp_path / "elsewhere")
    prepare(own(tmp_path / "elsewhere"), tmp_path / "two")
    for name in ("metadata.jsonl", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_image_under_the_same_name_is_other_data(pictures, tmp_path):
    prepare(own(pictures), tmp_path / "data")
    before = read_json(tmp_path / "data/manifest.json")["sha256"]["images"]
    shutil.copy(pictures / "e.png", pictures / "f.png")
    prepare(own(pictures), tmp_path / "data")
    assert read_json(tmp_path / "data/manifest.json")["sha256"]["images"] != before


def test_one_image_at_a_time_is_in_memory(tmp_path, monkeypatch):
    alive, most, real = {}, [], module.decoded

    def watched(content: bytes):
        image = real(content)
        alive[id(image)] = True
        weakref.finalize(image, alive.pop, id(image))
        most.append(len(alive))
        return image

    monkeypatch.setattr(module, "decoded", watched)
    prepare(own(write_folder(tmp_path / "in", {f"{i}.png": f"caption {i}" for i in range(30)})), tmp_path / "out")
    assert len(most) == 30
    assert max(most) <= 2
