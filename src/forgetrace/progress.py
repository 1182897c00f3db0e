"""Progress with rate and time left: live on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

LOG_SECONDS = 15


def progress(items: Iterable | None = None, *, total: int, unit: str, what: str, done: int = 0) -> tqdm:
    """A tqdm bar over ``items``, or one to ``update`` by hand where there are none.

    Args:
        items: what is looped over.
        total: units of the whole task.
        unit: what is counted.
        what: label of the bar.
        done: units already finished by an earlier, interrupted run.
    """
    live = sys.stderr.isatty()
    return tqdm(
        items,
        total=total,
        unit=unit,
        desc=what,
        initial=done,
        mininterval=0.2 if live else LOG_SECONDS,
        # Carriage returns would run a log file into one line.
        bar_format=None if live else "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n",
        leave=True,
        dynamic_ncols=live,
    )
