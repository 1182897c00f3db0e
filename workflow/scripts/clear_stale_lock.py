"""Before a run: refuse when another one is alive in this folder, else remove what a killed one left.

Snakemake keeps its lock when it is killed and then refuses every later run until someone unlocks the
folder by hand. Whether that is safe depends on whether a process of the killed run still writes here,
which Snakemake cannot know and the process table can.

    python workflow/scripts/clear_stale_lock.py [snakemake options that select the experiment]
"""

import subprocess
import sys
from pathlib import Path

import psutil

PROGRAMS = ("snakemake", "forgetrace")
LOCKS = Path(".snakemake", "locks")


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


def main(arguments: list[str]) -> int:
    """Clear the lock or say in one sentence why not; returns the exit status."""
    if alive := running_here(Path.cwd()):
        pids = ", ".join(map(str, alive))
        plural = "es" if len(alive) > 1 else ""
        print(
            f"Another run is alive in this folder (process{plural} {pids}): wait for it, "
            f"or end it with `kill {' '.join(map(str, alive))}`, then run again.",
            file=sys.stderr,
        )
        return 1
    if LOCKS.is_dir() and any(LOCKS.iterdir()):
        print("A killed run left its lock: removing it; what it had finished is kept.", file=sys.stderr)
        return subprocess.run([sys.executable, "-m", "snakemake", "--unlock", *arguments]).returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
