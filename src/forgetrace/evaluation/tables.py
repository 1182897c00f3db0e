"""The tables of the ``evaluate`` stage, from raw values to comparisons.

``per_query.csv`` holds every value; the other tables summarise it and can be rebuilt from it. Which
direction means forgetting is stated by :data:`forgetrace.evaluation.metrics.METRICS`.
"""

from itertools import combinations

import numpy as np
import pandas as pd

from forgetrace.artifacts import write_json, write_table
from forgetrace.config import RANDOM, SEED_SET
from forgetrace.encoding.images import load_encoder
from forgetrace.evaluation.measures import THETA0, QueryMeasures, read_query
from forgetrace.evaluation.metrics import METRICS, Encoder, image_metrics
from forgetrace.evaluation.statistics import (
    bootstrap_means,
    holm,
    interval,
    sign_flip_test,
    standard_error,
)
from forgetrace.layout import BASE, Layout

PER_QUERY = ["query", "method", "k", "member", "metric", "value"]
COUNTERFACTUAL = ["method", "k", "metric", "n_queries", "mean", "se", "ci_low", "ci_high", "p_vs_random"]
COMPARISONS = [
    "k", "metric", "method_a", "method_b", "n_queries",
    "mean_difference", "ci_low", "ci_high", "p", "p_holm",
]  # fmt: skip


def evaluate(layout: Layout, encode: Encoder | None = None) -> None:
    """Write ``per_query.csv``, ``counterfactual.csv``, ``comparisons.csv`` and ``metrics.json``.

    Args:
        layout: the experiment.
        encode: image encoder of the ``similarity`` column; by default the one the config names.

    Raises:
        UserError: a measure is missing or damaged, or the encoder's packages are not installed.
    """
    resamples, seed = layout.config.evaluate.bootstrap, layout.config.seed
    values = per_query(layout, encode)
    summary = counterfactual(values, resamples, seed)
    write_table(layout.table("per_query"), values)
    write_table(layout.table("counterfactual"), summary)
    write_table(layout.table("comparisons"), comparisons(values, resamples, seed))
    write_json(layout.metrics, means(summary))


def per_query(layout: Layout, encode: Encoder | None = None) -> pd.DataFrame:
    """Every metric of every model on every query: query, method, k, member, metric, value.

    θ0's own rows (method ``base``) are a check: its difference of losses is 0 and it regenerates
    the query image itself.

    Raises:
        UserError: as :func:`evaluate`.
    """
    # All files are read before the encoder, so that a damaged one is reported within a second.
    queries = {query: read_query(layout, query) for query in layout.config.judged_queries()}
    encode = encode or load_encoder(layout.config.evaluate.encoder)
    rows = [row for query, measured in queries.items() for row in _values(query, measured, encode)]
    return pd.DataFrame(rows, columns=PER_QUERY)


def counterfactual(values: pd.DataFrame, resamples: int, seed: int) -> pd.DataFrame:
    """Mean, standard error, 95% interval and p against random of every method, K and metric.

    ``random`` and ``seed`` are averaged over their draws first, query by query: n and the standard
    error count queries. Their intervals are over queries and draws, those of the other methods over
    queries. ``seed`` (K = 0) is the noise floor. The test against random is paired and two-sided;
    it counts random's draws as given, the interval of the difference in ``comparisons.csv`` does not.

    Args:
        values: the table of :func:`per_query`.
        resamples: bootstrap samples of every interval.
        seed: of bootstrap and permutations.
    """
    rows = []
    for k, metric, samples in _families(values):
        for method, sample in samples.items():
            per_query_mean = sample.mean(axis=1)
            low, high = interval(bootstrap_means([sample], resamples, seed)[0], len(sample))
            p = np.nan
            if method not in (RANDOM, SEED_SET):
                p = sign_flip_test(per_query_mean - samples[RANDOM].mean(axis=1), seed)
            mean, error = per_query_mean.mean(), standard_error(per_query_mean)
            rows.append((method, k, metric, len(sample), mean, error, low, high, p))
    return pd.DataFrame(rows, columns=COUNTERFACTUAL)


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
            means_a, means_b = bootstrap_means([samples[a], samples[b]], resamples, seed)
            difference = samples[a].mean(axis=1) - samples[b].mean(axis=1)
            low, high = interval(means_a - means_b, len(difference))
            p = sign_flip_test(difference, seed)
            pairs.append((k, metric, a, b, len(difference), difference.mean(), low, high, p))
        corrected = holm(np.array([pair[-1] for pair in pairs]))
        rows += [(*pair, p_holm) for pair, p_holm in zip(pairs, corrected, strict=True)]
    return pd.DataFrame(rows, columns=COMPARISONS)


def means(summary: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """The means of :func:`counterfactual` as ``{metric: {method: {"k200": mean}}}``, for DVC."""
    nested: dict = {}
    for row in summary.itertuples():
        nested.setdefault(row.metric, {}).setdefault(row.method, {})[f"k{row.k}"] = float(f"{row.mean:.6g}")
    return nested


def _values(query: str, measured: QueryMeasures, encode: Encoder) -> list[tuple]:
    """Rows of :func:`per_query` for one query."""
    models, measures = list(measured.measures), list(measured.measures.values())
    base = measured.measures[THETA0]
    columns = {"delta_loss": [measure.loss - base.loss for measure in measures]}
    if base.image is not None:
        regenerated = np.stack([measure.image for measure in measures])
        columns |= image_metrics(measured.original, regenerated, encode)
    return [
        (query, *model, metric, float(column[i]))
        for i, model in enumerate(models)
        for metric, column in columns.items()
    ]


def _families(values: pd.DataFrame):
    """Yield (k, metric, {method: matrix (queries, draws)}) with methods in table order, random last.

    Queries without initial noise have no image metrics; each family holds the queries that have its
    metric. K = 0 comes last and holds only ``seed``.
    """
    values = values[values["method"] != BASE]
    for k in sorted(values["k"].unique(), key=lambda k: (k == 0, k)):
        for metric in METRICS:
            family = values[(values["k"] == k) & (values["metric"] == metric)]
            methods = sorted(family["method"].unique(), key=lambda method: method == RANDOM)
            samples = {method: _matrix(family[family["method"] == method]) for method in methods}
            if samples:
                yield int(k), metric, samples


def _matrix(rows: pd.DataFrame) -> np.ndarray:
    """Values of one method, shape (queries, draws), queries sorted by name.

    A query's own model is its only draw; the models of ``random`` and ``seed`` are named by draw.
    """
    shared = rows["method"].isin([RANDOM, SEED_SET])
    rows = rows.assign(draw=rows["member"].where(shared, "own"))
    return rows.pivot(index="query", columns="draw", values="value").sort_index().to_numpy()
