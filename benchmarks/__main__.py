"""``python -m benchmarks [names]``: run the benchmarks, print a table, write ``results.json``.

Exit code 0 whatever the targets say, 1 where a benchmark could not be run.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from benchmarks import report
from benchmarks.settings import Settings
from forgetrace.artifacts import UserError, read_json, write_json

BENCHES = {
    "scan": "speed",
    "queries": "speed",
    "fisher": "speed",
    "training": "speed",
    "startup": "startup",
    "scaling": "scaling",
    "limit": "limit",
    "pipeline": "recorded",
    "narrowing": "recorded",
}
Bench = Callable[[Settings], dict[str, report.Reading]]


def run(benches: Mapping[str, Bench], settings: Settings) -> tuple[dict[str, report.Reading], dict[str, str]]:
    """Run benchmarks one after another and print what each finds.

    Returns:
        The readings by name, and the reasons of those that failed by the benchmark's name.
    """
    readings, failed = {}, {}
    for name, bench in benches.items():
        start = time.perf_counter()
        try:
            found = bench(settings)
        except UserError as error:
            failed[name] = str(error)
        except Exception as error:
            failed[name] = str(error).strip().split("\n")[-1] or type(error).__name__
            traceback.print_exc()
        else:
            readings |= found
            print(*report.lines(found), sep="\n")
        print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)
    return readings, failed


def main(arguments: list[str] | None = None) -> int:
    """Run the named benchmarks, by default all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"by default all of: {', '.join(BENCHES)}")
    parser.add_argument("--config", default="config/digits.yaml", help="the experiment to measure with")
    parser.add_argument("--repeats", type=int, default=Settings.repeats, help="turns of each side")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="of work in one turn")
    parser.add_argument("--folder", type=Path, default=Settings.folder, help="where the results go")
    options = vars(parser.parse_args(arguments))
    names = options.pop("names") or list(BENCHES)
    if unknown := set(names) - BENCHES.keys():
        parser.error(f"no benchmark named {', '.join(sorted(unknown))} (there are {', '.join(BENCHES)})")
    benches = {name: getattr(import_module(f"benchmarks.{BENCHES[name]}"), name) for name in names}
    readings, failed = run(benches, settings := Settings(**options))
    found = report.as_json(readings, failed, report.machine())
    path = settings.folder / "results.json"
    if len(names) < len(BENCHES) and path.exists():  # some were run again: keep what the others found
        found["targets"] = read_json(path)["targets"] | found["targets"]
    write_json(path, found)
    for name, reason in failed.items():
        print(f"benchmarks: {name} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
