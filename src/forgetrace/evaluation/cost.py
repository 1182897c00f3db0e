"""What a method costs: seconds and memory of its jobs as Snakemake measured them, bytes of its files.

A method needs what its attributor reads and, behind that, what those files are made of. What several methods share
(θ0's scan, a Fisher) counts in full for each: the cost of having that method alone. Training θ0 and encoding counts
for none, nor do its snapshots. Timings lie outside the results, on the machine where the jobs ran; what is not there
is left empty. They are wall times: of jobs that shared the cores with others, and of the last run alone where a job was
killed and went on. Memory is the processes', not a GPU's.
"""

from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from forgetrace.artifacts import UserError, read_table_provenance
from forgetrace.attribution.contract import Together
from forgetrace.attribution.registry import attributor
from forgetrace.attribution.score import TOOK
from forgetrace.layout import Layout

COST = ["method", "once_seconds", "query_seconds", "queries_at_once", "peak_mb", "disk_mb"]
STAGES = ("fit", "unlearn", "scan", "score")


def cost(layout: Layout) -> pd.DataFrame:
    """Every method: seconds before the first query, seconds per query, peak memory, disk, in millions of bytes.

    ``query_seconds`` is the mean over all queries of unlearning, scan and score. A method that scores several queries
    in one job passes over the training images once for all of them: its share falls with their number,
    ``queries_at_once``, and a single query costs nearly as much as all.
    """
    return pd.DataFrame([(method, *_cost(layout, method)) for method in layout.config.score.methods], columns=COST)


def _cost(layout: Layout, method: str) -> tuple[float, ...]:
    queries = layout.config.queries()
    files = {path for query in queries for path in needs(layout, method, query)}
    of_queries = {path for path in files if PurePosixPath(path).stem in queries}
    jobs = {job for path in files - of_queries for job in timings(layout, path)}
    jobs_of_queries = {job for path in of_queries for job in timings(layout, path)}
    seconds, memory = _measured(jobs)
    seconds_of_queries, memory_of_queries = _measured(jobs_of_queries)
    sizes = [Path(path).stat().st_size if Path(path).exists() else np.nan for path in files]
    at_once = 1.0
    if isinstance(attributor(layout, method), Together):
        before = of_queries - {layout.score(method, query) for query in queries}  # such as unlearned weights
        seconds_of_queries, _ = _measured({job for path in before for job in timings(layout, path)})
        share, at_once = _shares(layout, method)
        seconds_of_queries += share * len(queries)
    each = seconds_of_queries / len(queries)
    return seconds, each, at_once, np.maximum(memory, memory_of_queries), sum(sizes) / 1e6


def _shares(layout: Layout, method: str) -> tuple[float, float]:
    """Mean over queries of each one's share of the seconds its scores took, and of how many shared them."""
    try:
        took = [read_table_provenance(layout.score(method, query))[TOOK] for query in layout.config.queries()]
    except (UserError, KeyError):
        return np.nan, np.nan
    return float(np.mean([t["seconds"] / t["queries"] for t in took])), float(np.mean([t["queries"] for t in took]))


def needs(layout: Layout, method: str, query: str) -> set[str]:
    """Files of the stages fit to score behind a method's scores for a query, those scores among them."""
    source = attributor(layout, method)
    files = {layout.score(method, query), *source.inputs(query)}
    for member in source.options.methods or []:
        files |= needs(layout, member, query)
    for features in source.features():
        files |= {layout.features(features.name), *features.inputs()}
    for variant, settings in layout.config.unlearn.items():
        weights = layout.unlearned(variant, query)["weights"]
        if files & {weights, layout.scan(variant, query)}:
            files.add(weights)
            files |= set(layout.fitted(settings.curvature)[:1])
    return {path for path in files if path.startswith(tuple(f"{layout.root}/{stage}/" for stage in STAGES))}


def timings(layout: Layout, path: str) -> list[str]:
    """Timings of the jobs that made one of :func:`needs`; names follow the file's, see ``workflow/rules``."""
    stage, *names = PurePosixPath(path).relative_to(layout.root).with_suffix("").parts
    if (stage, names[0]) == ("fit", "features"):
        names = names[1:]
    if stage == "score" and isinstance(attributor(layout, names[0]), Together):
        names = [names[0], "all"]
    shards = layout.config.scan.shards if stage == "scan" else 1
    parts = [layout.timing(stage, *names, f"shard-{shard}") for shard in range(shards) if shards > 1]
    return [layout.timing(stage, *names), *parts]


def _measured(jobs: set[str]) -> tuple[float, float]:
    """Seconds of jobs together and their peak memory in MB; NaN where one was not measured, 0 of no job."""
    seconds, peaks = [0.0], [0.0]
    for path in jobs:
        measured = pd.read_csv(path, sep="\t", na_values="-").iloc[-1] if Path(path).exists() else {}
        seconds.append(measured.get("s", np.nan))
        peaks.append(measured.get("max_rss", np.nan))
    return float(np.sum(seconds)), float(np.max(peaks))
