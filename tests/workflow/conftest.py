"""Running the real Snakefile from a test, in a folder of the test's own."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from forgetrace.layout import Layout, load_layout

ROOT = Path(__file__).parents[2]
REPRODUCE = ("make", "-o", "environment", "reproduce")  # in the environment of the tests instead of one of its own
# What a clone needs to run; data, results and the environment are the test's own.
PARTS = (
    ".dvc/config", ".dvcignore", ".gitignore", "Makefile", "Snakefile", "config", "dvc.yaml", "profiles",
    "requirements.lock", "pyproject.toml", "src", "workflow",
)  # fmt: skip


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    """Return as soon as the condition holds; fail where it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing happened for {seconds} seconds"
        time.sleep(0.02)


class Checkout:
    """A copy of the repository and the commands a user would type in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {
            # A make started by these tests knows nothing of the `make test` around them.
            **{key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(folder / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    @classmethod
    def create(cls, folder: Path) -> "Checkout":
        """Copy the repository's files to ``folder``."""
        for part in PARTS:
            target = folder / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(ROOT / part, target)
        return cls(folder)

    def __call__(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        """Run a command here; with ``check`` a failure fails the test and shows what it printed."""
        done = subprocess.run(command, cwd=self.folder, env=self.environment, text=True, capture_output=True)
        if check:
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *command: str, stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
        """Start a command in a process group of its own, to be killed with everything it started."""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
        )

    def planned(self, *arguments: str) -> dict[str, int]:
        """Rules a dry run would run, with their number of jobs; empty where there is nothing to do."""
        lines = self("snakemake", "-n", *arguments).stdout.splitlines()
        if "Job stats:" not in lines:
            return {}
        start = lines.index("Job stats:") + 3
        table = (line.split() for line in lines[start : lines.index("", start)])
        return {rule: int(count) for rule, count in table if rule not in ("total", "all")}

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace ``old``, which must occur, in a file."""
        file = self.folder / path
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Checkout:
    """A checkout in which nothing has run, for dry runs; its folder's name has a space."""
    return Checkout.create(tmp_path_factory.mktemp("checkout") / "a clone")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory) -> Checkout:
    """A checkout in which the whole smoke experiment has run and is in git."""
    checkout = Checkout.create(tmp_path_factory.mktemp("smoke") / "a run")
    shutil.copy(checkout.folder / "config/smoke.yaml", checkout.folder / "config/digits.yaml")
    checkout("snakemake", "--cores", "2")
    checkout("git", "init", "--quiet")
    for key, value in (("user.name", "Test"), ("user.email", "test@example.org")):
        checkout("git", "config", key, value)
    checkout("dvc", "add", "--quiet", "data")
    checkout("dvc", "commit", "--quiet", "--force")
    commit(checkout)
    return checkout


def commit(checkout: Checkout) -> None:
    checkout("git", "add", "--all")
    checkout("git", "commit", "--quiet", "--message", "state")


def layout_of(checkout: Checkout, experiment: str = "digits") -> Layout:
    return load_layout(checkout.folder / f"config/{experiment}.yaml")


@contextmanager
def edited(checkout: Checkout, path: str, old: str, new: str):
    """A file changed for the length of a block."""
    file = checkout.folder / path
    before = file.read_bytes()
    checkout.edit(path, old, new)
    try:
        yield
    finally:
        file.write_bytes(before)


def copy_of(checkout: Checkout, folder: Path) -> Checkout:
    """A second checkout in the same state."""
    shutil.copytree(checkout.folder, folder / "a copy")
    return Checkout(folder / "a copy")


@pytest.fixture(scope="session")
def clone(smoke, tmp_path_factory) -> Checkout:
    """A fresh clone that has pulled from a DVC remote in a folder."""
    folder = tmp_path_factory.mktemp("clone")
    return clone_of(smoke, folder, str(folder / "remote"))


def clone_of(checkout: Checkout, folder: Path, remote: str) -> Checkout:
    """Push to a DVC remote, clone into ``folder`` and pull there with ``make pull``."""
    checkout("dvc", "remote", "add", "--quiet", "--default", "store", remote)
    commit(checkout)
    checkout("dvc", "push", "--quiet")
    checkout("git", "clone", "--quiet", str(checkout.folder), str(folder / "a clone"))
    clone = Checkout(folder / "a clone")
    clone.environment["HOME"] = checkout.environment["HOME"]
    pull(clone)
    return clone


def pull(checkout: Checkout, check: bool = True) -> subprocess.CompletedProcess:
    """``make pull`` in the environment of the tests."""
    return checkout("make", "-o", "environment", "pull", check=check)
