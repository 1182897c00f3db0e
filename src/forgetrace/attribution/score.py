"""The ``score`` stage: one method's ranking of the training images for one query, or for all of them."""

import functools
import time
from collections.abc import Callable

from forgetrace.artifacts import (
    UserError,
    provenance,
    read_table,
    read_table_provenance,
    sha256_of,
    stage_versions,
    write_table,
)
from forgetrace.attribution.contract import Attributor
from forgetrace.attribution.ranking import rank
from forgetrace.attribution.registry import attributor
from forgetrace.layout import Layout

# In a table's provenance, but no part of what tells whether it is made again.
TOOK = "took"  # seconds of the job's scores, and of how many queries
SCANNED = "unlearned"  # what scans hang on that are thrown away


def score(
    layout: Layout, method: str, query: str | None = None, device: str = "auto", scanned: str | None = None
) -> None:
    """Write the ranking for a query; without one, for every query that has none of these inputs and settings.

    Args:
        layout: the experiment.
        method: one of ``score.methods``.
        query: one of its queries.
        device: where to compute.
        scanned: fingerprint of scans that will be thrown away, to keep with the table.

    Raises:
        UserError: an input is missing or damaged, or a score is not finite.
    """
    source = attributor(layout, method, device)
    image_ids = read_table(layout.index)["image_id"].tolist()
    hash_of = functools.cache(sha256_of)  # most inputs are those of every query
    names = [query] if query else layout.config.queries()
    made_by = {name: _made_by(layout, source, name, hash_of) for name in names}
    if query is None:
        made_by = {name: made for name, made in made_by.items() if not _is_made(layout.score(method, name), made)}
    if not made_by:
        return
    begun = time.perf_counter()
    scores = source.scores_of(list(made_by))
    # What it took is no part of what the scores hang on.
    told = {TOOK: {"seconds": round(time.perf_counter() - begun, 3), "queries": len(made_by)}}
    told |= {SCANNED: scanned} if scanned else {}
    for name, made in made_by.items():
        write_table(layout.score(method, name), rank(image_ids, scores[name]), made | told)


def _made_by(layout: Layout, source: Attributor, query: str, hash_of: Callable[[str], str]) -> dict:
    """What the scores of a query hang on."""
    inputs = {path.removeprefix(f"{layout.root}/"): hash_of(path) for path in source.inputs(query)}
    settings = {"method": source.options.model_dump(), "seed": layout.config.seed, **source.shaped_by()}
    return provenance(settings | {"versions": stage_versions("score")}) | {"inputs": inputs}


def _is_made(path: str, made_by: dict) -> bool:
    """Whether an earlier run left scores of the same inputs and settings."""
    try:
        found = read_table_provenance(path)
    except UserError:
        return False
    return {key: value for key, value in found.items() if key not in (TOOK, SCANNED)} == made_by
