import errno
import json
import os
import signal
import stat
import subprocess
import time
from contextlib import suppress
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgetrace import artifacts
from forgetrace.artifacts import (
    UserError,
    atomic,
    fingerprint,
    on_disk,
    provenance,
    read_array,
    read_arrays,
    read_image,
    read_json,
    read_table,
    read_tensors,
    sha256_of,
    write_array,
    write_array_in_parts,
    write_arrays,
    write_image,
    write_json,
    write_table,
    write_tensors,
)

from .conftest import in_child

MADE_BY = {"config": {"seed": 3}}
NUMBERS = np.arange(24, dtype=np.float32).reshape(4, 6)
PIXELS = np.random.default_rng(0).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)


def tensors() -> dict:
    import torch

    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float64)}


WRITERS = {
    "x.json": lambda path: write_json(path, {"a": [1, 2.5, "ä"]}),
    "x.npy": lambda path: write_array(path, NUMBERS),
    "x.npz": lambda path: write_arrays(path, {"a": NUMBERS, "b": np.array([True])}, MADE_BY),
    "x.safetensors": lambda path: write_tensors(path, tensors(), MADE_BY),
    "x.parquet": lambda path: write_table(path, pd.DataFrame({"id": ["a", "b"], "n": [1, 2]}), MADE_BY),
    "x.csv": lambda path: write_table(path, pd.DataFrame({"id": ["a", "b"], "n": [1.5, 2]})),
    "x.png": lambda path: write_image(path, PIXELS),
}
READERS = {
    "x.json": read_json,
    "x.npy": read_array,
    "x.npz": read_arrays,
    "x.safetensors": read_tensors,
    "x.parquet": read_table,
    "x.csv": read_table,
    "x.png": read_image,
}


# round trips


def test_json_round_trip_is_readable_utf8(tmp_path):
    content = {"b": [1, 2.5, None], "a": {"ä": "“θ”"}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    assert "“θ”" in (tmp_path / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("mmap", [False, True])
def test_array_round_trip(tmp_path, mmap):
    write_array(tmp_path / "x.npy", NUMBERS)
    found = read_array(tmp_path / "x.npy", mmap=mmap)
    assert isinstance(found, np.memmap) == mmap
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, NUMBERS)


def test_arrays_round_trip_leaves_provenance_aside(tmp_path):
    WRITERS["x.npz"](tmp_path / "x.npz")
    found = read_arrays(tmp_path / "x.npz")
    assert found.keys() == {"a", "b"}
    np.testing.assert_array_equal(found["a"], NUMBERS)
    with np.load(tmp_path / "x.npz") as content:
        assert json.loads(str(content["provenance"])) == MADE_BY


def test_tensors_round_trip_also_of_views(tmp_path):
    import torch
    from safetensors import safe_open

    base = torch.arange(12.0).reshape(3, 4)
    views = {"transposed": base.T, "row": base[1], "same": base[1], "grad": torch.nn.Parameter(base)}
    write_tensors(tmp_path / "x.safetensors", views, MADE_BY)
    found = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], views[name]) for name in views)
    with safe_open(tmp_path / "x.safetensors", "pt") as content:
        assert json.loads(content.metadata()["provenance"]) == MADE_BY


def test_table_round_trip(tmp_path):
    table = pd.DataFrame({"id": ["a", "b"], "score": [0.1, -2.0], "rank": [1, 2]})
    write_table(tmp_path / "x.parquet", table, MADE_BY)
    found = read_table(tmp_path / "x.parquet")
    pd.testing.assert_frame_equal(found, table)
    assert found.attrs == {"provenance": MADE_BY}
    assert table.attrs == {}
    write_table(tmp_path / "x.csv", table)
    assert (tmp_path / "x.csv").read_text() == "id,score,rank\na,0.1,1\nb,-2,2\n"
    pd.testing.assert_frame_equal(read_table(tmp_path / "x.csv"), table)


