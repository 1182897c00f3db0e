"""Start Snakemake on one experiment, alone in this folder; refuse, in one sentence, where it cannot go well.

Snakemake looks for another run's lock and only then writes its own, keeps the lock when it is killed, and
then refuses every later run until someone unlocks the folder by hand. Whether that is safe depends on whether
something of the killed run still writes here, which Snakemake cannot know; the process table and Slurm can.

    python workflow/scripts/start_run.py config/<experiment>.yaml [snakemake options and targets]
"""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

PROGRAMS = ("snakemake", "forgetrace")
LOCKS = Path(".snakemake", "locks")
RUN = Path(".snakemake", "run")  # locked by the run that is alive, and naming it
SLURM_LOGS = Path(".snakemake", "slurm_logs")  # made by Snakemake before its first Slurm job of this folder


class Refusal(Exception):
    """Why this run must not start and the way out, in one sentence."""


def check_permissions(experiment: str) -> None:
    """Refuse where a run could not keep its results or its own records.

    Snakemake would find out in the middle, with a traceback or without saying what to do. What lies deeper
    is left to the stages: a finished one may well be protected from writing.
    """
    for path in (LOCKS, RUN, RUN.parent, *(f"{top}/{experiment}" for top in ("logs", "timings", "results"))):
        place = Path(path)
        while not place.exists():
            place = place.parent
        if not os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0)):
            raise Refusal(
                f"No permission to write to {place.resolve()}: check its owner and mode "
                "(`sudo chown -R $USER .` after a run as root), then run again."
            )


def hold_folder() -> None:
    """Lock this folder for as long as this process lives, whatever program it becomes.

    The kernel drops the lock with the process, so it is never stale. On a network file system it holds for
    all machines; where that has no locks, the process table is all there is.
    """
    RUN.parent.mkdir(exist_ok=True)
    held = os.open(RUN, os.O_RDWR | os.O_CREAT, 0o666)  # a group's umask lets its others in
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Refusal(another_run(*holder())) from None
    except OSError:
        pass  # no locks here
    os.ftruncate(held, 0)
    os.pwrite(held, f"{socket.gethostname()} {os.getpid()}".encode(), 0)
    os.set_inheritable(held, True)


def holder() -> tuple[list[str], str]:
    """Id of the process that holds this folder, and " on <machine>" where it is another one."""
    here = socket.gethostname()
    for _ in range(100):
        name, _, pid = RUN.read_text(encoding="utf-8").rpartition(" ")
        if name and (name != here or psutil.pid_exists(int(pid))):
            break
        time.sleep(0.1)  # it took the lock this very moment, and has yet to write its name over the last one's
    return [pid], f" on {name}" if name != here else ""


def another_run(pids: list, where: str = "") -> str:
    """The sentence that refuses beside living processes."""
    ids = " ".join(map(str, pids))
    return (
        f"Another run is alive in this folder (process{'es' * (len(pids) > 1)} {ids}{where}): wait for it, "
        f"or end it with `kill {ids}`{where}, then run again."
    )


def running_here(folder: Path) -> list[int]:
    """Ids of live Snakemake and forgetrace processes that work in ``folder``, this one's parents excepted."""
    own = {process.pid for process in psutil.Process().parents()} | {psutil.Process().pid}
    found = []
    for process in psutil.process_iter(["pid", "cwd", "cmdline", "status"]):
        about = process.info
        gone = about["status"] == psutil.STATUS_ZOMBIE or about["cwd"] is None
        if gone or about["pid"] in own or not runs_program(about["cmdline"] or []):
            continue
        if Path(about["cwd"]).resolve() == folder.resolve():
            found.append(about["pid"])
    return sorted(found)


def runs_program(command: list[str]) -> bool:
    """Whether a command line starts one of our programs, by itself or through a Python interpreter."""
    if command and Path(command[0]).name.startswith("python"):
        command = command[2:] if command[1:2] == ["-m"] else command[1:]
        command = [word.split(".")[0] if "/" not in word else word for word in command[:1]]
    return bool(command) and Path(command[0]).name in PROGRAMS


def on_cluster() -> bool:
    """Whether the profile that SNAKEMAKE_PROFILE names sends jobs elsewhere; not where it cannot be read."""
    try:
        profile = Path(os.environ["SNAKEMAKE_PROFILE"], "config.yaml").read_text(encoding="utf-8")
        return yaml.safe_load(profile).get("executor", "local") != "local"
    except (KeyError, OSError, AttributeError, yaml.YAMLError):
        return False


def check_cluster(python: str) -> None:
    """Refuse what Snakemake's jobs on a cluster cannot start with: they name this interpreter without quotes."""
    if on_cluster() and len(python.split()) > 1:
        raise Refusal(
            f"Jobs on a cluster would not find {python}, whose path has a space: set up the environment "
            f"{Path(python).parents[1]} in a path without one, then run again."
        )


def jobs_in_slurm(folder: Path) -> list[str]:
    """Ids of the user's other Slurm jobs, waiting or running, that work in ``folder``; none without Slurm.

    A machine may have Slurm's commands and no cluster behind them: silence matters where jobs are or were sent.
    """
    if not shutil.which("squeue"):
        return []
    try:
        asked = subprocess.run(
            ["squeue", "--me", "--noheader", "--format=%A %Z"], capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        asked = None
    if asked is None or asked.returncode:
        if not (on_cluster() or (folder / SLURM_LOGS).is_dir()):
            return []
        raise Refusal(
            "A killed run left its lock, and squeue does not say whether its Slurm jobs still write here: once none "
            "does, run `snakemake --unlock`, then run again."
        )
    jobs = (line.strip().split(" ", 1) for line in asked.stdout.splitlines())
    own = os.environ.get("SLURM_JOB_ID")
    return [job for job, place in jobs if job != own and Path(place).resolve() == folder.resolve()]


def clear_stale_lock(config: str) -> None:
    """Remove the lock of a killed run that has left nothing behind that still writes here."""
    if not LOCKS.is_dir() or not any(LOCKS.iterdir()):
        return
    if jobs := jobs_in_slurm(Path.cwd()):
        ids = " ".join(jobs)
        raise Refusal(
            f"Slurm still has jobs of a run in this folder ({ids}), which may be alive on another machine: wait for "
            f"them, or end them with `scancel {ids}`, then run again."
        )
    print("A killed run left its lock: removing it; what it had finished is kept.", file=sys.stderr)
    unlocked = subprocess.run([sys.executable, "-m", "snakemake", "--configfile", config, "--unlock"])
    if unlocked.returncode:
        sys.exit(unlocked.returncode)


def main(config: str, *arguments: str) -> None:
    """Become Snakemake, or say in one sentence why not and exit with status 1."""
    try:
        check_permissions(Path(config).stem)
        check_cluster(sys.executable)
        hold_folder()
        if alive := running_here(Path.cwd()):
            raise Refusal(another_run(alive))
        clear_stale_lock(config)
    except Refusal as refusal:
        sys.exit(str(refusal))
    # The file last: --configfile would take a target behind it for another one.
    os.execv(sys.executable, [sys.executable, "-m", "snakemake", *arguments, "--configfile", config])


if __name__ == "__main__":
    main(*sys.argv[1:])
