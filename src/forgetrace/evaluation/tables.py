"""The tables of the ``evaluate`` stage, from raw values to comparisons.

``per_query.csv`` holds every value of the models that left images out; ``counterfactual.csv`` and
``comparisons.csv`` summarise it and can be rebuilt from it; regions of one image count as one query in them. Which
direction means forgetting is stated by :data:`forgetrace.evaluation.metrics.METRICS`. The tables beside these have a
module each.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from forgetrace.artifacts import write_json, write_table
from forgetrace.config import RANDOM, SEED_SET
from forgetrace.encoding.images import load_encoder
from forgetrace.evaluation import lds, regions, reliability, retrieval
from forgetrace.evaluation.agreement import agreement
from forgetrace.evaluation.comparisons import COMPARISONS, Pair, family
from forgetrace.evaluation.cost import cost
from forgetrace.evaluation.earlier import with_earlier
from forgetrace.evaluation.measures import THETA0, QueryMeasures, asked_queries, read_query
from forgetrace.evaluation.metrics import METRICS, REGION_METRICS, Encoder, image_metrics, region_metrics
from forgetrace.evaluation.pooled import pooled
from forgetrace.evaluation.statistics import (
    bootstrap_means,
    holm,
    interval,
    sign_flip_test,
    standard_error,
)
from forgetrace.evaluation.unlearning import unlearning
from forgetrace.layout import BASE, Layout

PER_QUERY = ["query", "method", "k", "member", "metric", "value"]
COUNTERFACTUAL = [
    "method", "k", "metric", "n_queries", "mean", "se", "ci_low", "ci_high", "p_vs_random", "p_vs_random_holm",
]  # fmt: skip


def evaluate(layout: Layout, encode: Encoder | None = None, partial: bool = False) -> None:
    """Write ``metrics.json`` and every table of :meth:`Layout.tables`, all of them or none.

    Args:
        layout: the experiment.
        encode: image encoder of the ``similarity`` column; by default the one the config names.
        partial: make do with what has been measured so far, by whatever settings that was; the tables' counts of
            queries, halves and seeds say how much that is. Of methods whose scores are not here, rows that hang on
            them stay as they were.

    Raises:
        UserError: a measure is missing or damaged, or the encoder's packages are not installed.
    """
    resamples, seed, retrain = layout.config.evaluate.bootstrap, layout.config.seed, layout.config.retrain
    tables = {}
    if layout.config.leaves_out:
        values = per_query(layout, encode, partial)
        of_images = regions.by_image(layout.config, values)
        compared = comparisons(of_images, resamples, seed)
        tables = {"per_query": values, "counterfactual": counterfactual(of_images, resamples, seed)}
    if retrain.subsets:
        halves = lds.read_halves(layout, partial)
        found = lds.correlations(halves, lds.read_scores(layout, partial), resamples, seed)
        tables |= {"lds_per_query": lds.per_query(layout, found), "lds": lds.summary(layout, found, halves.shape)}
        compared = pd.DataFrame(
            [*compared.itertuples(index=False), *lds.comparisons(layout, found)], columns=COMPARISONS
        )
    if retrain.pools:
        tables["pooled"] = pooled(layout, partial)
    if layout.config.evaluate.precision_k:
        tables["regions"] = regions.read_precision(layout, partial)
    if layout.config.evaluate.others:
        tables["unlearning"] = unlearning(layout, encode or load_encoder(layout.config.evaluate.encoder), partial)
    if retrain.subsets or retrain.pools:
        tables |= {"agreement": agreement(layout, partial), "cost": cost(layout)}
    if layout.config.leaves_out:
        tables["comparisons"] = compared
    if layout.config.customize:
        tables |= retrieval.tables(layout, partial)
    if layout.config.learn and (not partial or Path(layout.learned["probabilities"]).exists()):
        tables |= reliability.tables(layout)
    tables = with_earlier(layout, tables) if partial else tables
    if "regions" in tables:
        tables["regions_summary"] = regions.summary(tables["regions"], resamples, seed)
    for name, table in tables.items():
        write_table(layout.table(name), table)
    write_json(layout.metrics, means(tables))


def per_query(layout: Layout, encode: Encoder | None = None, partial: bool = False) -> pd.DataFrame:
    """Every metric of every model on every query: query, method, k, member, metric, value.

    A query that is a region has metrics of its own, inside and outside of it.
    θ0's own rows (method ``base``) are a check: its difference of losses is 0 and it regenerates
    the query image itself. With ``partial``, queries that θ0 was not asked about are left out.

    Raises:
        UserError: as :func:`evaluate`.
    """
    # All files are read before the encoder, so that a damaged one is reported within a second.
    queries = {query: read_query(layout, query, partial) for query in asked_queries(layout, partial)}
    encode = encode or load_encoder(layout.config.evaluate.encoder)
    rows = [row for query, measured in queries.items() for row in _values(query, measured, encode)]
    return pd.DataFrame(rows, columns=PER_QUERY)


def counterfactual(values: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Mean, standard error, 95% interval and p against random of every method, K and metric.

    ``random`` and ``seed`` are averaged over their draws first, query by query: n and the standard
    error count queries. Their intervals are over queries and draws, those of the other methods over
    queries. ``seed`` (K = 0) is the noise floor. The test against random is paired and two-sided;
    it counts random's draws as given, the interval of the difference in ``comparisons.csv`` does not.
    ``p_vs_random_holm`` is corrected for the number of methods of one K and metric.

    Args:
        values: the table of :func:`per_query`.
        resamples: bootstrap samples of every interval.
        seed: of bootstrap and permutations.
    """
    rows = []
    for k, metric, samples in _families(values):
        for method, sample in samples.items():
            matrix = sample.to_numpy()
            per_query_mean = matrix.mean(axis=1)
            low, high = interval(bootstrap_means([matrix], resamples, seed)[0], len(matrix))
            p = _p_vs_random(method, samples, seed)
            mean, error = per_query_mean.mean(), standard_error(per_query_mean)
            rows.append((method, k, metric, len(matrix), mean, error, low, high, p))
    table = pd.DataFrame(rows, columns=COUNTERFACTUAL[:-1])
    return table.assign(p_vs_random_holm=table.groupby(["k", "metric"])["p_vs_random"].transform(holm))


