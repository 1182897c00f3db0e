"""Seconds until a command does something."""

import statistics
import subprocess
import sys
import time

from benchmarks.report import Reading, quartiles
from benchmarks.settings import Settings
from forgetrace.imports import AS_A_JOB

COMMANDS = {
    "help": (["-m", "forgetrace.cli", "--help"], "<= 0.5"),
    "scan-imports": (["-c", f"{AS_A_JOB}; import forgetrace.attribution.scan"], None),
    "training-imports": (["-c", f"{AS_A_JOB}; import forgetrace.diffusion.base"], None),
}


def startup(settings: Settings) -> dict[str, Reading]:
    """Wall time of ``forgetrace --help`` and of the imports of two stages, in fresh interpreters."""
    readings = {}
    for name, (arguments, target) in COMMANDS.items():
        _, *seconds = (
            elapsed([sys.executable, *arguments]) for _ in range(settings.repeats + 1)
        )  # the first reads files
        readings[f"startup-{name}"] = Reading(statistics.median(seconds), "s", target, quartiles(seconds))
    return readings


def elapsed(command: list[str], **options: object) -> float:
    """Wall seconds of a command, which must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - start