def test_image_round_trip_is_lossless_and_its_bytes_are_stable(tmp_path):
    """The golden hash is that of a stored (not deflated) PNG: any zlib writes these bytes."""
    write_image(tmp_path / "x.png", PIXELS)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), PIXELS)
    gradient = np.arange(16 * 16 * 3, dtype=np.uint16).reshape(16, 16, 3).astype(np.uint8)
    write_image(tmp_path / "y.png", gradient)
    assert sha256_of(tmp_path / "y.png") == "f054f412bb6187befa9c3bbe37b1da1f6d99a3312d20186fa96e09e8a602f6c7"


def test_images_of_other_modes_are_read_as_rgb(tmp_path):
    from PIL import Image

    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "gray.png")
    assert read_image(tmp_path / "gray.png").shape == (16, 16, 3)


# atomicity


def test_nothing_is_left_after_an_exception(tmp_path):
    def fail() -> None:
        with atomic(tmp_path / "x.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_the_old_file_survives_a_failed_write(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": True})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert read_json(path) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_leaves_nothing_that_looks_finished(tmp_path, existing):
    path = tmp_path / "new" / "x.txt"
    if existing:
        write_json(path, "old")

    def killed() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == signal.SIGKILL
    assert path.exists() == existing
    if existing:
        assert read_json(path) == "old"
    # What is left is hidden, and in nobody's way.
    assert all(name.startswith(".") for name in os.listdir(path.parent) if name != "x.txt")
    write_json(path, "new")
    assert read_json(path) == "new"


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, 1)
    with atomic(path) as temporary:
        temporary.write_text("ha")
        assert read_json(path) == 1
        assert temporary.parent == path.parent  # a rename within one file system
        temporary.write_text("2")
    assert read_json(path) == 2


# full disks, folders one may not write to


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


LARGE = {
    "x.json": lambda path: write_json(path, "x" * 200_000),
    "x.npy": lambda path: write_array(path, np.zeros(50_000)),
    "x.npz": lambda path: write_arrays(path, {"a": np.zeros(50_000)}, {}),
    "x.safetensors": lambda path: write_tensors(path, {"a": __import__("torch").zeros(50_000)}, {}),
    "x.parquet": lambda path: write_table(path, pd.DataFrame({"a": np.random.default_rng(0).random(50_000)})),
    "x.csv": lambda path: write_table(path, pd.DataFrame({"a": np.zeros(50_000)})),
    "x.png": lambda path: write_image(path, np.zeros((256, 256, 3), np.uint8)),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(small_disk, name):
    WRITERS[name](small_disk / name)
    before = (small_disk / name).read_bytes()
    with pytest.raises(UserError, match=rf"^Cannot write \S*{name}: the disk is full; free some space"):
        LARGE[name](small_disk / name)
    assert (small_disk / name).read_bytes() == before
    assert os.listdir(small_disk) == [name]


def test_a_checkpoint_on_a_full_disk_is_the_same_sentence(small_disk):
    import torch

    def save() -> None:
        with atomic(small_disk / "last.pt") as temporary, open(temporary, "wb") as out:
            torch.save({"weights": torch.zeros(50_000)}, out)

    with pytest.raises(UserError, match="the disk is full"):
        save()
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_without_one(tmp_path, monkeypatch, code):
    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_json(tmp_path / "x.json", 1)
    assert list(tmp_path.iterdir()) == []


def as_ordinary_user(action) -> int:
    """Run an action in a child without root's rights."""

    def dropped() -> None:
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        action()

    return in_child(dropped)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("place", ["", "new/"])
def test_a_read_only_folder_is_one_sentence(tmp_path, monkeypatch, name, place):
    folder = tmp_path / "read only"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
    # Below pytest's own folder, which an ordinary user cannot enter.
    monkeypatch.chdir(folder)

    def write() -> None:
        with pytest.raises(UserError, match=rf"^Cannot write {place}{name}: no permission to write there; check"):
            WRITERS[name](f"{place}{name}")

    assert as_ordinary_user(write) == 0
    assert os.listdir(folder) == []


def test_an_unreadable_file_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json("x.json", 1)
    os.chmod("x.json", 0)

    def read() -> None:
        with pytest.raises(UserError, match=r"^x.json cannot be read: check its owner and mode"):
            read_json("x.json")

    assert as_ordinary_user(read) == 0


def test_a_file_in_the_place_of_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "results").write_text("")
    for place in ("results/x.json", "results/deeper/x.json"):
        with pytest.raises(UserError, match="a file stands where one of its folders should be"):
            write_json(tmp_path / place, 1)