def comparisons(values: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Every pair of methods on the same queries: mean of a - b, 95% interval, p, Holm-corrected p.

    The interval is over queries and, where random is one of the two, over its draws as well. The
    test is the two-sided sign-flip test over queries. A family of Holm's correction is all pairs of
    one K and metric.

    Args:
        values: the table of :func:`per_query`.
        resamples: bootstrap samples of every interval.
        seed: of bootstrap and permutations.
    """
    rows = []
    for k, metric, samples in _families(values):
        pairs = []
        for a, b in combinations([method for method in samples if method != SEED_SET], 2):
            both = _paired(samples[a], samples[b])
            if len(both[0]):
                means_a, means_b = bootstrap_means(both, resamples, seed)
                difference = both[0].mean(axis=1) - both[1].mean(axis=1)
                pairs.append(Pair(a, b, difference, interval(means_a - means_b, len(difference))))
        rows += family(k, metric, pairs, seed)
    return pd.DataFrame(rows, columns=COMPARISONS)


def means(tables: dict[str, pd.DataFrame]) -> dict[str, dict[str, dict[str, float]]]:
    """The means of the tables as ``{metric: {method: {"k200": mean}}}``, for DVC; of ``lds``, by pool of queries."""
    nested: dict = {}
    for row in tables["counterfactual"].itertuples() if "counterfactual" in tables else []:
        nested.setdefault(row.metric, {}).setdefault(row.method, {})[f"k{row.k}"] = float(f"{row.mean:.6g}")
    if "lds" in tables:
        for row in tables["lds"].itertuples():
            nested.setdefault("lds", {}).setdefault(row.method, {})[row.queries] = float(f"{row.mean:.6g}")
    if "retrieval" in tables:
        nested["retrieval"] = retrieval.headline(tables["retrieval"])
    return nested


def _values(query: str, measured: QueryMeasures, encode: Encoder) -> list[tuple]:
    """Rows of :func:`per_query` for one query."""
    models, measures = list(measured.measures), list(measured.measures.values())
    base = measured.measures[THETA0]
    if measured.inside is not None:
        columns = _region_columns(measured, encode)
        return _rows(query, models, columns)
    columns = {"delta_loss": [measure.loss - base.loss for measure in measures]}
    if base.image is not None:
        regenerated = np.stack([measure.image for measure in measures])
        columns |= image_metrics(measured.original, regenerated, encode)
    return _rows(query, models, columns)


def _region_columns(measured: QueryMeasures, encode: Encoder) -> dict[str, list]:
    """Metrics of a region's query by name, a value per model."""
    measures, base = list(measured.measures.values()), measured.measures[THETA0]
    parts = base.regions
    columns = {f"delta_loss_{part}": [each.regions[part] - parts[part] for each in measures] for part in parts}
    if "outside" in parts:
        pairs = zip(columns["delta_loss_inside"], columns["delta_loss_outside"], strict=True)
        columns["delta_loss_contrast"] = [inside - outside for inside, outside in pairs]
    if base.image is not None:
        regenerated = np.stack([measure.image for measure in measures])
        columns |= region_metrics(measured.original, regenerated, measured.inside, encode)
    return columns


def _rows(query: str, models: list, columns: dict) -> list[tuple]:
    """Rows of :func:`per_query`, a column of which holds a value per model."""
    return [
        (query, *model, metric, float(column[i]))
        for i, model in enumerate(models)
        for metric, column in columns.items()
    ]


def _families(values: pd.DataFrame):
    """Yield (k, metric, {method: table (queries, draws)}) with methods in table order, random last.

    Queries without initial noise have no image metrics; each family holds the queries that have its
    metric. K = 0 comes last and holds only ``seed``.
    """
    values = values[values["method"] != BASE]
    for k in sorted(values["k"].unique(), key=lambda k: (k == 0, k)):
        for metric in METRICS | REGION_METRICS:
            of_family = values[(values["k"] == k) & (values["metric"] == metric)]
            methods = sorted(of_family["method"].unique(), key=lambda method: method == RANDOM)
            samples = {method: _matrix(of_family[of_family["method"] == method]) for method in methods}
            samples = {method: sample for method, sample in samples.items() if len(sample)}
            if samples:
                yield int(k), metric, samples


def _matrix(rows: pd.DataFrame) -> pd.DataFrame:
    """Values of one method: a row per query that has them all, a column per draw; queries sorted by name.

    A query's own model is its only draw; the models of ``random`` and ``seed`` are named by draw.
    """
    shared = rows["method"].isin([RANDOM, SEED_SET])
    rows = rows.assign(draw=rows["member"].where(shared, "own"))
    return rows.pivot(index="query", columns="draw", values="value").sort_index().dropna()


def _paired(a: pd.DataFrame, b: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Values of two methods on the queries that both have; the two differ in them only before all are measured."""
    both = a.index.intersection(b.index)
    return a.loc[both].to_numpy(), b.loc[both].to_numpy()


def _p_vs_random(method: str, samples: dict[str, pd.DataFrame], seed: int) -> float:
    """Of the sign-flip test; NaN for the rows that are no methods, or where nothing is there to compare with."""
    if method in (RANDOM, SEED_SET) or RANDOM not in samples:
        return float("nan")
    own, random = _paired(samples[method], samples[RANDOM])
    return sign_flip_test(own.mean(axis=1) - random.mean(axis=1), seed) if len(own) else float("nan")
