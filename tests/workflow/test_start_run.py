"""Starting a run: alone in its folder, past the lock of a killed one, and never beside a living one."""

import os
import signal
import stat
import subprocess
import sys

import pytest

from .conftest import ROOT, wait_for

SCRIPT = ROOT / "workflow/scripts/start_run.py"
WORKFLOW = """
rule slow:
    output: "done.txt"
    shell: "test -e fast || sleep 600; touch {output}"
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Snakefile").write_text(WORKFLOW)
    (tmp_path / "config.yaml").write_text("seed: 0")
    return tmp_path


def start(folder, umask: int = -1, **environment) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), "config.yaml", "--cores", "1", "--rerun-incomplete", "--quiet", "all"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | environment, start_new_session=True, umask=umask, **pipes
    )


def kill(run: subprocess.Popen) -> None:
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


def locks(folder) -> list:
    return list((folder / ".snakemake/locks").glob("*"))


def refused(run: subprocess.Popen) -> str:
    """The one sentence a run that does not start says."""
    error = run.communicate(timeout=300)[1]
    assert run.returncode == 1
    assert error.count("\n") == 1, error
    return error


@pytest.fixture
def killed(folder):
    """A folder in which a run was killed in the middle of its job."""
    run = start(folder)
    wait_for(lambda: locks(folder) and (folder / ".snakemake/incomplete").is_dir())
    kill(run)
    assert locks(folder)
    (folder / "fast").touch()
    return folder


def test_of_two_runs_started_at_once_after_a_kill_one_ends_and_the_other_refuses(killed):
    runs = [start(killed) for _ in range(2)]
    wait_for(lambda: any(run.poll() is not None for run in runs))
    second, first = sorted(runs, key=lambda run: run.poll() is None)
    assert f"(process {first.pid}): wait for it, or end it with `kill {first.pid}`, then run again." in refused(second)
    said = first.communicate(timeout=300)[1]
    assert (first.returncode, said.count("left its lock: removing it")) == (0, 1), said
    assert (killed / "done.txt").exists()
    assert locks(killed) == []


def test_the_folder_of_a_group_is_not_the_first_ones_alone(folder):
    """docs/cluster.md has its users set the umask 002."""
    (folder / "fast").touch()
    run = start(folder, umask=0o002)
    assert run.communicate(timeout=300)[1] == ""
    assert stat.filemode((folder / ".snakemake/run").stat().st_mode) == "-rw-rw-r--"


def test_a_run_on_another_machine_is_named(folder):
    first = start(folder)
    try:
        wait_for(lambda: locks(folder))
        (folder / ".snakemake/run").write_text(f"login2 {first.pid}")
        assert f"(process {first.pid} on login2)" in refused(start(folder))
    finally:
        kill(first)


def test_a_plain_snakemake_counts(folder):
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "all"]
    run = subprocess.Popen(command, cwd=folder, start_new_session=True, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: locks(folder))
        assert str(run.pid) in refused(start(folder))
        assert locks(folder)
    finally:
        kill(run)


def test_a_job_that_outlived_its_snakemake_counts(killed):
    program = killed / "forgetrace"
    program.write_text("import time; time.sleep(600)")
    job = subprocess.Popen([sys.executable, str(program), "scan"], cwd=killed)
    try:
        assert str(job.pid) in refused(start(killed))
        assert locks(killed)
    finally:
        job.kill()
        job.wait()


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_an_interpreter_whose_path_has_a_space_starts_nothing_on_a_cluster(folder, tmp_path_factory, profile):
    python = tmp_path_factory.mktemp("a clone") / "bin/python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    # Told so, because a link's home is looked for beside it, and a whole environment takes a minute to make.
    program = f"import sys; sys.executable = {str(python)!r}; sys.argv = ['start_run.py', 'config.yaml', 'all']\n"
    # Beyond the check there is a Snakemake that this path cannot start: it says so by another name.
    program += "import os; os.execv = lambda *_: sys.exit('started')\n"
    program += f"exec(compile(open({str(SCRIPT)!r}).read(), {str(SCRIPT)!r}, 'exec'))"
    environment = os.environ | {"SNAKEMAKE_PROFILE": str(ROOT / "profiles" / profile)}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, text=True, capture_output=True)
    assert done.returncode == 1
    if profile == "default":
        assert done.stderr.strip() == "started"
    else:
        refusal = f"would not find {python}, whose path has a space: set up the environment {python.parents[1]} in"
        assert refusal in done.stderr
        assert not locks(folder)


# What squeue does, whether this folder has sent jobs to Slurm or (None) is about to, and what is said of it.
SILENT = "echo unreachable >&2; exit 1"
QUEUES = {
    "a job of this folder": (
        "echo '42 {folder}'; echo 43 /elsewhere",
        False,
        "(42), which may be alive on another machine",
    ),
    "no answer": (SILENT, True, "squeue does not say"),
    "no answer, and no job was ever sent": (SILENT, False, None),
    "no answer, and jobs may have logs elsewhere": (SILENT, None, "squeue does not say"),
    "jobs elsewhere and this one": ("echo 43 /elsewhere; echo 44 '{folder}'", True, None),
}


@pytest.mark.parametrize("queue", QUEUES)
def test_a_lock_stays_while_slurm_may_have_jobs_here(killed, tmp_path_factory, queue):
    squeue, sent, sentence = QUEUES[queue]
    if sent:
        (killed / ".snakemake/slurm_logs").mkdir()
    tools = tmp_path_factory.mktemp("bin")
    (tools / "squeue").write_text("#!/bin/sh\n" + squeue.format(folder=killed))
    (tools / "squeue").chmod(0o755)
    profile = {"SNAKEMAKE_PROFILE": str(ROOT / "profiles/slurm")} if sent is None else {}
    run = start(killed, PATH=f"{tools}:{os.environ['PATH']}", SLURM_JOB_ID="44", **profile)
    if sentence:
        assert sentence in refused(run)
        assert locks(killed)
    else:
        assert "removing it" in run.communicate(timeout=300)[1]
        assert run.returncode == 0
