"""``data.dvc`` describes what ``prepare`` builds: the same bytes on every machine."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import yaml

from forgetrace.config import Prepare
from forgetrace.datasets.prepare import prepare
from forgetrace.layout import load_layout

from .conftest import Checkout

ROOT = Path(__file__).parents[2]


def dvc_folder_hash(folder: Path) -> str:
    """The hash DVC gives a folder: of the sorted list of its files and their MD5 sums."""
    rows = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.relative_to(folder).as_posix()}
        for path in folder.rglob("*")
        if path.is_file()
    ]
    listing = json.dumps(sorted(rows, key=lambda row: row["relpath"]), sort_keys=True)
    return hashlib.md5(listing.encode()).hexdigest() + ".dir"


def test_a_rebuild_of_the_data_has_the_hash_dvc_tracks(tmp_path):
    layout = load_layout(ROOT / "config/digits.yaml")
    prepare(layout.config.prepare, tmp_path / layout.data)
    tracked = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"][0]
    assert tracked["path"] == "data"
    assert dvc_folder_hash(tmp_path / "data") == tracked["md5"]


def test_data_of_other_settings_do_not_change_what_dvc_tracks(tmp_path):
    checkout = Checkout.create(tmp_path)
    checkout("git", "init", "--quiet")
    ours = load_layout(ROOT / "config/digits.yaml")
    prepare = ours.config.prepare.model_copy(update={"seed": 1})
    other = replace(ours, config=ours.config.model_copy(update={"prepare": prepare}))
    assert checkout("dvc", "check-ignore", other.data_manifest, check=False).returncode == 0
    assert checkout("dvc", "check-ignore", ours.data_manifest, check=False).returncode == 1


def test_neither_do_ones_own_data(tmp_path):
    checkout = Checkout.create(tmp_path)
    checkout("git", "init", "--quiet")
    ours = load_layout(ROOT / "config/digits.yaml")
    own = replace(ours, config=ours.config.model_copy(update={"prepare": Prepare(dataset="coco", path="../COCO")}))
    assert checkout("dvc", "check-ignore", own.data_manifest, check=False).returncode == 0
    assert checkout("git", "check-ignore", own.data_manifest, check=False).returncode == 0