def test_other_errors_are_not_the_disks(tmp_path):
    with pytest.raises(ValueError, match="mine"), atomic(tmp_path / "x"):
        raise ValueError("mine")


# damaged files


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_names_itself_and_the_way_out(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name} is missing: run the stage that makes it, or `make reproduce`"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", sorted(set(READERS) - {"x.csv"}))
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9])
def test_a_truncated_file_names_itself(tmp_path, name, share):
    WRITERS[name](tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=rf"{name} is damaged \(.+\): delete it and run again to rebuild it"):
        READERS[name](tmp_path / name)


def test_names_that_look_like_numbers_or_nothing_are_names(tmp_path):
    table = pd.DataFrame({"query": ["001", "null"], "method": ["1e3", "NA"], "k": [1, 2], "value": [np.nan, 2.5]})
    write_table(tmp_path / "x.csv", table)
    found = read_table(tmp_path / "x.csv")
    assert found[["query", "method"]].to_numpy().tolist() == [["001", "1e3"], ["null", "NA"]]
    assert found["k"].tolist() == [1, 2]
    assert np.isnan(found["value"][0])


def test_an_empty_csv_names_itself(tmp_path):
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(UserError, match=r"x.csv is damaged"):
        read_table(tmp_path / "x.csv")


def test_a_truncated_array_is_noticed_when_it_is_mapped(tmp_path):
    write_array(tmp_path / "x.npy", NUMBERS)
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"x.npy is damaged"):
        read_array(tmp_path / "x.npy", mmap=True)


@pytest.mark.parametrize("name", sorted(READERS))
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60)
def test_a_flipped_bit_gives_a_sentence_or_a_value_but_never_a_traceback(tmp_path_factory, name, place, bit):
    path = tmp_path_factory.getbasetemp() / name
    WRITERS[name](path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    # Not every flip can be noticed: some formats hold no checksum.
    with suppress(UserError):
        READERS[name](path)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60)
def test_a_flipped_bit_in_the_values_of_named_arrays_is_noticed(tmp_path_factory, place, bit):
    """Scans and queries are checksummed: a flip there never becomes a score."""
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    write_arrays(path, {"a": NUMBERS}, MADE_BY)
    content = bytearray(path.read_bytes())
    start = content.index(NUMBERS.tobytes())
    content[start + int(place * NUMBERS.nbytes)] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"flipped.npz is damaged"):
        read_arrays(path)


def test_a_missing_package_is_not_called_damage(tmp_path, monkeypatch):
    write_table(tmp_path / "x.parquet", pd.DataFrame({"a": [1]}))

    def missing(*_):
        raise ImportError("no engine")

    monkeypatch.setattr(pd, "read_parquet", missing)
    with pytest.raises(ImportError, match="no engine"):
        read_table(tmp_path / "x.parquet")


# hashes and provenance


def test_hashes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(UserError, match="y is missing"):
        sha256_of(tmp_path / "y")
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file as large as those whose hash is remembered, in a folder where the workflow has run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(artifacts, "LARGE", 3)
    monkeypatch.setattr(artifacts, "SETTLED", -1)
    (tmp_path / ".snakemake").mkdir()
    (tmp_path / "x").write_text("abc")
    return tmp_path / "x"


def remembered(folder) -> list:
    return sorted((folder / ".snakemake").rglob("*.json"))


