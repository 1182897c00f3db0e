import os
import signal
import subprocess
import sys
import time

import pytest

from .conftest import ROOT

SCRIPT = ROOT / "workflow/scripts/clear_stale_lock.py"
WORKFLOW = """
rule slow:
    output: "done.txt"
    shell: "test -e fast || sleep 60; touch {output}"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Snakefile").write_text(WORKFLOW)
    return tmp_path


def clear(folder) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT)], cwd=folder, text=True, capture_output=True)


def snakemake(folder, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--rerun-incomplete"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **quiet, **options)


def wait_for(condition) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("nothing happened for 30 seconds")


def test_nothing_to_clear(folder):
    done = clear(folder)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_live_run_is_left_alone_and_a_killed_ones_lock_is_removed(folder):
    locks = folder / ".snakemake" / "locks"
    run = snakemake(folder)
    try:
        wait_for(lambda: locks.is_dir() and any(locks.iterdir()))
        refused = clear(folder)
        assert refused.returncode == 1
        assert str(run.pid) in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        assert any(locks.iterdir())
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert clear(folder).returncode == 0
    assert not locks.is_dir() or not any(locks.iterdir())
    (folder / "fast").touch()
    assert snakemake(folder).wait(timeout=60) == 0
    assert (folder / "done.txt").exists()


def test_a_job_that_outlived_its_snakemake_counts(folder):
    program = folder / "forgetrace"
    program.write_text("import time; time.sleep(60)")
    job = subprocess.Popen([sys.executable, str(program), "scan"], cwd=folder)
    try:
        assert str(job.pid) in clear(folder).stderr
        assert clear(folder.parent).returncode == 0
    finally:
        job.kill()
        job.wait()
