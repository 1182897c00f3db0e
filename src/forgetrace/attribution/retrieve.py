"""The ``retrieve`` stage: a customised model's exemplars, found among them and the whole base set by every method.

One job ranks for all images of a model, so that imports, θ0's files and the scan of the customised model are paid for
once. Score tables are kept as they come: a killed job goes on with the query it was at, and one more method or query
costs only itself.
"""

from pathlib import Path

import pandas as pd

from forgetrace.artifacts import (
    UserError,
    fingerprint,
    provenance,
    read_json,
    read_table,
    read_table_provenance,
    sha256_of,
    stage_versions,
    write_table,
)
from forgetrace.attribution.asked import asked, manners_of
from forgetrace.attribution.candidates import Candidates, candidates, discard, exemplar_ids
from forgetrace.attribution.contract import Attributor
from forgetrace.attribution.ensemble import Ensemble
from forgetrace.attribution.registry import attributor
from forgetrace.attribution.scan import scan
from forgetrace.attribution.score import SCANNED, score
from forgetrace.attribution.unlearning import ByUnlearning
from forgetrace.layout import Layout
from forgetrace.unlearning.variants import unlearn_query

RANKS = ["model", "query", "method", "image_id", "score", "rank"]


def retrieve(layout: Layout, model: str, device: str = "auto") -> None:
    """Write ``layout.ranks(model)`` and the score tables it is taken from.

    Raises:
        UserError: a file of the model or of the base experiment is missing or damaged.
    """
    files = layout.customized(model)
    record = read_json(files["record"])
    wanted = asked(layout, model, manners_of(record))
    own = candidates(layout, model, list(wanted))
    # What is put together from other methods' scores comes after them.
    for method in sorted(wanted, key=lambda method: isinstance(attributor(own, method), Ensemble)):
        rank_for(own, method, wanted[method], device)
    ids = exemplar_ids(model, len(record["exemplars"]))
    rows = []
    for method, queries in wanted.items():
        for query in queries:
            table = read_table(own.score(method, query)).set_index("image_id").loc[ids]
            rows += [(model, query, method, *row) for row in table[["score", "rank"]].itertuples()]
    made_by = provenance(layout.config.digest_of("seed", "score"), files | {"base": layout.encode_manifest})
    write_table(layout.ranks(model), pd.DataFrame(rows, columns=RANKS), made_by)
    discard(own)


def rank_for(own: Candidates, method: str, queries: list[str], device: str = "auto") -> None:
    """Write a method's score tables for some queries, as far as they are not there."""
    source = attributor(own, method, device)
    if own.base_scan not in source.inputs(queries[0]) and not isinstance(source, ByUnlearning):
        score(own.asking(queries), method, device=device)
        return
    for query in queries:
        key = scanned_with(own, source, query)
        if _is_made(own.score(method, query), key):
            continue
        scan_for(own, source, query, device)
        score(own, method, query, device, key)


def scanned_with(own: Candidates, source: Attributor, query: str) -> str:
    """Fingerprint of what scores hang on whose scans are thrown away when all methods have ranked."""
    config, settings = own.config, [source.options.model_dump()]
    files = [own.weights, own.encode_manifest, own.query(query)["tensors"]]
    if isinstance(source, ByUnlearning):
        variant = config.unlearn[source.variant]
        settings.append(variant.model_dump())
        files += own.fitted(variant.curvature)[:1] if variant.curvature != "none" else []
    settings += [config.seed, config.scan.of_base()]
    settings += [config.scan.narrowing.model_dump()] if config.scan.narrowing else []
    inputs = [sha256_of(path) for path in files]
    return fingerprint([settings, inputs, stage_versions("unlearn", "scan", "score")])


def _is_made(path: str, key: str) -> bool:
    try:
        return read_table_provenance(path).get(SCANNED) == key
    except UserError:
        return False


def scan_for(own: Candidates, source: Attributor, query: str, device: str) -> None:
    """Make what a method asks of a query and is not there: the model unlearned, the scans of it and of the model."""
    missing = [path for path in source.inputs(query) if not Path(path).exists()]
    if own.base_scan in missing:
        scan(own, device=device)
    if not isinstance(source, ByUnlearning) or not missing:
        return
    if not Path(own.unlearned(source.variant, query)["losses"]).exists():
        unlearn_query(own, source.variant, query, device)
    if own.scan(source.variant, query) in missing:
        scan(own, source.variant, query, device)
