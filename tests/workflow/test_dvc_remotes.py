"""Data, checkpoints and results through DVC remotes, and parameters changed by DVC.

Over SSH they go through a server on this machine's loopback interface, where FORGETRACE_TEST_SSH=1 says so.
"""

import json
import os
import shutil
from collections.abc import Iterator

import pytest
import yaml

from . import loopback
from .conftest import Checkout, clone_of, copy_of, layout_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def clone_over_ssh(smoke, tmp_path_factory) -> Iterator[Checkout]:
    """The same over SSH, by a name of the user's own SSH configuration."""
    if os.environ.get("FORGETRACE_TEST_SSH") != "1":
        pytest.skip("starts an SSH server of its own: FORGETRACE_TEST_SSH=1")
    folder = tmp_path_factory.mktemp("ssh")
    ours = copy_of(smoke, folder)
    ours("dvc", "remote", "remove", "store", check=False)
    ours.environment["HOME"] = str(folder)
    with loopback.ssh(folder) as host:
        yield clone_of(ours, folder, f"ssh://{host}{folder}/remote")


@pytest.mark.parametrize("remote", ["clone", "clone_over_ssh"])
def test_a_clone_has_the_data_and_the_model_and_nothing_to_do(smoke, request, remote):
    ours, clone = smoke, request.getfixturevalue(remote)
    layout = layout_of(ours)
    for path in (layout.metadata, layout.weights, *layout.snapshots, layout.base_scan):
        assert (clone.folder / path).read_bytes() == (ours.folder / path).read_bytes(), path
    assert clone.planned() == {}
    assert json.loads(clone("dvc", "status", "--json").stdout) == {}
    assert clone("git", "status", "--porcelain").stdout == ""


def test_an_experiment_of_dvc_changes_a_parameter_and_is_compared(smoke, tmp_path):
    checkout = copy_of(smoke, tmp_path)
    table = checkout.folder / layout_of(checkout).table("counterfactual")
    made = table.stat().st_mtime_ns
    checkout("dvc", "exp", "run", "--name", "fewer", "-S", "config/digits.yaml:evaluate.bootstrap=100")
    config = yaml.safe_load((checkout.folder / "config/digits.yaml").read_text(encoding="utf-8"))
    assert config["evaluate"]["bootstrap"] == 100
    assert table.stat().st_mtime_ns > made
    assert checkout.planned() == {}
    _, commit, *_ = json.loads(checkout("dvc", "exp", "show", "--json").stdout)
    (fewer,) = (row for experiment in commit["experiments"] for row in experiment["revs"])
    assert fewer["name"] == "fewer"
    assert [bootstrap(row) for row in (commit, fewer)] == [200, 100]


def bootstrap(row: dict) -> int:
    """A parameter as a row of ``dvc exp show`` has it."""
    return row["data"]["params"]["config/digits.yaml"]["data"]["evaluate"]["bootstrap"]


def test_garbage_collection_keeps_what_the_workspace_and_commits_need(smoke, tmp_path):
    checkout = copy_of(smoke, tmp_path)
    layout = layout_of(checkout)
    stray = checkout.folder / ".dvc/cache/files/md5/00/0123456789abcdef0123456789abcd"
    stray.parent.mkdir(exist_ok=True)
    stray.write_text("of a result that no commit names")
    checkout("dvc", "gc", "--workspace", "--all-commits", "--force")
    assert not stray.exists()
    shutil.rmtree(checkout.folder / layout.model)
    checkout("dvc", "checkout", "--quiet", "train")
    assert (checkout.folder / layout.weights).exists()