def test_a_large_file_is_hashed_once(large, monkeypatch):
    found = sha256_of(large)
    monkeypatch.setattr("hashlib.file_digest", None)
    assert sha256_of(large) == sha256_of("x") == found
    assert read_json(remembered(large.parent)[0])["sha256"] == found


def test_a_changed_file_is_hashed_again(large):
    before, status = sha256_of(large), large.stat()
    time.sleep(0.02)  # dates advance by a few milliseconds at a time
    large.write_text("abd")  # the same size
    changed = sha256_of(large)
    assert changed != before
    time.sleep(0.02)
    large.write_text("abc")
    os.utime(large, ns=(status.st_atime_ns, status.st_mtime_ns))  # and a date that was put back
    assert sha256_of(large) == before
    other = large.with_name("y")
    other.write_text("abd")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(large)
    assert sha256_of(large) == changed


@pytest.mark.parametrize("content", ["", "[]", '{"state": 1}', "no json"])
def test_a_damaged_memory_is_as_none(large, content):
    found = sha256_of(large)
    remembered(large.parent)[0].write_text(content)
    assert sha256_of(large) == found
    assert read_json(remembered(large.parent)[0])["sha256"] == found


def test_what_is_not_remembered(large, monkeypatch):
    monkeypatch.setattr(artifacts, "SETTLED", 3600)  # another change may leave the same date
    sha256_of(large)
    monkeypatch.undo()
    monkeypatch.chdir(large.parent)
    sha256_of(large)  # a small file
    assert remembered(large.parent) == []
    monkeypatch.setattr(artifacts, "LARGE", 3)
    (large.parent / ".snakemake").rmdir()
    assert sha256_of(large) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert not (large.parent / ".snakemake").exists()


def test_a_folder_that_cannot_be_written_to_costs_no_more_than_time(large):
    (large.parent / ".snakemake/hashes").write_text("a file in its place")
    assert sha256_of(large) == sha256_of(large)


def test_provenance_holds_config_packages_and_input_hashes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    made_by = provenance({"seed": 1}, {"weights": tmp_path / "x"})
    assert made_by["config"] == {"seed": 1}
    assert made_by["inputs"] == {"weights": sha256_of(tmp_path / "x")}
    assert made_by["packages"]["torch"] == version("torch")
    assert made_by["packages"]["forgetrace"] == version("forgetrace")
    assert provenance({})["inputs"] == {}
    json.dumps(made_by)


def test_a_missing_package_is_left_out(monkeypatch):
    monkeypatch.setattr(artifacts, "RECORDED_PACKAGES", ("numpy", "no-such-package"))
    assert provenance({})["packages"] == {"numpy": np.__version__}


@given(st.lists(st.integers(0, 4), max_size=5), st.integers(0, 3))
def test_an_array_in_parts_has_the_bytes_of_the_whole(tmp_path_factory, sizes, width):
    folder = tmp_path_factory.mktemp("parts")
    whole = np.random.default_rng(0).standard_normal((sum(sizes), width), dtype=np.float32)
    parts = iter(np.split(whole, np.cumsum(sizes)[:-1]) if sizes else [])
    write_array(folder / "whole.npy", whole)
    write_array_in_parts(folder / "parts.npy", whole.shape, parts)
    assert (folder / "parts.npy").read_bytes() == (folder / "whole.npy").read_bytes()


def test_an_array_whose_parts_fail_is_not_there(tmp_path):
    def parts():
        yield np.zeros((1, 2))
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_array_in_parts(tmp_path / "a.npy", (2, 2), parts())
    assert not list(tmp_path.iterdir())


def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    """A private, writable map counts as memory, and is refused where there is not so much."""
    path = tmp_path / "large.npy"
    numbers = 2**42 // 4
    with open(path, "wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (numbers,)})
        out.truncate(out.tell() + 4 * numbers)  # a hole, of no size on disk
    array = read_array(path, mmap=True)
    assert array.shape == (numbers,)
    assert array[-1] == 0
    assert float(on_disk(array)[-1]) == 0
