"""``python -m benchmarks.pipeline``: the time of `make reproduce` in a fresh clone; half an hour or more.

The results in git are removed first: a retraining that recognises its own finished result trains nothing.
"""

import argparse
import contextlib
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from benchmarks.report import machine
from benchmarks.startup import elapsed
from benchmarks.workers import cores
from forgetrace.artifacts import write_json
from forgetrace.imports import AS_A_JOB

DEFINITION = (
    "1 - sum over jobs of (wall time - time of a stage's imports) / (cores * wall time of make reproduce);"
    " idle cores count as outside"
)
# What the heaviest stages import before they compute; of a light one it takes too much rather than too little.
IMPORTS = f"{AS_A_JOB}; import forgetrace.counterfactual.retrain, forgetrace.attribution.scan"


def jobs(timings: Path) -> dict[str, float]:
    """Wall seconds of every job, ``stage/…``, from Snakemake's benchmark files."""
    files = sorted(timings.rglob("*.tsv"))
    return {
        path.relative_to(timings).with_suffix("").as_posix(): float(pd.read_csv(path, sep="\t")["s"][0])
        for path in files
    }


def outside(jobs: Mapping[str, float], imports: float, seconds: float, cores: int) -> float:
    """Share of the core-seconds in which nothing was computed, see ``DEFINITION``."""
    computing = sum(max(0.0, wall - imports) for wall in jobs.values())
    return 1 - computing / (cores * seconds)


def measure(root: Path, experiment: str, keep: str | None = None) -> dict:
    """Clone, install, run and time the experiment, in a folder to ``keep`` or one that is removed afterwards."""
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(root), folder], check=True)
        make = ["make", f"EXPERIMENT={experiment}"]
        # The clone has an environment and package of its own.
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("MAKE")}
        subprocess.run([*make, "environment"], cwd=folder, env=own, check=True)
        shutil.rmtree(Path(folder, "results", experiment), ignore_errors=True)
        start = time.perf_counter()
        subprocess.run([*make, "reproduce"], cwd=folder, env=own, check=True)
        seconds = time.perf_counter() - start
        walls = jobs(Path(folder, "timings", experiment))
        python = str(Path(folder, ".venv", "bin", "python"))
        imports = min(elapsed([python, "-c", IMPORTS], cwd=folder, env=own) for _ in range(3))
    found = {"when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "experiment": experiment}
    found |= {"seconds": seconds, "cores": cores(), "outside": outside(walls, imports, seconds, cores())}
    return found | {"definition": DEFINITION, "imports": imports, "jobs": walls, "machine": machine()}


def main() -> int:
    """Measure and write ``pipeline.json``."""
    parser = argparse.ArgumentParser(prog="benchmarks.pipeline", description=__doc__)
    parser.add_argument("--experiment", default="digits", help="name of a config")
    parser.add_argument("--keep", metavar="FOLDER", help="clone to this folder and leave it there")
    folder, options = Path(__file__).parent, parser.parse_args()
    found = measure(folder.parent, options.experiment, options.keep)
    write_json(folder / "pipeline.json", found)
    print(
        f"{found['seconds'] / 60:.1f} minutes, {found['outside']:.1%} outside computation; see benchmarks/pipeline.json"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
